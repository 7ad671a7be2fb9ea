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
from user_input import read_yaml, run


def _print_tables(config: PrepareConfig, manifests: list[Manifest]) -> None:
    console = Console()
    piped = {name: Path(config.output) / name for name, source in config.sources.items() if pipeline.is_needed(source)}
    if piped:
        console.print(table([pipeline.report(name, config.sources[name], folder) for name, folder in piped.items()]))
        console.print(*(folder / "report.html" for folder in piped.values()), sep="\n")
    if manifests:
        console.print(_binaries(manifests))


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
) -> None:
    """Takes documents through their steps, and tokenizes them into Megatron's indexed binaries, one for every source."""
    settings = read_yaml(config, PrepareConfig, overrides)
    if settings.executor == "slurm":
        submit_to_slurm(settings)
    else:
        _print_tables(settings, run_on_ray(settings) if settings.executor == "ray" else prepare(settings))


if __name__ == "__main__":
    run(main)
