"""Runs a chain of verbs, here or as Slurm jobs, and goes on where it stopped.

    mujina chain CHAIN.yaml [key=value …]                  one station after the other, on this machine
    mujina chain CHAIN.yaml [key=value …] --slurm          each as a job that waits for those it needs; call it again to see how they stand
    mujina chain CHAIN.yaml [key=value …] --dry-run        what would be done, and why

`Chain` is what the YAML file holds; examples/quickstart/chain.yaml and slurm/chain.yaml are two. A station is done, and passed over, when

    its command has ended with status 0,    and is the same now (its arguments, and every YAML file that it names, or that those name),
    its `outputs` are there,                and nothing that it needs has run since, or has to run.

So a station that failed or was stopped runs again, and its verb takes up what it had begun. To run one anew, remove one of its outputs;
to run all anew, the folder of the chain:

    FOLDER/chain.jsonl         a line for each station that has ended here or was submitted: see `Row`
    FOLDER/summary.json        how each station stands, and its seconds over all the calls until it was done
    FOLDER/jobs, FOLDER/logs   what the jobs write

SIGTERM and Ctrl-C reach the station that runs as SIGTERM; then, or when it fails, the chain ends with its status (`mujina.exits`).
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

import pydantic
import typer

from mujina import sbatch
from mujina.disks import flush
from mujina.exits import MISTAKE, STOPPED
from mujina.files import sha256_of, write_whole
from mujina.locks import hold
from mujina.processes import end_with_parent
from mujina.stations import Plan, Station, files_named, read_chain
from mujina.user_input import UserError, command_line, reading


@dataclass
class Row:
    """A line of the journal: one call of a station's command."""

    station: str
    command: list[str]  # verb and arguments
    files: dict[str, str]  # the YAML files that say what the command does: path → SHA-256
    began: float  # seconds since 1970; of a job: when it was submitted
    seconds: float = 0.0
    status: int | None = None  # None: it has not ended, or without a word
    job: str | None = None  # its number in Slurm
    tasks: int = 1  # of the job's array
    is_queued: bool = False  # the job waits or runs; not in the file


class Journal:
    """The rows of a chain, oldest first. Who opens it for writing holds the chain's folder."""

    def __init__(self, folder: Path, read_only: bool) -> None:
        self.folder, path = folder, folder / "chain.jsonl"
        self._file: IO[bytes] | None = None
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        if self._file and lines[-1]:  # power was lost in the middle of a line
            self._file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        self.rows = []
        for number, line in enumerate(lines[:-1], start=1):
            with reading(f"{path} line {number}", "a row of a chain's journal", "take the line out, and its station runs again"):
                self.rows.append(pydantic.TypeAdapter(Row).validate_json(line))
        self._read_ends()
        if any(row.job and row.status != 0 for row in self.rows):
            queued = sbatch.in_queue()
            self._read_ends()  # a job may have ended before squeue was asked, and after its end was looked for
            for row in self.rows:
                row.is_queued = row.job in queued and row.status != 0

    def _read_ends(self) -> None:
        for row in self.rows:
            if row.job and (end := sbatch.ended(self.folder / "jobs", row.job, row.tasks)):
                row.status, row.seconds = end

    def add(self, row: Row) -> None:
        """The row is safely on the disk when this returns."""
        assert self._file
        self.rows.append(row)
        values = {key: value for key, value in asdict(row).items() if key != "is_queued"}
        self._file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        flush(self._file)

    def last(self, station: str) -> tuple[int, Row] | None:
        """A station's newest row, and its position."""
        return next(((at, row) for at, row in reversed(list(enumerate(self.rows))) if row.station == station), None)

    def seconds(self, station: str) -> float:
        """What a station has cost since it was last done, or until then when it is done."""
        seconds, is_new = 0.0, True
        for row in self.rows:
            if row.station == station:
                seconds = row.seconds + (0.0 if is_new else seconds)
                is_new = row.status == 0
        return round(seconds, 1)


def reasons(plan: Plan, journal: Journal) -> dict[str, str]:
    """{station: why it has to run}, in order, of those that are neither done nor in the queue."""
    due: dict[str, str] = {}
    for station in plan.stations:
        if reason := _reason(station, journal, due):
            due[station.name] = reason
    return due


def _reason(station: Station, journal: Journal, due: dict[str, str]) -> str | None:
    found = journal.last(station.name)
    if found is None:
        return "has not run yet"
    position, row = found
    if row.is_queued:
        return None
    if row.job and row.status != 0:
        how = "without a word" if row.status is None else f"with status {row.status}{_meaning(row.status)}"
        return f"job {row.job} ended {how}: see {journal.folder}/logs"
    if row.status:
        return f"ended with status {row.status}{_meaning(row.status)}"
    if row.command != station.command:
        return "has another command now"
    if changed := [path for path, digest in row.files.items() if not Path(path).exists() or sha256_of(path) != digest]:
        return f"{changed[0]} has changed"
    if missing := [path for path in station.outputs if not path.exists()]:
        return f"{missing[0]} is missing"
    for need in station.needs:
        if need in due:
            return f"{need} has to run"
        if (before := journal.last(need)) and before[0] > position:
            return f"{need} has run again"
    return None


def _meaning(status: int) -> str:
    return {MISTAKE: " (a mistake)", STOPPED: " (it was told to stop)"}.get(status, "")


class Here:
    """Runs commands on this machine, one at a time; SIGINT and SIGTERM reach the one that runs as SIGTERM."""

    def __init__(self) -> None:
        self.is_told_to_stop = self._has_passed_on = False
        self._process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self._stop())

    def run(self, command: list[str]) -> int:
        """Returns the exit status."""
        # In a session of its own: Ctrl-C reaches this process alone. If this one is killed outright, the command is told to stop.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mujina", *command], start_new_session=True, preexec_fn=partial(end_with_parent, signal.SIGTERM)
        )
        if self.is_told_to_stop and not self._has_passed_on:  # it came before there was anybody to pass it on to
            self._stop()
        status = self._process.wait()
        self._process = None
        return status if status >= 0 else 128 - status

    def _stop(self) -> None:
        self.is_told_to_stop = True
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._has_passed_on = True


def run_here(plan: Plan, journal: Journal) -> tuple[int, str]:
    """Runs what is due, in order, up to the first station that fails; returns the exit status, and where the chain ended."""
    due, here = reasons(plan, journal), Here()
    for station in plan.stations:
        if row := _queued(journal, station.name):
            raise UserError(f"station {station.name}: job {row.job} is in the queue: wait for it, go on with --slurm, or scancel it")
    for station in plan.stations:
        if station.name not in due:
            print(f"--- {station.name}: is done", flush=True)
            continue
        if here.is_told_to_stop:
            return STOPPED, station.name
        print(f"\n--- {station.name}: mujina {shlex.join(station.command)}", flush=True)
        files, began, clock = _digests(station.command), time.time(), time.monotonic()
        status = here.run(station.command)
        if status == 0 and (missing := [path for path in station.outputs if not path.exists()]):
            print(f"error: station {station.name} ended well and left no {missing[0]}: mend its `outputs`", file=sys.stderr)
            status = MISTAKE
        journal.add(Row(station.name, station.command, files, began, round(time.monotonic() - clock, 3), status))
        if status:
            return status, station.name
    return 0, ""


def _digests(command: list[str]) -> dict[str, str]:
    return {str(path): sha256_of(path) for path in files_named(command)}


def run_on_slurm(plan: Plan, journal: Journal) -> None:
    """Submits what is due, each station as a job that starts when those that it needs have ended well, and returns.

    Raises UserError when a job of an earlier call is in the queue that should not be.
    """
    due = reasons(plan, journal)
    for name in ("jobs", "logs"):
        (journal.folder / name).mkdir(exist_ok=True)
    for station in plan.stations:
        if queued := _queued(journal, station.name):
            _check_queued(station, queued, due)
        elif station.name in due:
            before = [_queued(journal, need) for need in station.needs]
            arguments = job_arguments(plan, station, [row.job for row in before if row and row.job])
            job = sbatch.submit(arguments, MUJINA_CHAIN_JOBS=str(journal.folder.absolute() / "jobs"))
            row = Row(station.name, station.command, _digests(station.command), time.time(), job=job, tasks=station.array or 1)
            row.is_queued = True
            journal.add(row)
            print(f"job {job}: {station.name}: sbatch {shlex.join(arguments)}", flush=True)


def _queued(journal: Journal, station: str) -> Row | None:
    """The row of a station's job that waits or runs."""
    found = journal.last(station)
    return found[1] if found and found[1].is_queued else None


def _check_queued(station: Station, row: Row, due: dict[str, str]) -> None:
    again = next((need for need in station.needs if need in due), None)
    if again or row.command != station.command:
        why = f"{again} has to run before it" if again else f"of an earlier call, with another command (mujina {shlex.join(row.command)})"
        raise UserError(f"station {station.name}: job {row.job} is in the queue, and {why}: scancel {row.job}, then call this again")


def job_arguments(plan: Plan, station: Station, jobs: list[str]) -> list[str]:
    """What sbatch is called with; `jobs` are those to wait for."""
    options = [f"--job-name={station.slug}", f"--output={plan.folder}/logs/%x-{'%A-%a' if station.array else '%j'}.log"]
    options += [f"--array=0-{station.array - 1}"] if station.array else []
    options += [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"] if jobs else []
    return [*options, *plan.sbatch, *station.sbatch, str(station.script), *station.script_arguments]


def standing(plan: Plan, journal: Journal) -> list[dict[str, Any]]:
    """How each station stands, in order: its name, state, status, seconds and job."""
    due = reasons(plan, journal)
    table = []
    for station in plan.stations:
        found = journal.last(station.name)
        row = found[1] if found else None
        state = "in the queue" if row and row.is_queued else due.get(station.name, "done")
        status, job = (row.status, row.job) if row else (None, None)
        table.append({"station": station.name, "state": state, "status": status, "seconds": journal.seconds(station.name), "job": job})
    return table


def show(table: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("station", "state", "job", "seconds")
    shown.columns[-1].justify = "right"
    for row in table:
        shown.add_row(row["station"], row["state"], row["job"] or "", f"{row['seconds']:,.1f}" if row["seconds"] else "")
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    console.print(shown)


def main(
    file: Annotated[Path, typer.Argument(metavar="CHAIN.yaml", help="the chain's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for a variable or a field of the chain")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="submit every station as a job, and return")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done, and why, and do nothing")] = False,
) -> None:
    """Runs the stations of a chain that are not done yet, in order."""
    plan = read_chain(file, overrides or [])
    if dry_run:
        journal = Journal(plan.folder, read_only=True)
        due = reasons(plan, journal)
        for station in plan.stations:
            queued = _queued(journal, station.name)
            print(f"--- {station.name}: {due.get(station.name) or (f'job {queued.job} is in the queue' if queued else 'is done')}")
            if station.name in due:
                waits_for = [f"<job of {need}>" for need in station.needs if need in due or _queued(journal, need)]
                print(shlex.join(["sbatch", *job_arguments(plan, station, waits_for)] if slurm else ["mujina", *station.command]))
        return
    status, last = 0, ""
    with hold(plan.folder / ".lock", f"chain {plan.folder}"):
        journal = Journal(plan.folder, read_only=False)
        if slurm:
            run_on_slurm(plan, journal)
        else:
            status, last = run_here(plan, journal)
    table = standing(plan, journal)
    seconds = round(sum(row["seconds"] for row in table), 1)
    write_whole(plan.folder / "summary.json", json.dumps({"chain": plan.name, "stations": table, "seconds": seconds}, indent=1).encode())
    print()
    show(table)
    if status:
        print(
            f"error: chain {plan.name} ended at station {last} with status {status}{_meaning(status)}; to go on from there: "
            f"{shlex.join(['mujina', 'chain', str(file), *(overrides or [])])}",
            file=sys.stderr,
        )
        sys.exit(status)
    print(f"{seconds:,.0f} seconds in all; {plan.folder}/summary.json")


if __name__ == "__main__":
    command_line(main)
