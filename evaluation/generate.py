"""Answers of a Hugging Face chat model, greedily decoded.

    python -m evaluation.generate HF_FOLDER "What is 3 + 4?" ["another prompt" …] [--max-new-tokens 64]

Each prompt is a conversation of its own. Legend of shapes: B conversations, L tokens of the longest prompt in the batch, N new tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mujina.user_input import UserError, run
from tokenization.tokenizer import END_OF_TURN

BATCH_SIZE = 16  # conversations decoded together


@dataclass(frozen=True)
class Answer:
    """What the model said. `stopped`: it ended the turn by itself, rather than running into the limit of new tokens."""

    text: str
    stopped: bool


def answers(folder: Path, conversations: list[list[dict[str, str]]], max_new_tokens: int) -> list[Answer]:
    """The model's next turn in each conversation (a list of {role, content}), in the given order.

    Decoding is greedy whatever the folder's generation config says, and ends at `<|end|>` or the tokenizer's end of sequence.
    Special tokens other than those stay in the text: a model that writes `<|user|>` into its answer should be seen doing so.
    Raises UserError when `folder` is not a Hugging Face folder, has no chat template or no token to stop at.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens ({max_new_tokens}) must be at least 1: leave it out for the default")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a Hugging Face folder (no config.json): write one with `mujina convert`")

    import torch
    from rich.console import Console
    from rich.progress import track

    model, tokenizer = _load(folder)
    stop_ids = _stop_ids(folder, tokenizer)
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in conversations]
    batches = [prompts[start : start + BATCH_SIZE] for start in range(0, len(prompts), BATCH_SIZE)]
    result: list[Answer] = []
    for batch in track(batches, description="generating", console=Console(stderr=True)):
        length = max(map(len, batch))
        # The mask follows from positions: the padding token may be one that prompts hold too.
        ids_BL = torch.tensor([[stop_ids[0]] * (length - len(prompt)) + prompt for prompt in batch], device=model.device)
        mask_BL = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device)
        ids_BLN = model.generate(
            ids_BL, attention_mask=mask_BL, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=stop_ids[0]
        )
        result += [_answer(tokenizer, ids_N, stop_ids) for ids_N in ids_BLN[:, length:].tolist()]
    return result


def _load(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    except (OSError, ValueError) as error:
        problem = f"cannot be loaded as a Hugging Face model and tokenizer ({error})"
        raise UserError(f"{folder}: {problem}: write it with `mujina convert`") from None
    model.generation_config = GenerationConfig()  # the folder's own may ask for sampling
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    if tokenizer.chat_template is None:
        raise UserError(f"{folder}: its tokenizer has no chat template: use a chat tokenizer when converting, or add chat_template.jinja")
    end_of_turn = tokenizer.get_vocab().get(END_OF_TURN)
    stop_ids = [token for token in (end_of_turn, tokenizer.eos_token_id) if token is not None]
    if not stop_ids:
        raise UserError(f"{folder}: its tokenizer has neither {END_OF_TURN} nor an end-of-sequence token, so no answer could end: add one")
    return stop_ids


def _answer(tokenizer: Any, ids_N: list[int], stop_ids: list[int]) -> Answer:
    end = next((position for position, token in enumerate(ids_N) if token in stop_ids), None)
    return Answer(text=tokenizer.decode(ids_N[:end]).strip(), stopped=end is not None)


def main(
    folder: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="Folder of a Hugging Face model with a chat tokenizer.")],
    prompts: Annotated[list[str], typer.Argument(help="What the user says; several prompts are answered one by one.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
) -> None:
    """Answers prompts with a Hugging Face chat model, greedily."""
    found = answers(folder, [[{"role": "user", "content": prompt}] for prompt in prompts], max_new_tokens)
    for prompt, answer in zip(prompts, found, strict=True):
        print(f"> {prompt}\n{answer.text}{'' if answer.stopped else f' … (cut off after {max_new_tokens} tokens)'}\n")


if __name__ == "__main__":
    run(main)
