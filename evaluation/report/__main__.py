"""One HTML page about one or several training runs, side by side: losses, data, experts, and what evaluations found.

    python -m evaluation.report RUN_FOLDER… --output report.html [--evaluation LABEL=result.json …]

Reads run folders (runs.py; a run may still be going on) and the result files of `mujina evaluate`, in the order given. The page is one
file that loads nothing.
"""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from evaluation.report.inputs import Inputs, read_evaluation
from evaluation.report.report import build
from evaluation.report.runs import read_run
from mujina.files import write_whole
from mujina.page import RUN_COLOURS
from mujina.user_input import command_line


def main(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_FOLDER...", help="Run folders that `mujina train` wrote.")],
    output: Annotated[Path, typer.Option(help="The HTML file to write.")],
    evaluation: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=RESULT", help="A result of `mujina evaluate`; may be repeated.")
    ] = None,
) -> None:
    """Draws training runs and evaluations into one HTML file."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(folder, name, RUN_COLOURS[k % len(RUN_COLOURS)]) for k, (folder, name) in enumerate(zip(folders, names, strict=True))]
    inputs = Inputs(runs, [read_evaluation(text) for text in evaluation or []])
    command = ["mujina", "report", *map(str, folders), "--output", str(output)]
    command += [word for text in evaluation or [] for word in ("--evaluation", text)]
    write_whole(output, build(inputs, shlex.join(command)).encode())
    print(f"{output}: {', '.join(names)}")


if __name__ == "__main__":
    command_line(main)
