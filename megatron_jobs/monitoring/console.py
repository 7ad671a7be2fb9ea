"""How far a run is, how fast it goes and when it will be done, in one line on the console."""

import math
import shutil
import statistics
import sys
import time
from collections import deque
from datetime import datetime, timedelta
from typing import Any

from megatron_jobs.config import RunConfig
from megatron_jobs.data import phases
from megatron_jobs.planning import flops

_WINDOW = 60.0  # seconds that the speed is taken over, or 10 steps where that is longer


class Work:
    """Tokens and floating-point operations of the steps of a run, which are numbered from 1."""

    def __init__(self, config: RunConfig) -> None:
        self._phases = config.phases
        self._flops_per_token = [flops.per_token(config.model, config.moe, phase.sequence_length) for phase in config.phases]
        self._ends = [self.tokens(phases.num_steps(config.phases[: n + 1])) for n in range(len(config.phases))]
        self.num_steps, self.num_tokens = phases.num_steps(config.phases), self._ends[-1]

    def tokens(self, step: int) -> int:
        """Tokens consumed when step `step` is done."""
        return phases.consumed_tokens(self._phases, step)

    def flops(self, step: int) -> float:
        """Model FLOPs, forward and backward, of all steps up to step `step`."""
        tokens, total, start = self.tokens(step), 0.0, 0
        for end, each in zip(self._ends, self._flops_per_token, strict=True):
            total += each * (min(tokens, end) - min(tokens, start))
            start = end
        return total

    def in_phase(self, step: int) -> tuple[int, int]:
        """Tokens that the phase of step `step` has consumed, and all tokens of that phase."""
        index = phases.locate(self._phases, step - 1)[0]
        start = self._ends[index - 1] if index else 0
        return self.tokens(step) - start, self._ends[index] - start


class Speed:
    """Tokens and FLOPs a second over the last minute, saves and validation included.

    The time left is taken from the FLOPs, so that it holds across phases of other sequence lengths.
    """

    def __init__(self, work: Work, now: float) -> None:
        self._work, self._tokens, self._flops = work, 0, 0.0
        self._seen = deque([(now, 0, 0.0)])

    def add(self, step: int, now: float) -> None:
        """Step `step` was done at `now` (seconds). After a rollback steps come a second time: they count again, as work that was done."""
        self._tokens += self._work.tokens(step) - self._work.tokens(step - 1)
        self._flops += self._work.flops(step) - self._work.flops(step - 1)
        self._seen.append((now, self._tokens, self._flops))
        if len(self._seen) == 3:
            self._seen.popleft()  # the first step is slow: it compiles, opens connections, takes memory
        while len(self._seen) > 11 and now - self._seen[1][0] >= _WINDOW:
            self._seen.popleft()

    @property
    def tokens_per_second(self) -> float:
        (then, before, _), (now, tokens, _) = self._seen[0], self._seen[-1]
        return (tokens - before) / max(now - then, 1e-9)

    def seconds_left(self, step: int) -> float:
        (then, _, before), (now, _, flops) = self._seen[0], self._seen[-1]
        return (self._work.flops(self._work.num_steps) - self._work.flops(step)) * (now - then) / max(flops - before, 1.0)


class Console:
    """On a terminal one line that is rewritten; elsewhere a line every ten seconds and when a phase begins."""

    def __init__(self, work: Work) -> None:
        self._work, self._is_live = work, sys.stdout.isatty()
        self._interval = 0.2 if self._is_live else 10.0
        self._losses: deque[float] = deque(maxlen=100)
        self._phase, self._shown, self._has_line = "", -math.inf, False
        self._speed = Speed(work, time.monotonic())

    def step(self, record: dict[str, Any]) -> None:
        """`record` is a line of metrics.jsonl."""
        now, step = time.monotonic(), record["step"]
        self._speed.add(step, now)
        is_new_phase, is_last = record["phase"] != self._phase, step == self._work.num_steps
        if is_new_phase:
            self._phase = record["phase"]
            self._losses.clear()
        self._losses.append(record["loss"])
        if not (is_new_phase or is_last or now - self._shown >= self._interval):
            return
        self._shown = now
        line = status(record, self._work, self._speed, statistics.fmean(self._losses), datetime.now())
        if not self._is_live:
            print(line, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{line[:width]}", end="\n" if is_last else "", flush=True)
        self._has_line = not is_last

    def say(self, text: str) -> None:
        """A line that stays."""
        print("\r\033[K" * self._has_line + text, flush=True)
        self._has_line = False


def status(record: dict[str, Any], work: Work, speed: Speed, mean_loss: float, now: datetime) -> str:
    """The line; what matters most comes first, since a narrow terminal cuts it off."""
    step, left = record["step"], speed.seconds_left(record["step"])
    done, of_phase = work.in_phase(step)
    parts = [
        f"step {step:,}/{work.num_steps:,}",
        f"{duration(left)} left, done {now + timedelta(seconds=left):%b %d %H:%M}" if step < work.num_steps else "done",
        f"loss {record['loss']:.4f} (mean {mean_loss:.4f})",
        f"{record['phase']} {amount(done)}/{amount(of_phase)} tokens, run {amount(record['tokens'])}/{amount(work.num_tokens)}",
        f"{amount(speed.tokens_per_second)} tokens/s",
        f"MFU {record['mfu']:.1%}" if record.get("mfu") is not None else "",
        f"lr {record['lr']:.2e}",
        f"norm {record['grad_norm']:.3f}",
    ]
    return "  ".join(filter(None, parts))


def duration(seconds: float) -> str:
    """1:02:03 or, above two days, 3 d 4 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(value: float) -> str:
    """A number of tokens in three digits: 950, 12.3k, 4.10B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            digits = value / size
            return f"{digits:.{2 if digits < 9.995 else 1 if digits < 99.95 else 0}f}{unit}"
    return f"{value:.0f}"
