"""What a run on the cluster says.    python -m slurm.logs RUN [--follow] [--rank 3]          (= mujina logs)

The log of a rank in the newest attempt that has one; with --follow also what comes, and the logs of the attempts that come.
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from megatron_jobs import failures
from mujina.user_input import UserError, command_line
from slurm.status import folder_of

LINES = 40
POLL_SECONDS = 0.5


def main(
    run_or_config: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, or its YAML file")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on, attempt after attempt, until Ctrl-C")] = False,
    rank: Annotated[int, typer.Option(min=0, help="whose log")] = 0,
    lines: Annotated[int, typer.Option(min=1, help="how many of its last lines")] = LINES,
) -> None:
    """Prints the end of a rank's log."""
    folder = folder_of(run_or_config)
    path = newest_log(folder, rank)
    if path is None and not follow:
        raise UserError(f"{folder}/logs: has no log of rank {rank}: no attempt has begun; see `mujina status`")
    try:
        _print(folder, path, rank, lines, follow)
    except KeyboardInterrupt:
        pass


def newest_log(folder: Path, rank: int) -> Path | None:
    paths = [path for attempt in failures.attempts(folder) if (path := attempt / f"rank-{rank}.log").exists()]
    return paths[-1] if paths else None


def _print(folder: Path, path: Path | None, rank: int, lines: int, follow: bool) -> None:
    position = 0
    if path:
        text = path.read_bytes()
        position = len(text)
        print(f"==> {path} <==", *text.decode(errors="replace").splitlines()[-lines:], sep="\n", flush=True)
    while follow:
        time.sleep(POLL_SECONDS)
        if (newest := newest_log(folder, rank)) != path:
            path, position = newest, 0
            print(f"==> {path} <==", flush=True)
        if path and path.stat().st_size > position:
            with path.open("rb") as file:
                file.seek(position)
                new = file.read()
            position += len(new)
            print(new.decode(errors="replace"), end="", flush=True)


if __name__ == "__main__":
    command_line(main)
