"""The order of the training data: a pure function of (seed, phases, sample number).

No index is built, cached or exchanged between processes; the n-th sample of a phase is computed when it is asked for.

    source stream   cut into blocks of `data.block_length` tokens, some of which are held out for validation;
                    a keyed permutation of each epoch orders the others
    phase           owns a range of that order (`phases.shares`); a second permutation orders the samples inside the range
    mix             the sources of a phase are interleaved in windows of about WINDOW samples, each source within one
                    sample of its exact share in every window; a third permutation shuffles each window

So a token is used at most once per epoch, across phases and sequence lengths, and the order is the same at every
data-parallel size, micro-batch size and restart.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_jobs.config import RunConfig
from megatron_jobs.data.ledger import Consumed, Ledger, PhaseRecord
from megatron_jobs.data.phases import Source, consumed_tokens, locate, num_steps, shares, training_blocks, validation_blocks
from mujina.user_input import UserError

WINDOW = 1024  # samples
ROUNDS = 6


def permute(indices: np.ndarray, size: int, *key: object) -> np.ndarray:
    """The places of `indices` (int64 in [0, size)) under the permutation of [0, size) that `key` selects."""
    return _permute(np.array(indices, np.int64), np.full(len(indices), size), np.broadcast_to(_round_keys(*key), (len(indices), ROUNDS)))


@lru_cache(maxsize=1 << 16, typed=True)
def _round_keys(*key: object) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest(), np.uint64)


def _permute(indices: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Each index under a permutation of its own: indices and sizes [n], keys [n, ROUNDS].

    A Feistel network over pairs (left, right) of [0, a) × [0, b) with a·b ≥ size, and cycle walking: a value that falls
    outside [0, size) is sent through again until it is inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    result = indices.copy()
    outside = np.arange(len(result))
    while len(outside):
        size, key = sizes[outside], keys[outside]
        a = np.ceil(np.sqrt(size)).astype(np.int64)
        b = -(-size // a)
        left, right = np.divmod(result[outside], b)
        for round in range(ROUNDS):
            if round % 2:
                left = (left + _mix(right, key[:, round]) % a) % a
            else:
                right = (right + _mix(left, key[:, round]) % b) % b
        result[outside] = left * b + right
        outside = outside[result[outside] >= size]
    return result


def _mix(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A 63-bit hash of each value (the finaliser of splitmix64)."""
    z = values.astype(np.uint64) ^ keys
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


class DataOrder:
    """Where in which source each sample of the run lies. `config` must have been through `phases.resolve`.

    names       the sources of all phases, in the order of the alphabet
    number_of   the place of each in `names`
    """

    def __init__(self, config: RunConfig, sources: dict[str, Source]) -> None:
        self.seed, self.sources = config.seed, sources
        self.phases = config.phases
        self.block_length = config.data.block_length
        self.shares = shares(config, sources)
        self._held_out = validation_blocks(config.data)
        self._training = {share.source: training_blocks(sources[share.source], config.data) for row in self.shares for share in row}
        self.names = sorted(self._training)
        self.number_of = {name: number for number, name in enumerate(self.names)}
        self._quotas = [np.array([share.num_samples for share in row], np.int64) for row in self.shares]
        self._window = lru_cache(maxsize=8)(self._window_order)

    def samples(self, step: int, numbers: Sequence[int] | np.ndarray) -> list[tuple[str, int]]:
        """(source, offset of the first token) of the samples with `numbers` (from 0, ascending) in the batch of step `step`.

        A sample of sequence length L reads tokens offset … offset + L; the last one serves as a label only.
        """
        index, step_in_phase = locate(self.phases, step)
        first = self.phases[index].num_samples(step_in_phase)
        return self._samples(index, first + np.asarray(numbers, np.int64))

    def validation(self, source: str, sequence_length: int) -> np.ndarray:
        """Offsets of the samples that are held out of training: int64 [validation blocks × samples in a block].

        Which blocks they lie in follows from the seed and the source alone. No token is read here and in training, nor a label here and
        there (but the label behind a block's end is the first token that another block reads).
        """
        blocks = permute(np.arange(self._held_out), self._held_out + self._training[source], *self._validation_key(source))
        return (blocks[:, None] * self.block_length + np.arange(0, self.block_length, sequence_length)).ravel()

    def consumed(self, phase: int, steps: int) -> dict[str, int]:
        """Samples by source in the first `steps` steps of a phase."""
        number = self.phases[phase].num_samples(steps)
        total = int(self._quotas[phase].sum())
        window = self._window_of(phase, number) if number < total else self._num_windows(phase)
        counts = self._before(phase, window)
        rest = number - int(counts.sum())
        if rest:
            counts = counts + np.bincount(self._window(phase, window)[0][:rest], minlength=len(counts))
        return {share.source: int(count) for share, count in zip(self.shares[phase], counts, strict=True)}

    def ledger(self, steps: int) -> Ledger:
        """What the first `steps` steps of the run have consumed: tokens and the range of blocks of each source, by phase."""
        rows = []
        for index, phase in enumerate(self.phases):
            here = min(max(0, steps - num_steps(self.phases[:index])), phase.num_steps)
            samples = self.consumed(index, here)
            sources = {
                share.source: Consumed(
                    samples=samples[share.source],
                    tokens=samples[share.source] * phase.sequence_length,
                    first_block=share.first_block,
                    num_blocks=share.num_blocks,
                    checksum=self.sources[share.source].checksum,
                )
                for share in self.shares[index]
            }
            tokens, length = consumed_tokens([phase], here), phase.sequence_length
            rows.append(PhaseRecord(name=phase.name, steps=here, tokens=tokens, sequence_length=length, sources=sources))
        return Ledger(tokens=sum(row.tokens for row in rows), block_length=self.block_length, phases=tuple(rows))

    def check_continues(self, ledger: Ledger) -> None:
        """Raises UserError when a source that has been consumed holds other tokens now: its order would be another one."""
        for phase in ledger.phases:
            for name, consumed in phase.sources.items():
                now = self.sources.get(name)
                if phase.steps and (now is None or now.checksum != consumed.checksum):
                    raise UserError(
                        f"data.folder: source {name} is not the one that phase {phase.name} has consumed {consumed.tokens:,} "
                        "tokens of: put that binary back, or start another run"
                    )

    def _validation_key(self, source: str) -> tuple[object, ...]:
        return self.seed, "validation", source

    def _samples(self, phase: int, numbers: np.ndarray) -> list[tuple[str, int]]:
        assert numbers[-1] < self._quotas[phase].sum()
        found: list[tuple[str, int]] = []
        names = [share.source for share in self.shares[phase]]
        while len(found) < len(numbers):
            window = self._window_of(phase, int(numbers[len(found)]))
            which, offsets = self._window(phase, window)
            places = numbers[len(found) :] - self._before(phase, window).sum()
            places = places[places < len(which)]
            found += zip([names[n] for n in which[places].tolist()], offsets[places].tolist(), strict=True)
        return found

    def _num_windows(self, phase: int) -> int:
        return -(-int(self._quotas[phase].sum()) // WINDOW)

    def _before(self, phase: int, window: int) -> np.ndarray:
        """Samples of each source in all windows before `window`: the exact share, rounded down. shape [sources]"""
        return self._quotas[phase] * window // self._num_windows(phase)

    def _window_of(self, phase: int, number: int) -> int:
        # Rounding down puts a window's true start at most one sample a source before its even share, so the search is short.
        window = number * self._num_windows(phase) // int(self._quotas[phase].sum())
        while window + 1 < self._num_windows(phase) and number >= self._before(phase, window + 1).sum():
            window += 1
        return window

    def _window_order(self, phase: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place in a window: the number of its source among the phase's, and the sample's offset in that source."""
        first, last = self._before(phase, window), self._before(phase, window + 1)
        which = np.repeat(np.arange(len(first)), last - first)
        # The how-manieth sample of its source's share each is: first … last - 1 of each source.
        ordinals = np.arange(len(which)) + np.repeat(last - np.cumsum(last - first), last - first)
        order = permute(np.arange(len(which)), len(which), self.seed, "window", self.phases[phase].name, window)
        which, ordinals = which[order], ordinals[order]
        return which, self._offsets(phase, which, ordinals)

    def _offsets(self, phase: int, which: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """The offsets of samples, each given by the number of its source and its ordinal within the share of that source. All [n]."""
        name, length = self.phases[phase].name, self.phases[phase].sequence_length
        sources, slot = np.unique(which, return_inverse=True)
        rows = [self.shares[phase][n] for n in sources]
        training = np.array([self._training[share.source] for share in rows])[slot]
        keys = np.stack([_round_keys(self.seed, "sample", name, share.source) for share in rows])[slot]
        places = _permute(ordinals, np.array([share.num_samples for share in rows])[slot], keys)
        block, sample_in_block = np.divmod(places, self.block_length // length)
        epoch, block = np.divmod(np.array([share.first_block for share in rows])[slot] + block, training)
        pairs = zip(slot.tolist(), epoch.tolist(), strict=True)
        keys = np.stack([_round_keys(self.seed, "block", rows[n].source, e) for n, e in pairs])
        block = _permute(block, training, keys)
        if self._held_out:  # the first so many places of one more permutation, over all blocks of the source
            keys = np.stack([_round_keys(*self._validation_key(share.source)) for share in rows])[slot]
            block = _permute(self._held_out + block, self._held_out + training, keys)
        return block * self.block_length + sample_in_block * length
