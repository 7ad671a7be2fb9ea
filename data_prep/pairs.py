"""Pairs of answers to one prompt, of which one was preferred: the forms in which public data sets write them.

    {"messages": [turns …], "chosen": "…", "rejected": "…"}           the prompt's turns (`prompt` is another name for them), two answers
    {"prompt": "…", "chosen": [turns …], "rejected": [turns …]}       as UltraFeedback: the answers are whole dialogues, or the turns behind
    {"chosen": [turns …], "rejected": [turns …]}                      the prompt is what both begin with

Here a pair is one list of turns: the prompt's, and then two of the assistant, the chosen answer and the rejected one. So steps treat both
as they treat all that is said.
"""

from typing import Any

Turns = list[dict[str, Any]]
KEYS = ("prompt", "chosen", "rejected")


def turns_of(fields: dict[str, Any]) -> Turns | str:
    """The turns of a pair, or why the fields are none."""
    prompt = fields.get("messages") if fields.get("messages") is not None else fields.get("prompt")
    if fields.get("chosen") is None and fields.get("rejected") is None and isinstance(prompt, list) and _is_pair(prompt):
        return prompt  # as our own steps write it
    sides = [_as_turns(fields.get(key), "assistant") for key in ("chosen", "rejected")]
    for key, side in zip(("chosen", "rejected"), sides, strict=True):
        if not side or not isinstance(side, list):
            return f'`{key}` is no answer: write a text, or [{{"role": "assistant", "content": "..."}}]'
    said = _as_turns(prompt, "user")
    if not isinstance(said, list | None):
        return "`prompt` is no text and no list of turns: write one of them"
    if said is None:
        shared = next((n for n, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)) - 1)
        said = sides[0][:shared]
    answers = [side[len(said) :] if side[: len(said)] == said else side for side in sides]
    for key, answer in zip(("chosen", "rejected"), answers, strict=True):
        if len(answer) != 1 or not isinstance(answer[0], dict) or answer[0].get("role") != "assistant":
            return f"`{key}` is not one turn of the assistant behind the prompt: a pair is two answers to the same turns"
    if not said:
        return "has no prompt: write `messages`, or `prompt`"
    return [*said, *answers[0], *answers[1]]


def _as_turns(value: Any, role: str) -> Any:
    """A text is one turn of `role`; None is none, and what is no list of turns the caller finds."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else value


def _is_pair(turns: Turns) -> bool:
    return len(turns) > 2 and all(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in turns[-2:])
