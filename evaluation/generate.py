"""Answers of a chat model, greedily decoded, or how a base model goes on with a text.

    python -m evaluation.generate HF_FOLDER "What is 3 + 4?" ["another prompt" …] [--max-new-tokens 64]

Each prompt is a conversation of its own; a folder without a chat template completes it as it stands. In the place of a folder may stand http://host:port/v1#model, an OpenAI-compatible server.
"""

from typing import Annotated

import typer

from evaluation.progress import answered
from mujina.answers import FolderAnswerer, Sampling, open_answerer, question
from mujina.user_input import command_line


def main(
    model: Annotated[str, typer.Argument(metavar="HF_FOLDER", help="Folder of a Hugging Face model, or http://host:port/v1#model.")],
    prompts: Annotated[list[str], typer.Argument(help="What the user says; several prompts are answered one by one.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
) -> None:
    """Answers prompts with a chat model, greedily; a base model, which has no chat template, completes them as plain text."""
    sampling = Sampling(max_new_tokens)
    answerer = open_answerer(model, completes=True)
    if isinstance(answerer, FolderAnswerer) and answerer.is_plain:
        print(f"{model}: has no chat template: the prompts are completed as plain text\n")
    found = answered(answerer, [question(prompt) for prompt in prompts], sampling)
    for prompt, [answer] in zip(prompts, list(found), strict=True):
        cut = "at the end of the model's context" if answer.finish_reason == "context" else f"after {max_new_tokens} tokens"
        print(f"> {prompt}\n{answer.text}{'' if answer.stopped else f' … (cut off {cut})'}\n")


if __name__ == "__main__":
    command_line(main)
