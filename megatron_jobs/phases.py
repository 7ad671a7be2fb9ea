"""Phases: which one is active, at which learning rate, and which part of each source it owns.

Everything here is a pure function of the phases and of the step number (or of the consumed tokens); nothing is stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from megatron_jobs.config import LearningRate, Phase, RunConfig, nearest
from user_input import UserError


@dataclass(frozen=True)
class Source:
    """What the phases need to know of a token binary."""

    name: str
    num_tokens: int
    kind: str
    origin: str
    checksum: str  # of its tokens
    languages: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Share:
    """What one phase takes of one source: `num_samples` samples out of the blocks from `first_block` on.

    Block numbers run on over epochs: block `first_block % blocks in the source` of epoch `first_block // blocks in the source`.
    """

    source: str
    num_samples: int
    first_block: int
    num_blocks: int


def num_steps(phases: Sequence[Phase]) -> int:
    return sum(phase.num_steps for phase in phases)


def locate(phases: Sequence[Phase], step: int) -> tuple[int, int]:
    """The phase that the step with number `step` (from 0) belongs to, and the step's number in that phase."""
    for index, phase in enumerate(phases):
        if step < phase.num_steps:
            return index, step
        step -= phase.num_steps
    raise IndexError("the step lies behind the last phase")


def consumed_tokens(phases: Sequence[Phase], steps: int) -> int:
    """Tokens that the first `steps` steps consume."""
    tokens = 0
    for phase in phases:
        here = min(steps, phase.num_steps)
        tokens += here * phase.tokens_per_step
        steps -= here
    return tokens


def learning_rate(phases: Sequence[Phase], step: int) -> float:
    """The learning rate of step `step` (from 0): each phase has its own piece of the curve."""
    index, step_in_phase = locate(phases, step)
    return _piece(phases[index].learning_rate, step_in_phase, phases[index].num_steps)


def _piece(rate: LearningRate, step: int, steps: int) -> float:
    if step < rate.warmup_steps:
        return rate.start * (step + 1) / rate.warmup_steps
    done = (step - rate.warmup_steps) / max(1, steps - 1 - rate.warmup_steps)
    match rate.shape:
        case "constant":
            return rate.start
        case "linear":
            return rate.start + (rate.end - rate.start) * done
        case "cosine":
            return rate.end + (rate.start - rate.end) * 0.5 * (1 + math.cos(math.pi * done))


def check_resumable(before: RunConfig, now: RunConfig, steps: int) -> None:
    """Raises UserError when `now` would change what the first `steps` steps of `before` did, or the model; the future may change."""
    for field in ("seed", "model", "moe", "data.block_length"):
        was, wanted = (reduce(getattr, field.split("."), config) for config in (before, now))
        if was != wanted:
            raise UserError(f"{field} was {was} when this run began, and is {wanted} now: restore it, or start another run")
    begun = locate(before.phases, steps - 1)[0] + 1
    for index, phase in enumerate(before.phases[:begun]):
        if now.phases[index : index + 1] != (phase,):
            raise UserError(
                f"phases: phase {phase.name} has begun and may not change any more, or data would be repeated or lost: "
                f"restore it as it stands in {now.run}/config.yaml, or start another run"
            )


def shares(config: RunConfig, sources: dict[str, Source]) -> list[list[Share]]:
    """For each phase, what it takes of each of its sources, by name (the order in the file means nothing).

    Phases take consecutive blocks of a source's order, so that no block is used twice within an epoch.
    Raises UserError on an unknown source, one that the phase does not admit, and one that does not hold enough tokens.
    """
    block_length = config.data.block_length
    next_block = dict.fromkeys(sources, 0)
    result = []
    for phase in config.phases:
        for name in phase.sources:
            _admitted(phase, name, sources)
        samples = phase.num_steps * phase.global_batch_size
        row = []
        names = sorted(phase.sources)
        for name, quota in zip(names, _largest_remainder(samples, [phase.sources[name] for name in names]), strict=True):
            blocks = -(-quota * phase.sequence_length // block_length)
            row.append(Share(name, quota, next_block[name], blocks))
            next_block[name] += blocks
            there = blocks_in(sources[name].num_tokens, block_length)
            if next_block[name] > there * config.data.max_epochs:
                raise UserError(
                    f"phases.{phase.name}.sources.{name}: the phases up to this one take {next_block[name] * block_length:,} tokens of it, "
                    f"but {there * block_length:,} (whole blocks of data.block_length) × data.max_epochs ({config.data.max_epochs}) are "
                    "there: lower the phase's tokens or the source's weight, prepare more of it, or raise data.max_epochs"
                )
        result.append(row)
    return result


def blocks_in(num_tokens: int, block_length: int) -> int:
    """Whole blocks in a source; the last token of a block needs its successor as a label."""
    return (num_tokens - 1) // block_length


def _admitted(phase: Phase, name: str, sources: dict[str, Source]) -> None:
    if name not in sources:
        raise UserError(f"phases.{phase.name}.sources.{name}: no such source in data.folder: {nearest(name, list(sources))}")
    source, admit = sources[name], phase.admit
    for what, values, allowed in (
        ("kind", (source.kind,), admit.kinds),
        ("origin", (source.origin,), admit.origins),
        ("language", source.languages, admit.languages),
        ("licence", source.licences, admit.licences),
        ("teacher", source.teachers, admit.teachers),
    ):
        if allowed and not set(values) <= set(allowed):
            raise UserError(
                f"phases.{phase.name} admits only sources of {what} {', '.join(allowed)}, and {name} is of {what} {', '.join(values)}: "
                f"take {name} out of this phase, or widen phases.{phase.name}.admit.{what}s"
            )


def _largest_remainder(total: int, weights: list[float]) -> list[int]:
    """Integers that add up to `total`, as near to proportional to `weights` as can be (Hamilton's method)."""
    exact = np.array(weights) / sum(weights) * total
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[index] += 1
    return counts.tolist()
