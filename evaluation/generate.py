"""Answers of a chat model, greedily decoded.

    python -m evaluation.generate HF_FOLDER "What is 3 + 4?" ["another prompt" …] [--max-new-tokens 64]

Each prompt is a conversation of its own. In the place of a folder may stand http://host:port/v1#model, an OpenAI-compatible server.
"""

from typing import Annotated

import typer

from evaluation.progress import answered
from mujina.answers import Sampling, open_answerer, question
from mujina.user_input import command_line


def main(
    model: Annotated[
        str, typer.Argument(metavar="HF_FOLDER", help="Folder of a Hugging Face model with a chat tokenizer, or http://host:port/v1#model.")
    ],
    prompts: Annotated[list[str], typer.Argument(help="What the user says; several prompts are answered one by one.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
) -> None:
    """Answers prompts with a chat model, greedily."""
    sampling = Sampling(max_new_tokens)
    found = answered(open_answerer(model), [question(prompt) for prompt in prompts], sampling)
    for prompt, [answer] in zip(prompts, list(found), strict=True):
        print(f"> {prompt}\n{answer.text}{'' if answer.stopped else f' … (cut off after {max_new_tokens} tokens)'}\n")


if __name__ == "__main__":
    command_line(main)
