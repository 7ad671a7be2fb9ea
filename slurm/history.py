"""What a run has been through on the cluster, and which nodes it stays away from: files in RUN/slurm, which jobs of the run add to.

    RUN/slurm/attempts.jsonl     a line when an attempt begins, and one when it has ended: see `Attempt`
    RUN/slurm/nodes.json         the last preflight, and the nodes that the run has left out, each with its reason and since when
    RUN/slurm/jobs               the numbers of the jobs that `mujina submit` has submitted

An attempt is one start of the training in a job; a job that is requeued makes several. One that ends without a word (its node lost power)
has no second line.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from mujina.files import write_whole
from mujina.user_input import parse_object, read_object, read_text, reading

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
    extra: dict[str, Any] = field(default_factory=dict)  # preflight_seconds; reached: the last step; diagnosis: why it is not requeued


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
    path, remedy = run / "slurm/attempts.jsonl", "take the line out"
    found: dict[tuple[str, int], Attempt] = {}
    for number, line in enumerate(read_text(path).splitlines() if path.exists() else [], start=1):
        where = f"{path} line {number}"
        values = parse_object(line, where, remedy)
        with reading(where, "an attempt", remedy):
            key = (values["job"], values["restart"])
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
    path = run / "slurm/jobs"
    known = read_text(path).split() if path.exists() else []
    with reading(path, "a list of the numbers of jobs", "take out what is none"):
        return sorted({*known, *(attempt.job for attempt in attempts(run))}, key=int)


def standing(run: Path) -> tuple[int, int]:
    """(step, tokens) of the newest checkpoint; (0, 0) before there is one."""
    path = run / "checkpoints/latest/checkpoint.json"
    if not path.exists():
        return 0, 0
    about = read_object(path)
    with reading(path, "the description of a checkpoint", "the checkpoint is damaged: let `latest` point at an older one"):
        return int(about["step"]), int(about["tokens"])


def last_step(run: Path) -> dict[str, Any] | None:
    """Of the last whole line of metrics.jsonl: step, phase, loss and tokens_per_second; None before there is one."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1_000_000))  # a line has some kilobytes, more with norms of many layers
        lines = file.read().split(b"\n")[:-1]
    if not lines:
        return None
    with reading(path, "the metrics of a run, in its last line", "go on with `mujina train`, which tidies the file"):
        step = json.loads(lines[-1])
        kinds = {"step": int, "phase": str, "loss": float, "tokens_per_second": float}
        return {name: kind(step[name]) for name, kind in kinds.items()}


def excluded(run: Path) -> dict[str, dict[str, Any]]:
    """{node: {"reason", "since"}} of the nodes that the run stays away from, for a day each."""
    with reading(run / "slurm/nodes.json", "what the preflight wrote", "remove it to try all nodes again"):
        nodes = _nodes(run).get("excluded", {}).items()
        recent = [(node, about) for node, about in nodes if time.time() - float(about["since"]) < EXCLUDED_SECONDS]
        return {node: {"reason": str(about["reason"]), "since": float(about["since"])} for node, about in recent}


def ever_excluded(run: Path) -> set[str]:
    return set(_nodes(run).get("excluded", {}))


def record_nodes(run: Path, verdict: dict[str, Any], bad: dict[str, str]) -> None:
    """Keeps the preflight's verdict, and excludes the `bad` nodes from now on."""
    now = {node: {"reason": reason, "since": time.time()} for node, reason in bad.items()}
    text = json.dumps({"excluded": _nodes(run).get("excluded", {}) | now, "preflight": verdict}, indent=1, ensure_ascii=False)
    write_whole(run / "slurm/nodes.json", text.encode())


def _nodes(run: Path) -> dict[str, Any]:
    path = run / "slurm/nodes.json"
    return read_object(path, "remove it to try all nodes again") if path.exists() else {}


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
