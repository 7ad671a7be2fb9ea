"""Raw text to documents to token binaries: every source of a configuration through its steps, then through the tokenizer.

    python -m data_prep.prepare CONFIG.yaml [key=value ...]        (= mujina prepare)

CONFIG is a `data_prep.config.PrepareConfig`; `configs/` holds one for each kind of source. On this machine the command ends when all is
done. With `executor: slurm` it submits array jobs, each stage after the one before, and ends; with `executor: ray` the steps run on the
cluster that RAY_ADDRESS names, and tokenization here. The same command goes on where a run was stopped, and changes nothing that is done.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from data_prep import pipeline
from data_prep.config import PrepareConfig
from data_prep.executors import prepare, run_on_ray, submit_to_slurm
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


def _shared_out(config: PrepareConfig, share: str) -> PrepareConfig:
    """The configuration with its `share` of the sources. Raises UserError when that is not of the form I/N."""
    number, slash, of = share.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise UserError(f"--share ({share}) must be I/N with I from 0 to N - 1: write for example 0/4")
    chosen = list(config.sources)[int(number) :: int(of)]
    return config.model_copy(update={"sources": {name: config.sources[name] for name in chosen}})


def _binaries(manifests: list[Manifest]) -> Table:
    binaries = Table("source", "kind", "origin")
    for title in ("documents", "tokens", "characters per token"):
        binaries.add_column(title, justify="right")
    for m in manifests:
        binaries.add_row(m.name, m.kind, m.origin, f"{m.num_documents:,}", f"{m.num_tokens:,}", f"{m.num_characters / m.num_tokens:.2f}")
    binaries.add_section()
    binaries.add_row("all", "", "", f"{sum(m.num_documents for m in manifests):,}", f"{sum(m.num_tokens for m in manifests):,}", "")
    return binaries


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the sources, their steps, the output and the tokenizer, see PrepareConfig")],
    overrides: Annotated[list[str] | None, typer.Argument(help="values that replace the file's, such as output=runs/data")] = None,
    share: Annotated[str, typer.Option(help="I/N: every N-th source, from number I on (0 … N - 1), for the tasks of an array")] = "0/1",
    documents_only: Annotated[bool, typer.Option("--documents-only", help="stop before tokens")] = False,
) -> None:
    """Takes documents through their steps, and tokenizes them into Megatron's indexed binaries, one for every source."""
    settings = _shared_out(read_yaml(config, PrepareConfig, overrides), share)
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
