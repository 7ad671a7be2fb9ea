"""Steps that stand out: how they are told from the others, what is done about them, and what is remembered.

A `Guard` sees the loss and the gradient norm of each step before its update. The numbers are the same on every rank, and so is the
verdict. What it remembers is in every checkpoint's ledger, so that a run that was killed decides like one that was not; rollbacks are
in RUN/rollbacks.json as well, because the checkpoints behind one are thrown away. RUN/events.jsonl tells the whole story.
Steps are counted as in metrics.jsonl, from 1. Needs no torch.
"""

import contextlib
import json
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_jobs.config import StabilityConfig
from mujina.checkpoint_folders import step_folder, steps
from mujina.disks import read
from mujina.files import write_whole
from mujina.user_input import UserError, reading

MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution times this is its standard deviation
FLOOR = 0.01  # of the median: the least deviation that is reckoned with, so that a flat curve does not make everything a spike


@dataclass(frozen=True)
class Verdict:
    """What is to be done with the gradients of a step, and why."""

    action: Literal["update", "skip", "rollback", "stop"]
    reason: str | None = None  # None where nothing stands out
    median: float | None = None  # of the quantity that stands out, over the window,
    deviation: float | None = None  # and its scaled median absolute deviation


class Guard:
    """Judges each step, and knows which steps were skipped or are passed over."""

    def __init__(self, config: StabilityConfig, rollbacks: list[dict[str, Any]]) -> None:
        """`rollbacks` are those in the run folder (`read_rollbacks`), oldest first."""
        self.config = config
        self.rollbacks = rollbacks
        self.from_ledger(None)

    def from_ledger(self, memory: dict[str, Any] | None) -> None:
        """Goes back to what `to_ledger` returned at a checkpoint; None is the start of the run. Rollbacks are never forgotten."""
        memory = memory or {"skipped": [], "skips_in_a_row": 0, "rollbacks": [], "phase": None, "losses": [], "gradient_norms": []}
        self.rollbacks = max(self.rollbacks, memory["rollbacks"], key=len)
        self.skipped: list[dict[str, Any]] = list(memory["skipped"])
        self.skips_in_a_row: int = memory["skips_in_a_row"]
        self.phase: str | None = memory["phase"]
        self.losses, self.gradient_norms = (deque(memory[key], self.config.window) for key in ("losses", "gradient_norms"))

    def to_ledger(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as plain values."""
        return {
            "skipped": list(self.skipped),  # a save beside training writes it down later
            "skips_in_a_row": self.skips_in_a_row,
            "rollbacks": self.rollbacks,
            "phase": self.phase,
            "losses": list(self.losses),
            "gradient_norms": list(self.gradient_norms),
        }

    def agrees(self, step: int, memory: dict[str, Any] | None) -> bool:
        """Whether a checkpoint after `step` lies on the path that the run took: none of its steps were rolled back later."""
        known = memory["rollbacks"] if memory else []
        return all(rollback["first"] > step or rollback in known for rollback in self.rollbacks)

    def passes_over(self, step: int) -> bool:
        return any(rollback["first"] <= step <= rollback["last"] for rollback in self.rollbacks)

    def judge(self, step: int, phase: str, loss: float, gradient_norm: float) -> Verdict:
        """The verdict on a step, before its update.

        The medians are over the last `window` steps of the same phase (another mix has another level) that made an update; as long as
        these are fewer than a quarter of the window, or than four, nothing is a spike.
        """
        if phase != self.phase:
            self.phase = phase
            self.losses.clear()
            self.gradient_norms.clear()
        verdict = self._verdict(loss, gradient_norm)
        if verdict.action == "update":
            self.losses.append(loss)
            self.gradient_norms.append(gradient_norm)
            self.skips_in_a_row = 0
        elif verdict.action == "skip":
            self.skipped.append({"step": step, "reason": verdict.reason})
            self.skips_in_a_row += 1
        return verdict

    def back_to(self, step: int, step_in_phase: int) -> int:
        """How many steps are done where a rollback of `step` goes back to: not behind the start of its phase (`step_in_phase` from 0)."""
        return step - min(self.config.pass_over, step_in_phase + 1)

    def go_back(self, step: int, back_to: int, done: int, reason: str | None) -> None:
        """Remembers a rollback of `step` to a checkpoint at which `done` steps are done, `back_to` or more if there is none so old."""
        self.rollbacks = [*self.rollbacks, {"first": max(back_to, done) + 1, "last": step, "reason": reason}]

    def _verdict(self, loss: float, gradient_norm: float) -> Verdict:
        if not math.isfinite(loss + gradient_norm):
            return self._within_limits(self.config.on_not_finite, f"the loss is {loss} and the gradient norm {gradient_norm}")
        for name, value, window in (("loss", loss, self.losses), ("gradient norm", gradient_norm, self.gradient_norms)):
            if len(window) < max(4, self.config.window // 4):
                continue
            median = statistics.median(window)
            deviation = max(MAD_TO_SIGMA * statistics.median(abs(x - median) for x in window), FLOOR * abs(median))
            if value > median + self.config.deviations * deviation:
                reason = f"the {name} is {value:.4g}, {(value - median) / deviation:.1f} deviations above its median of {median:.4g}"
                return self._within_limits(self.config.on_spike, reason, median, deviation)
        return Verdict("update")

    def _within_limits(self, policy: str, reason: str, median: float | None = None, deviation: float | None = None) -> Verdict:
        action: Any = "update" if policy == "log" else policy
        if action == "rollback" and len(self.rollbacks) >= self.config.max_rollbacks:
            action, reason = "stop", f"{reason}, after {len(self.rollbacks)} rollbacks (stability.max_rollbacks)"
        if action == "skip" and self.skips_in_a_row >= self.config.max_skips:
            action, reason = "stop", f"{reason}, after {self.skips_in_a_row} skipped steps in a row (stability.max_skips)"
        return Verdict(action, reason, median, deviation)

    def left_out_all(self, num_steps: int) -> bool:
        """Whether none of the first steps has made an update."""
        skipped = {skip["step"] for skip in self.skipped}
        return all(step in skipped or self.passes_over(step) for step in range(1, num_steps + 1))

    def never_updated(self, run: Path, step: int) -> str:
        """What to tell of a run whose steps were all left out."""
        told = [f"{run}: all {step} steps are done, and none has updated the weights: they are those that it began with"]
        told += [f"  {line}" for line in self.history()]
        told.append("  try: other weights to start from, a lower learning rate or other data, in another run")
        return "\n".join(told)

    def history(self) -> list[str]:
        """The interventions so far, a line each."""
        lines = [f"step {skip['step']} was skipped: {skip['reason']}" for skip in self.skipped[-self.config.max_skips :]]
        return lines + [f"steps {back['first']} to {back['last']} were passed over: {back['reason']}" for back in self.rollbacks]


def read_rollbacks(run: Path) -> list[dict[str, Any]]:
    """Where the file is gone, or none of ours (which is told), those hold that any of the checkpoints knows."""
    path = run / "rollbacks.json"
    try:
        if (written := read(path)) is not None:
            return _rollbacks(written, path, "those hold that the checkpoints know")
    except UserError as error:
        print(error, flush=True)
    known = list[dict[str, Any]]()
    for ledger in (step_folder(run / "checkpoints", step) / "ledger.json" for step in steps(run / "checkpoints")):
        with contextlib.suppress(UserError, OSError):
            known = max(known, _rollbacks(read(ledger) or b"", ledger, "it is passed over"), key=len)
    return known


def _rollbacks(data: bytes, path: Path, remedy: str) -> list[dict[str, Any]]:
    """Those of rollbacks.json, or of a ledger."""
    with reading(path, "a list of rollbacks", remedy):
        backs = json.loads(data)
        backs = backs["interventions"]["rollbacks"] if path.name == "ledger.json" else backs
        return [{"first": int(back["first"]), "last": int(back["last"]), "reason": back["reason"]} for back in backs]


def write_rollbacks(run: Path, rollbacks: list[dict[str, Any]]) -> None:
    """Leaves the old file or the new one, whatever happens, and on the disk before this returns."""
    write_whole(run / "rollbacks.json", json.dumps(rollbacks, indent=1).encode())
