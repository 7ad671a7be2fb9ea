"""What a run has been through on the cluster, and which nodes it stays away from: files in RUN/slurm, which jobs of the run add to.

    RUN/slurm/attempts.jsonl     a line when an attempt begins, and one when it has ended: see `Attempt`
    RUN/slurm/nodes.json         the last preflight, and the nodes that the run has left out, each with its reason and since when
    RUN/slurm/jobs               the numbers of the jobs that `mujina submit` has submitted

An attempt is one start of the training in a job; a job that is requeued makes several. One that ends without a word (its node lost power)
has no second line.

These are records: what of them is torn (by a disk that was full) counts as not written, and what cannot be written is told. Neither stops
a run.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from mujina import disks
from mujina.checkpoint_folders import resolved, step_folder, steps
from mujina.files import write_whole
from mujina.records import append

NOT_OURS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what reading a record that is none raises
EXCLUDED_SECONDS = 24 * 3600  # after which a node may be tried again


@dataclass
class Attempt:
    """Times are seconds since 1970; step and tokens are those of the newest checkpoint. `ended` None: it runs, or ended without a word."""

    job: str
    restart: int  # how often Slurm had requeued the job before
    nodes: list[str]  # of the job; of the training, once it has ended
    began: float
    step: int
    tokens: int
    ended: float | None = None
    outcome: str | None = None  # one of OUTCOMES
    reason: str = ""  # what people read: the first error in one line
    step_after: int | None = None
    tokens_after: int | None = None
    # preflight_seconds; reached: the last step; diagnosis: why it is not requeued; logs: the names of its folders in RUN/logs
    extra: dict[str, Any] = field(default_factory=dict)


# done       all steps are trained
# time       the time limit came near, and the run was saved
# stopped    told to by another than the time limit, and saved or not: scancel, scontrol requeue, preemption, another node was lost
# mistake    an error that the user has to mend, NaN included: status 2
# crash      anything else that ended the processes
# preflight  too few healthy nodes
OUTCOMES = ("done", "time", "stopped", "mistake", "crash", "preflight")


_ATTEMPT = pydantic.TypeAdapter(Attempt)


def attempts(run: Path) -> list[Attempt]:
    """All attempts of a run, oldest first."""
    found: dict[tuple[str, int], Attempt] = {}
    for line in _lines(run / "slurm/attempts.jsonl"):
        with contextlib.suppress(*NOT_OURS):
            values = json.loads(line)
            key = (str(int(values["job"])), values["restart"])
            found[key] = _ATTEMPT.validate_python(asdict(found[key]) | values if key in found else values)
    return list(found.values())


def began(run: Path, job: str, restart: int, nodes: list[str]) -> Attempt:
    step, tokens = standing(run)
    attempt = Attempt(job, restart, nodes, time.time(), step, tokens)
    _append(run / "slurm/attempts.jsonl", json.dumps(asdict(attempt), ensure_ascii=False))
    return attempt


def ended(run: Path, attempt: Attempt, outcome: str, reason: str) -> None:
    assert outcome in OUTCOMES
    step, tokens = standing(run)
    attempt.ended, attempt.outcome, attempt.reason, attempt.step_after, attempt.tokens_after = time.time(), outcome, reason, step, tokens
    keys = ("job", "restart", "nodes", "ended", "outcome", "reason", "step_after", "tokens_after", "extra")
    _append(run / "slurm/attempts.jsonl", json.dumps({key: getattr(attempt, key) for key in keys}, ensure_ascii=False))


def submitted(run: Path, job: str) -> None:
    _append(run / "slurm/jobs", job)


def jobs(run: Path) -> list[str]:
    """All jobs of a run, oldest first, those included that have not begun."""
    known = [line for line in _lines(run / "slurm/jobs") if line.isdecimal()]
    return sorted({*known, *(attempt.job for attempt in attempts(run))}, key=int)


def standing(run: Path) -> tuple[int, int]:
    """(step, tokens) of the newest checkpoint whose description can be read; (0, 0) where there is none."""
    folder = run / "checkpoints"
    with contextlib.suppress(OSError):
        for checkpoint in [resolved(folder / "latest"), *(step_folder(folder, step) for step in reversed(steps(folder)))]:
            with contextlib.suppress(*NOT_OURS):
                about = json.loads(disks.read(checkpoint / "checkpoint.json") or b"")
                return int(about["step"]), int(about["tokens"])
    return 0, 0


def last_step(run: Path) -> dict[str, Any] | None:
    """Of the last whole line of metrics.jsonl: time, step, phase, loss and tokens_per_second; None before there is one."""
    lines = list[bytes]()
    with contextlib.suppress(OSError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1_000_000))  # a line has some kilobytes, more with norms of many layers
        lines = file.read().split(b"\n")[:-1]
    kinds = {"step": int, "phase": str, "loss": float, "tokens_per_second": float}
    for line in reversed(lines):
        with contextlib.suppress(*NOT_OURS):
            step = json.loads(line)
            return {name: kind(step[name]) for name, kind in kinds.items()} | {"time": float(step.get("time", 0))}
    return None


def excluded(run: Path) -> dict[str, dict[str, Any]]:
    """{node: {"reason", "since"}} of the nodes that the run stays away from, for a day each."""
    return {node: about for node, about in _ever_excluded(run).items() if time.time() - about["since"] < EXCLUDED_SECONDS}


def ever_excluded(run: Path) -> set[str]:
    return set(_ever_excluded(run))


def record_nodes(run: Path, verdict: dict[str, Any], bad: dict[str, str]) -> None:
    """Keeps the preflight's verdict, and excludes the `bad` nodes from now on."""
    now = {node: {"reason": reason, "since": time.time()} for node, reason in bad.items()}
    text = json.dumps({"excluded": _ever_excluded(run) | now, "preflight": verdict}, indent=1, ensure_ascii=False)
    _told(run / "slurm/nodes.json", lambda path: write_whole(path, text.encode()))


def _ever_excluded(run: Path) -> dict[str, dict[str, Any]]:
    with contextlib.suppress(OSError, *NOT_OURS):
        nodes = json.loads(disks.read(run / "slurm/nodes.json") or b"").get("excluded", {})
        return {node: {"reason": str(about["reason"]), "since": float(about["since"])} for node, about in nodes.items()}
    return {}


def _lines(path: Path) -> list[str]:
    try:
        return (disks.read(path) or b"").decode(errors="replace").splitlines()
    except OSError as error:
        print(f"{path}: cannot be read ({error}): the run goes on without this record", flush=True)
        return []


def _append(path: Path, line: str) -> None:
    _told(path, lambda path: append(path, line.encode() + b"\n"))


def _told(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        print(f"{path}: could not be written ({error}): the run goes on without this record", flush=True)
