"""Phases: which one is active, at which learning rate, and which part of each source it owns.

Everything here is a pure function of the phases and of the step number (or of the consumed tokens); nothing is stored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from megatron_jobs.config import DataConfig, RunConfig
from megatron_jobs.config.adapter import AdapterConfig
from megatron_jobs.config.model import differences
from megatron_jobs.config.phase import LearningRate, Phase
from megatron_jobs.data.dialogues import Dialogues, Taken, take
from mujina.user_input import UserError, nearest, parse


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
    dialogues: Dialogues | None = None  # of kinds chat and preferences
    num_answer_tokens: int = 0  # that its assistant says; 0 where nobody asked for them


@dataclass(frozen=True)
class Share:
    """What one phase takes of one source: `num_samples` samples out of the blocks from `first_block` on.

    Block numbers run on over epochs: block `first_block % blocks in the source` of epoch `first_block // blocks in the source`.
    In a phase of dialogues there are no blocks, and `taken` says what there is.
    """

    source: str
    num_samples: int
    first_block: int = 0
    num_blocks: int = 0
    taken: Taken | None = None


def num_steps(phases: Sequence[Phase]) -> int:
    return sum(phase.num_steps for phase in phases)


def locate(phases: Sequence[Phase], step: int) -> tuple[int, int]:
    """The phase that the step with number `step` (from 0) belongs to, and the step's number in that phase."""
    for index, phase in enumerate(phases):
        if step < phase.num_steps:
            return index, step
        step -= phase.num_steps
    raise IndexError("the step lies behind the last phase")


def at(phases: Sequence[Phase], step: int) -> tuple[Phase, int]:
    """The phase of step `step` (from 0), and the step's number in it."""
    index, step_in_phase = locate(phases, step)
    return phases[index], step_in_phase


def consumed_tokens(phases: Sequence[Phase], steps: int) -> int:
    """Tokens that the first `steps` steps consume."""
    tokens = 0
    for phase in phases:
        here = min(steps, phase.num_steps)
        tokens += phase.num_samples(here) * phase.sequence_length
        steps -= here
    return tokens


def learning_rate(phases: Sequence[Phase], step: int) -> float:
    """The learning rate of step `step` (from 0): each phase has its own piece of the curve."""
    phase, step_in_phase = at(phases, step)
    return _piece(phase.learning_rate, step_in_phase, phase.num_steps)


def _piece(rate: LearningRate, step: int, steps: int) -> float:
    """The rate of step `step` of a phase of `steps` steps: the last step has `end`, unless all are warm-up.

    With `decay_steps` the last so many steps lie below `start`. Shapes, x going from 0 to 1: cosine (Loshchilov and Hutter 2016,
    arXiv 1608.03983); "1-sqrt", 1 − √x (Hägele et al. 2024, arXiv 2405.18392, section 4); exponential, start · (end / start)^x
    (the decay of MiniCPM, arXiv 2404.06395, section 4, with the half-life that ends at `end`).
    """
    if step < rate.warmup_steps:
        return rate.start * (step + 1) / rate.warmup_steps
    # the last step that has `start`: with a decay behind the warm-up, that of the warm-up
    begin = rate.warmup_steps if rate.decay_steps is None else max(rate.warmup_steps - 1, steps - 1 - rate.decay_steps)
    done = 1.0 if step == steps - 1 else max(0, step - begin) / (steps - 1 - begin)
    match rate.shape:
        case "constant":
            return rate.start
        case "linear":
            return rate.start + (rate.end - rate.start) * done
        case "cosine":
            return rate.end + (rate.start - rate.end) * 0.5 * (1 + math.cos(math.pi * done))
        case "1-sqrt":
            return rate.end + (rate.start - rate.end) * (1 - math.sqrt(done))
        case "exponential":
            return rate.start * (rate.end / rate.start) ** done


def check_resumable(before: RunConfig, now: RunConfig, steps: int) -> None:
    """Raises UserError when `now` would change what the first `steps` steps of `before` did, or what the model computes; the future may
    change, and how the model is trained."""
    fields = ["seed", "data.block_length", "data.validation_tokens"]
    if now.adapter and before.adapter:  # what its first A and B were read from is past
        fields += [f"adapter.{name}" for name in AdapterConfig.model_fields if name != "init_from"]
    elif now.adapter or before.adapter:
        fields.append("adapter")
    changed = [(field, *(reduce(getattr, field.split("."), config) for config in (now, before))) for field in fields]
    for field, wanted, was in [*changed, *differences(now.model, now.moe, before.model, before.moe)]:
        if was != wanted:
            raise UserError(f"{field} was {was} when this run began, and is {wanted} now: restore it, or start another run")
    begun = locate(before.phases, steps - 1)[0] + 1
    for index, phase in enumerate(before.phases[:begun]):
        if now.phases[index : index + 1] != (phase,):
            raise UserError(
                f"phases: phase {phase.name} has begun and may not change any more, or data would be repeated or lost: "
                f"restore it as it stands in {now.run}/config.yaml, or start another run"
            )


def resolve(config: RunConfig, sources: dict[str, Source]) -> RunConfig:
    """`config` with the token budget of every phase written in: where it is missing, the sum of the amounts of its sources, or in a phase
    of dialogues what their packs take.

    Raises UserError on an unknown source, and on a phase that cannot be with that budget.
    """
    phases, next_dialogue = [], dict.fromkeys(sources, 0)
    for phase in config.phases:
        tokens = phase.tokens
        if phase.is_of_dialogues:
            samples = sum(share.num_samples for share in _packed(config, phase, sources, next_dialogue))
            tokens = -(-samples // phase.global_batch_size) * phase.tokens_per_step
            if phase.tokens not in (None, tokens):
                raise UserError(
                    f"phases.{phase.name}.tokens ({phase.tokens:,}) is not what the packs of its dialogues take ({tokens:,}): leave it "
                    "out, and say by the amounts of its sources how much is trained"
                )
        elif tokens is None:
            tokens = sum(_asked(phase, config.data, sources).values()) * phase.sequence_length
        if phase.tokens is None:
            phase = parse(phase.model_dump() | {"tokens": tokens}, Phase, f"phases.{phase.name}")
        phases.append(phase)
    return config.model_copy(update={"phases": tuple(phases)})


def shares(config: RunConfig, sources: dict[str, Source]) -> list[list[Share]]:
    """For each phase, what it takes of each of its sources, by name (the order in the file means nothing).

    Phases take consecutive blocks of a source's order, so that no block is used twice within an epoch.
    Raises UserError on an unknown source, one that the phase does not admit, one that does not hold enough tokens, and on amounts that
    do not fit the phase's budget.
    """
    block_length = config.data.block_length
    next_block, next_dialogue = dict.fromkeys(sources, 0), dict.fromkeys(sources, 0)
    result = []
    for phase in config.phases:
        for name in phase.sources:
            _admitted(phase, name, sources)
            if (next_block if phase.is_of_dialogues else next_dialogue)[name]:
                raise UserError(
                    f"phases.{phase.name}.sources.{name}: one phase takes whole dialogues of it and another one stretches of its stream, "
                    "so that nobody could say what was trained on twice: prepare it as two sources"
                )
        if phase.is_of_dialogues:
            result.append(_packed(config, phase, sources, next_dialogue))
            continue
        row = []
        for name, quota in _quotas(phase, config.data, sources).items():
            blocks = -(-quota * phase.sequence_length // block_length)
            row.append(Share(name, quota, next_block[name], blocks))
            next_block[name] += blocks
            there = training_blocks(sources[name], config.data)
            if next_block[name] > there * config.data.max_epochs:
                raise UserError(
                    f"phases.{phase.name}.sources.{name}: the phases up to this one take {next_block[name] * block_length:,} tokens of it, "
                    f"but {there * block_length:,} (whole blocks of data.block_length) × data.max_epochs ({config.data.max_epochs}) are "
                    "there: lower the phase's tokens or what it takes of the source, prepare more of it, or raise data.max_epochs"
                )
        result.append(row)
    return result


def _packed(config: RunConfig, phase: Phase, sources: dict[str, Source], next_dialogue: dict[str, int]) -> list[Share]:
    """What a phase of dialogues takes of each source, from the `next_dialogue` of each on, which is moved on."""
    row = []
    for name in sorted(phase.sources):
        _admitted(phase, name, sources)
        dialogues = sources[name].dialogues
        wanted = "preferences" if phase.loss.kind == "preference" else "chat"
        if dialogues is None or sources[name].kind != wanted:
            raise UserError(
                f"phases.{phase.name}.sources.{name}: is of kind {sources[name].kind}, and loss.kind {phase.loss.kind} wants kind "
                f"{wanted}: prepare it as that, or take it in a phase of another loss"
            )
        taken = take(config, phase, dialogues, next_dialogue[name])
        next_dialogue[name] += taken.count
        row.append(Share(name, len(taken.packs), taken=taken))
    return row


def blocks_in(num_tokens: int, block_length: int) -> int:
    """Whole blocks in a source; the last token of a block needs its successor as a label."""
    return (num_tokens - 1) // block_length


def validation_blocks(data: DataConfig) -> int:
    """Blocks of each source that are held out of training."""
    return -(-data.validation_tokens // data.block_length)


def training_blocks(source: Source, data: DataConfig) -> int:
    """Blocks of a source that training may use in an epoch. Raises UserError when there is none, or validation leaves none."""
    whole = blocks_in(source.num_tokens, data.block_length)
    if whole <= 0:
        raise UserError(
            f"data.block_length ({data.block_length:,}): source {source.name} holds {source.num_tokens:,} tokens, and not one whole block "
            "and the token behind it: lower it, prepare more of the source, or leave the source out"
        )
    blocks = whole - validation_blocks(data)
    if data.validation_tokens and blocks <= 0:
        raise UserError(
            f"data.validation_tokens ({data.validation_tokens:,}): source {source.name} holds {source.num_tokens:,} tokens, so that "
            f"nothing is left to train on (whole blocks of data.block_length, {data.block_length:,}): lower it, or prepare more of it"
        )
    return blocks


def _quotas(phase: Phase, data: DataConfig, sources: dict[str, Source]) -> dict[str, int]:
    """Samples of each source in all steps of the phase, by name. Weights share what the amounts leave."""
    asked, total = _asked(phase, data, sources), phase.num_samples(phase.num_steps)
    assert phase.tokens is not None  # or it would have no num_steps
    rest = total - sum(asked.values())
    weights = {name: weight for name in phase.sources if (weight := phase.portion(name).weight) is not None}
    tokens = sum(asked.values()) * phase.sequence_length
    amounts = f"phases.{phase.name}: the amounts of its sources ({tokens:,} tokens)"
    if weights and rest <= 0:
        raise UserError(
            f"{amounts} leave nothing of its tokens ({phase.tokens:,}) to {', '.join(sorted(weights))}: raise tokens, or lower the amounts"
        )
    if weights:
        return dict(sorted((asked | _largest_remainder(rest, weights)).items()))
    if tokens > phase.tokens:
        raise UserError(f"{amounts} must not exceed its tokens ({phase.tokens:,}): raise or leave out tokens, or lower the amounts")
    if rest > 0:
        raise UserError(
            f"{amounts} fall short of its tokens ({phase.tokens:,}): lower or leave out tokens, raise the amounts, or give one source a "
            "weight, which then takes the rest"
        )
    return _largest_remainder(total, asked)  # all but less than a step of what is asked


def _asked(phase: Phase, data: DataConfig, sources: dict[str, Source]) -> dict[str, int]:
    """Samples of each source that is given by an amount."""
    samples = {}
    for name in phase.sources:
        if (amount := phase.portion(name)).is_amount:
            _admitted(phase, name, sources)
            if amount.tokens is not None:
                tokens = amount.tokens
            else:
                assert amount.epochs is not None  # an amount is one of the two
                tokens = int(amount.epochs * training_blocks(sources[name], data) * data.block_length)
            if tokens < phase.sequence_length:
                raise UserError(
                    f"phases.{phase.name}.sources.{name}: its amount is {tokens:,} tokens, and must hold at least one sample of "
                    f"{phase.sequence_length:,}: raise it, or leave the source out"
                )
            samples[name] = tokens // phase.sequence_length
    return samples


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


def _largest_remainder(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Integers by name that add up to `total`, as near to proportional to `weights` as can be (Hamilton's method)."""
    names = sorted(weights)
    exact = np.array([weights[name] for name in names])
    exact = exact / sum(weights[name] for name in names) * total
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[index] += 1
    return dict(zip(names, counts.tolist(), strict=True))
