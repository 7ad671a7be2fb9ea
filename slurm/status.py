"""Where a run on the cluster stands, and what it says.

    python -m slurm.status RUN                    (= mujina status: RUN is a run's folder or its YAML file)

Reads the run's folder, and asks squeue and sacct about its jobs. Needs no torch.
"""

import shutil
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_jobs import config as configuration
from megatron_jobs import failures
from mujina.user_input import UserError, command_line
from slurm import history

SHOWN = 10  # attempts


def main(
    run_or_config: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, or its YAML file")],
) -> None:
    """Shows where a run stands: its job, progress, attempts with their ends, nodes that are left out, and the first error."""
    folder = folder_of(run_or_config)
    console = Console(highlight=False, width=max(100, shutil.get_terminal_size(fallback=(160, 24)).columns))
    attempts = history.attempts(folder)
    step, tokens = history.standing(folder)
    last = history.last_step(folder)
    console.print(str(folder), style="bold", markup=False)
    if attempts and attempts[-1].outcome in ("mistake", "crash", "preflight"):
        console.print(f"first error: {_first_error(folder, attempts[-1])}", style="red", markup=False)
        if diagnosis := attempts[-1].extra.get("diagnosis"):
            console.print(f"not requeued: {diagnosis}", style="red", markup=False)
    for line in _jobs(history.jobs(folder)):
        console.print(line, markup=False)
    if last:
        ago = max(0.0, time.time() - last["time"])  # clocks differ
        console.print(
            f"step {last['step']:,} in phase {last['phase']}, {ago:,.0f} s ago: loss {last['loss']:.4f}, "
            f"{last['tokens_per_second']:,.0f} tokens/s; newest checkpoint: step {step:,}, {tokens:,} tokens"
        )
    else:
        console.print("no step is trained yet")
    if attempts:
        console.print(_table(attempts))
    for node, about in history.excluded(folder).items():
        console.print(f"left out: {node}, since {_clock(about['since'])}: {about['reason']}", markup=False)


def folder_of(run_or_config: Path) -> Path:
    """The run's folder. Raises UserError when it is neither a folder nor a configuration."""
    if run_or_config.suffix in (".yaml", ".yml"):
        return configuration.load(run_or_config).run
    if not run_or_config.is_dir():
        raise UserError(f"{run_or_config}: is no folder: name a run's folder or its YAML file")
    return run_or_config


def _first_error(folder: Path, attempt: history.Attempt) -> str:
    """What the first rank to fail has written in this attempt; the attempt's reason where none has."""
    logs = (folder / "logs" / str(name) for name in attempt.extra.get("logs", ()))
    return next(filter(None, map(failures.first_error, logs)), attempt.reason)


def _jobs(jobs: list[str]) -> list[str]:
    """What squeue says of the newest of these jobs that are still there, and sacct of those that are not."""
    jobs = jobs[-SHOWN:]
    if not jobs or shutil.which("squeue") is None:
        return []
    waiting = _asked("squeue", "-h", "-j", ",".join(jobs), "-o", "%i|job %i %T, %M of %l, nodes %N, %r")
    there = dict(line.split("|", 1) for line in waiting)
    # A cluster without accounting may still keep the ends of jobs.
    ways = (["sacct", "-X"], ["sacct", "--completion"])
    gone = ",".join(job for job in jobs if job not in there)
    ended = next(filter(None, (_asked(*way, "-n", "-P", "-j", gone, "-o", "JobID,State,ExitCode") for way in ways if gone)), [])
    return ["job {} {}, exit status {}".format(*line.split("|")) for line in ended] + list(there.values())


def _asked(*command: str) -> list[str]:
    """The lines of the answer; none where the command fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def _table(attempts: list[history.Attempt]) -> Table:
    table = Table()
    for title in ("attempt", "job", "nodes", "began", "lasted", "steps", "tokens", "outcome"):
        table.add_column(title, no_wrap=True)
    table.add_column("reason")
    # What was saved last is seen by where the next one began: the end may have come without a word, or before the save was whole.
    nexts = [*((one.step, one.tokens) for one in attempts[1:]), (attempts[-1].step_after, attempts[-1].tokens_after)]
    for number, (attempt, (step, tokens)) in list(enumerate(zip(attempts, nexts, strict=True), start=1))[-SHOWN:]:
        table.add_row(
            str(number),
            f"{attempt.job}.{attempt.restart}",
            str(len(attempt.nodes)),
            _clock(attempt.began),
            str(timedelta(seconds=round(attempt.ended - attempt.began))) if attempt.ended else "",
            f"{attempt.step:,} →" + (f" {step:,}" if step is not None else ""),
            f"+{tokens - attempt.tokens:,}" if tokens is not None else "",
            attempt.outcome or ("runs" if number == len(attempts) else "without a word"),
            attempt.reason.splitlines()[-1] if attempt.reason else "",
        )
    return table


def _clock(seconds: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds))


if __name__ == "__main__":
    command_line(main)
