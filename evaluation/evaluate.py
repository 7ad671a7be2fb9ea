"""Scores a chat model's answers with a suite.

    python -m evaluation.evaluate HF_FOLDER --prompts held_out.jsonl --output result.json [--limit 100]

In the place of a folder may stand an OpenAI-compatible server and its name for the model: http://host:port/v1#model.

Every answer is kept beside the output, in result.journal.jsonl (mujina/answers/journal.py): stopped or killed at any moment, the same
command goes on and asks nothing twice, and the result has the same bytes.
"""

from pathlib import Path
from typing import Annotated

import typer

from evaluation.result import Result
from evaluation.suites import arithmetic
from mujina.answers import open_answerer
from mujina.answers.journal import Journalled, open_journal
from mujina.files import write_whole
from mujina.user_input import command_line


def main(
    model: Annotated[
        str, typer.Argument(metavar="HF_FOLDER", help="Folder of a Hugging Face model with a chat tokenizer, or http://host:port/v1#model.")
    ],
    prompts: Annotated[Path, typer.Option(help="JSONL of held-out sums.")],
    output: Annotated[Path, typer.Option(help="Where the result goes, as JSON.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")] = None,
) -> None:
    """Scores a chat model on sums: the share of answers in the fixed form, and of right ones."""
    arithmetic.read_problems(prompts)  # a mistake in it is told before a model is loaded
    with open_journal(output.with_name(f"{output.stem}.journal.jsonl")) as journal:
        result = arithmetic.evaluate(Journalled(open_answerer(model), journal), model, prompts, limit)
    write_whole(output, (result.model_dump_json(indent=2) + "\n").encode())
    show(result)


def show(result: Result) -> None:
    """Prints the measures, over all prompts and by group."""
    from rich.console import Console
    from rich.table import Table

    table = Table(result.model, "prompts", *result.suite.measures)
    for name, scores in {"all": result, **result.groups}.items():
        numbers = [measure.in_words(scores.measures[name]) for name, measure in result.suite.measures.items()]
        table.add_row(name, f"{scores.num_prompts:,}", *numbers)
    Console().print(table)


if __name__ == "__main__":
    command_line(main)
