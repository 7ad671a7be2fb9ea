"""Raw text to documents to token binaries: every source of a configuration through its steps, then through the tokenizer.

    python -m data_prep.prepare CONFIG.yaml [key=value ...]        (= mujina prepare)

CONFIG is a `data_prep.config.PrepareConfig`; `configs/` holds one for each kind of source. On this machine the command ends when all is
done. With `executor: slurm` it submits array jobs, each stage after the one before, and ends; with `executor: ray` the steps run on the
cluster that RAY_ADDRESS names, and tokenization here. The same command goes on where a run was stopped, and changes nothing that is done:
what was read must still be there, what was written is looked at again, and made again where it is lost or damaged. Who prepares a source
keeps all others away from it (`mujina.locks.hold`).
"""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from data_prep import pipeline
from data_prep.config import PrepareConfig
from data_prep.executors import notes, prepare, run_on_ray, submit_to_slurm
from data_prep.indexed import Manifest
from data_prep.report import table
from mujina.user_input import UserError, command_line, read_yaml


def _print_tables(config: PrepareConfig, manifests: list[Manifest]) -> None:
    console = Console()
    piped = {name: Path(config.output) / name for name, source in config.sources.items() if pipeline.is_needed(source)}
    if piped:
        console.print(table([pipeline.report(name, config.sources[name], folder) for name, folder in piped.items()]))
        console.print(*(folder / "report.html" for folder in piped.values()), sep="\n")
    if manifests:
        console.print(_binaries(manifests))
        for note in notes(config, manifests):
            console.print(note, markup=False, soft_wrap=True)


def shared_out(config: PrepareConfig, share: str) -> PrepareConfig:
    """The configuration with its `share` of the sources. Raises UserError when that is none."""
    number, slash, of = share.partition("/")
    if number == "array":
        number = os.environ.get("SLURM_ARRAY_TASK_ID", "")
        if not number:
            raise UserError(f"--share ({share}) is for the tasks of a Slurm array, and this is none: write I/N, for example 0/4")
        of = of if slash else _tasks_of_array()
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        if share.startswith("array"):
            raise UserError(f"--share ({share}): task {number} of the array is none of 0 … {of} - 1: number the tasks of the array so")
        raise UserError(f"--share ({share}) must be I/N with I from 0 to N - 1: write for example 0/4")
    chosen = list(config.sources)[int(number) :: int(of)]
    return config.model_copy(update={"sources": {name: config.sources[name] for name in chosen}})


def _tasks_of_array() -> str:
    """How many shares there are, where an array tells it: 0-7 are eight. Of 3, of 0,2,5 and of 0-14:2 only the user knows."""
    first, last, count = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("MIN", "MAX", "COUNT"))
    if first != 0 or count != last + 1:
        raise UserError(
            f"--share (array): the tasks of this array ({count} from {first} to {last}) are not all of 0 … N - 1, so nobody knows of how "
            f"many shares each does one: add --share array/N (where the whole array is 0-7, N is 8), or start the whole array"
        )
    return str(count)


def _binaries(manifests: list[Manifest]) -> Table:
    binaries = Table("source", "kind", "origin")
    for title in ("documents", "tokens", "of which answers", "characters per token"):
        binaries.add_column(title, justify="right")
    for m in manifests:
        answers = f"{m.num_answer_tokens:,}" if m.num_answer_tokens else ""
        counts = f"{m.num_documents:,}", f"{m.num_tokens:,}", answers, f"{m.num_characters / m.num_tokens:.2f}"
        binaries.add_row(m.name, m.kind, m.origin, *counts)
    binaries.add_section()
    sums = (sum(getattr(m, name) for m in manifests) for name in ("num_documents", "num_tokens", "num_answer_tokens"))
    binaries.add_row("all", "", "", *(f"{count:,}" for count in sums), "")
    return binaries


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the sources, their steps, the output and the tokenizer, see PrepareConfig")],
    overrides: Annotated[list[str] | None, typer.Argument(help="values that replace the file's, such as output=runs/data")] = None,
    share: Annotated[
        str,
        typer.Option(
            help="I/N: every N-th source, from number I on (0 … N - 1); array/N: I is the number of this task of a Slurm array; array: "
            "N is the size of the array, which must then be 0-(N-1)"
        ),
    ] = "0/1",
    documents_only: Annotated[bool, typer.Option("--documents-only", help="stop before tokens")] = False,
) -> None:
    """Takes documents through their steps, and tokenizes them into Megatron's indexed binaries, one for every source."""
    settings = shared_out(read_yaml(config, PrepareConfig, overrides), share)
    if documents_only:
        sources = {name: source for name, source in settings.sources.items() if pipeline.is_needed(source)}
        settings = settings.model_copy(update={"sources": sources, "tokenizer": None})
    if not settings.sources:
        print("no source is left to be prepared here")
        return
    if settings.executor == "slurm":
        submit_to_slurm(settings)
    else:
        _print_tables(settings, run_on_ray(settings) if settings.executor == "ray" else prepare(settings))


if __name__ == "__main__":
    command_line(main)
