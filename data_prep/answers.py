"""Whether a dialogue can be trained on for its answers: somebody answers, and the chat template writes what the turns say and no more."""

import re
from collections.abc import Sequence

import numpy as np

from tokenization.tokenizer import Rendered

# What a template puts between turns, such as "user" or "### Response:", is short and no sentence.
MOST_BETWEEN = 24  # characters
SENTENCE = re.compile(r"[.!?。．！？]|think")


def problem_of(messages: Sequence[dict[str, str]], rendered: Rendered, may_change: bool) -> str | None:
    """Why the dialogue is none to train on, with the remedy; None where it is one.

    may_change   the template may add what no turn says and leave out what one says
    """
    for number, (turn, before) in enumerate(zip(messages, [None, *messages], strict=False), 1):
        if before and turn["role"] == before["role"] in ("user", "assistant"):
            return f"turn {number} ({turn['role']}) follows another of the same role: join them, or drop the row"
        if turn["role"] == "assistant" and not turn["content"].strip():
            return f"turn {number} (assistant) says nothing: write its answer, or drop the row"
    if not rendered.is_answer.any():
        return "has no turn of the assistant, so that there is nothing to train on: add one, or drop the row"
    return None if may_change else _change(messages, rendered.text)


def last_answer(rendered: Rendered) -> Rendered:
    """The dialogue with only the last turn of the assistant as an answer."""
    begins = np.flatnonzero(np.diff(rendered.is_answer.astype(np.int8), prepend=0) == 1)
    return rendered._replace(is_answer=rendered.is_answer & (np.arange(len(rendered.ids)) >= begins[-1]))


def _change(messages: Sequence[dict[str, str]], text: str) -> str | None:
    """What the template has made of a dialogue. `text` is all that it wrote but control tokens, of which each is a NUL."""
    remedy = "set template_may_change: true if that is wanted, change chat_template.jinja, or drop the row"
    as_said, joined = True, "".join(text.split())
    for number, turn in sorted(enumerate(messages, 1), key=lambda numbered: -len(numbered[1]["content"])):
        content = turn["content"].strip()
        if content in text:
            text = text.replace(content, "\0", 1)
        elif "".join(content.split()) in joined:
            as_said = False  # in other lines: what was added cannot be told from it
        else:
            return f"the chat template leaves out what turn {number} ({turn['role']}) says, or a part of it: {remedy}"
    for added in text.split("\0") if as_said else ():
        if len(added.strip()) > MOST_BETWEEN or SENTENCE.search(added):
            return f"the chat template adds {added.strip()[:80]!r}, which no turn says: {remedy}"
    return None
