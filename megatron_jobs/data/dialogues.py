"""Whole dialogues of a source: in which order phases take them, and which of them share a sample.

Each epoch has a permutation of its own of the dialogues that are not held out; phases take them one after the other, so that none is
trained on twice within an epoch. What a phase takes in one epoch is packed together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from data_prep.indexed import TokenBinary
from megatron_jobs.config import RunConfig
from megatron_jobs.config.phase import Answers, Phase, Preference
from megatron_jobs.data.packing import Packs, joined, pack
from megatron_jobs.data.permutation import permute
from mujina.user_input import UserError


@dataclass(frozen=True)
class Taken:
    """What a phase takes of a source: `count` dialogues of its order from `first` on (over epochs), in packs of their numbers."""

    first: int
    count: int
    packs: Packs
    num_cut: int
    num_left_out: int


class Dialogues:
    """The dialogues of a binary, by number; in one of kind preferences a pair counts as one. Nothing is read before it is asked for.

    num_documents   of the binary that make a dialogue: 1, or 2 for a pair (the chosen one first)
    """

    def __init__(self, binary: TokenBinary) -> None:
        self._binary = binary
        self.name = binary.manifest.name
        self.num_documents = 2 if binary.manifest.kind == "preferences" else 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [dialogues], in tokens, the end of the document included."""
        return np.array(self._binary.lengths, np.int64).reshape(-1, self.num_documents).sum(1)

    def have_answer(self, numbers: np.ndarray, length: int, channel: str) -> np.ndarray:
        """Whether anything that the assistant says stands within the first `length` tokens: bool [numbers]."""
        starts = np.cumsum(self.lengths) - self.lengths
        found = [self._binary.read_channel(channel, int(start) + 1, length - 1).any() for start in starts[numbers]]
        return np.array(found, bool)

    @lru_cache(maxsize=4)  # noqa: B019  a few for each run, which keeps its sources as long as it lives
    def held_out(self, tokens: int, seed: int) -> np.ndarray:
        """The numbers of the first dialogues, in an order of their own, that have so many tokens together."""
        if not tokens:
            return np.zeros(0, np.int64)
        numbers = permute(np.arange(len(self.lengths)), len(self.lengths), *_validation_key(seed, self.name))
        count = 1 + int(np.searchsorted(np.cumsum(self.lengths[numbers]), tokens))
        if count >= len(numbers):
            raise UserError(
                f"data.validation_tokens ({tokens:,}): source {self.name} holds {len(numbers):,} dialogues of {self.lengths.sum():,} "
                "tokens, so that nothing is left to train on: lower it, or prepare more of it"
            )
        return numbers[:count]

    def in_order(self, epoch: int, num_held_out: int, seed: int) -> np.ndarray:
        """The numbers of the dialogues that training may use, in the order of an epoch."""
        total = len(self.lengths)
        places = permute(np.arange(total - num_held_out), total - num_held_out, seed, "dialogue", self.name, epoch)
        return permute(num_held_out + places, total, *_validation_key(seed, self.name)) if num_held_out else places


def take(config: RunConfig, phase: Phase, dialogues: Dialogues, first: int) -> Taken:
    """What `phase` takes of a source of which the phases before it have taken `first` dialogues. Raises UserError."""
    field = f"phases.{phase.name}.sources.{dialogues.name}"
    several, cut, left_out, count = list[Packs](), 0, 0, 0
    for epoch, numbers in _asked(config, phase, dialogues, first, field):
        count += len(numbers)
        lengths = dialogues.lengths[numbers]
        long = lengths > phase.sequence_length
        keep = ~long
        if long.any():
            keep[long] = _kept(phase, dialogues, numbers[long], field)
        cut, left_out = cut + int((keep & long).sum()), left_out + int((~keep).sum())
        if keep.any():
            places = np.minimum(lengths[keep], phase.sequence_length)
            packs = pack(places, phase.sequence_length, config.seed, phase.name, dialogues.name, epoch)
            several.append(Packs(numbers[keep][packs.items], packs.starts))
    if not several:
        raise UserError(
            f"{field}: none of the {count:,} dialogues that it asks for can be trained on at sequence_length ({phase.sequence_length:,}): "
            "raise the amount or sequence_length, or leave the source out"
        )
    return Taken(first, count, joined(several), cut, left_out)


def held_out(config: RunConfig, phase: Phase, dialogues: Dialogues) -> Packs:
    """The dialogues that no phase trains on, packed for `phase`; the ends of long ones are left away."""
    numbers = dialogues.held_out(config.data.validation_tokens, config.seed)
    lengths = np.minimum(dialogues.lengths[numbers], phase.sequence_length)
    packs = pack(lengths, phase.sequence_length, config.seed, "validation", dialogues.name)
    return Packs(numbers[packs.items], packs.starts)


def _validation_key(seed: int, name: str) -> tuple[object, ...]:
    return seed, "validation", name


def _asked(config: RunConfig, phase: Phase, dialogues: Dialogues, first: int, field: str) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, numbers of the dialogues that the phase takes in it)."""
    amount = phase.portion(dialogues.name)
    num_held_out = len(dialogues.held_out(config.data.validation_tokens, config.seed))
    there = len(dialogues.lengths) - num_held_out
    count, tokens = None if amount.epochs is None else int(amount.epochs * there), amount.tokens
    while count != 0:
        epoch, place = divmod(first, there)
        if epoch == config.data.max_epochs:
            raise UserError(
                f"{field}: the phases up to this one take more of it than the {there:,} dialogues × data.max_epochs "
                f"({config.data.max_epochs}) that are there: lower the amount, prepare more of it, or raise data.max_epochs"
            )
        numbers = dialogues.in_order(epoch, num_held_out, config.seed)[place:]
        if count is not None:
            numbers = numbers[:count]
            count -= len(numbers)
        else:
            assert tokens is not None  # an amount is one of the two
            ends = np.cumsum(dialogues.lengths[numbers])
            numbers = numbers[: int(np.searchsorted(ends, tokens, side="right"))]
            tokens -= int(dialogues.lengths[numbers].sum())
            count = None if len(numbers) == len(ends) else 0
        first += len(numbers)
        yield epoch, numbers


def _kept(phase: Phase, dialogues: Dialogues, long: np.ndarray, field: str) -> np.ndarray:
    """Which of the dialogues that are longer than the sequence are trained on."""
    assert isinstance(phase.loss, Answers | Preference)  # as every phase of dialogues
    if phase.loss.too_long == "stop":
        raise UserError(
            f"{field}: {len(long):,} of its dialogues are longer than sequence_length ({phase.sequence_length:,} tokens), the longest has "
            f"{dialogues.lengths[long].max():,}: raise it, or choose phases.{phase.name}.loss.too_long: "
            + ("drop" if dialogues.num_documents == 2 else "cut or drop")
        )
    if phase.loss.too_long == "drop":
        return np.zeros(len(long), bool)
    return dialogues.have_answer(long, phase.sequence_length, phase.loss.token_weights)
