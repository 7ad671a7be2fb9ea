"""The order of the training data: a pure function of (seed, phases, sample number).

No index is built, cached or exchanged between processes; the n-th sample of a phase is computed when it is asked for.

    source stream   cut into blocks of `data.block_length` tokens; a keyed permutation of each epoch orders the blocks
    phase           owns a range of that order (`phases.shares`); a second permutation orders the samples inside the range
    mix             the sources of a phase are interleaved in windows of about WINDOW samples, each source within one
                    sample of its exact share in every window; a third permutation shuffles each window

So a token is used at most once per epoch, across phases and sequence lengths, and the order is the same at every
data-parallel size, micro-batch size and restart.
"""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_jobs.config import RunConfig
from megatron_jobs.phases import Share, Source, blocks_in, locate, num_steps, shares
from user_input import UserError

WINDOW = 1024  # samples
ROUNDS = 6


def permute(indices: np.ndarray, size: int, *key: object) -> np.ndarray:
    """The places of `indices` (int64 in [0, size)) under the permutation of [0, size) that `key` selects.

    A Feistel network over pairs (left, right) of [0, a) × [0, b) with a·b ≥ size, and cycle walking: a value that falls
    outside [0, size) is sent through again until it is inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    a = int(np.ceil(np.sqrt(size)))
    b = -(-size // a)
    keys = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest(), np.uint64)
    result = np.array(indices, np.int64)
    outside = np.arange(len(result))
    while len(outside):
        left, right = np.divmod(result[outside], b)
        for round, round_key in enumerate(keys):
            if round % 2:
                left = (left + _mix(right, round_key) % a) % a
            else:
                right = (right + _mix(left, round_key) % b) % b
        result[outside] = left * b + right
        outside = outside[result[outside] >= size]
    return result


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 63-bit hash of each value (the finaliser of splitmix64)."""
    z = values.astype(np.uint64) ^ key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


class DataOrder:
    """Where in which source each sample of the run lies."""

    def __init__(self, config: RunConfig, sources: dict[str, Source]) -> None:
        self.seed, self.sources = config.seed, sources
        self.phases = config.phases
        self.block_length = config.data.block_length
        self.num_blocks = {name: blocks_in(source.num_tokens, self.block_length) for name, source in sources.items()}
        self.shares = shares(config, sources)
        self._quotas = [np.array([share.num_samples for share in row], np.int64) for row in self.shares]
        self._window = lru_cache(maxsize=4)(self._window_order)

    def samples(self, step: int, numbers: range) -> list[tuple[str, int]]:
        """(source, offset of the first token) of the samples with `numbers` (from 0) in the batch of step `step`.

        A sample of sequence length L reads tokens offset … offset + L; the last one serves as a label only.
        """
        index, step_in_phase = locate(self.phases, step)
        first = step_in_phase * self.phases[index].global_batch_size
        return [self.sample(index, first + number) for number in numbers]

    def sample(self, phase: int, number: int) -> tuple[str, int]:
        """(source, offset in tokens) of the sample with `number` (from 0) in phase `phase`."""
        window = self._window_of(phase, number)
        place = number - int(self._before(phase, window).sum())
        which, ordinals = self._window(phase, window)
        share = self.shares[phase][which[place]]
        return share.source, self._offset(phase, share, int(ordinals[place]))

    def consumed(self, phase: int, steps: int) -> dict[str, int]:
        """Samples by source in the first `steps` steps of a phase."""
        number = steps * self.phases[phase].global_batch_size
        total = int(self._quotas[phase].sum())
        window = self._window_of(phase, number) if number < total else self._num_windows(phase)
        counts = self._before(phase, window)
        rest = number - int(counts.sum())
        if rest:
            counts = counts + np.bincount(self._window(phase, window)[0][:rest], minlength=len(counts))
        return {share.source: int(count) for share, count in zip(self.shares[phase], counts, strict=True)}

    def ledger(self, steps: int) -> dict[str, Any]:
        """What the first `steps` steps of the run have consumed: tokens and the range of blocks of each source, by phase."""
        rows = []
        for index, phase in enumerate(self.phases):
            here = min(max(0, steps - num_steps(self.phases[:index])), phase.num_steps)
            samples = self.consumed(index, here)
            rows.append(
                {
                    "name": phase.name,
                    "steps": here,
                    "tokens": here * phase.tokens_per_step,
                    "sources": {
                        share.source: {
                            "samples": samples[share.source],
                            "tokens": samples[share.source] * phase.sequence_length,
                            "first_block": share.first_block,
                            "num_blocks": share.num_blocks,
                            "checksum": self.sources[share.source].checksum,
                        }
                        for share in self.shares[index]
                    },
                }
            )
        return {"tokens": sum(row["tokens"] for row in rows), "block_length": self.block_length, "phases": rows}

    def check_continues(self, ledger: dict[str, Any]) -> None:
        """Raises UserError when a source that has been consumed holds other tokens now: its order would be another one."""
        for phase in ledger["phases"]:
            for name, consumed in phase["sources"].items():
                now = self.sources.get(name)
                if phase["steps"] and (now is None or now.checksum != consumed["checksum"]):
                    raise UserError(
                        f"data.folder: source {name} is not the one that phase {phase['name']} has consumed {consumed['tokens']:,} "
                        "tokens of: put that binary back, or start another run"
                    )

    def _offset(self, phase: int, share: Share, ordinal: int) -> int:
        length = self.phases[phase].sequence_length
        per_block = self.block_length // length
        place = int(permute(np.array([ordinal]), share.num_samples, self.seed, "sample", self.phases[phase].name, share.source)[0])
        block, sample_in_block = divmod(place, per_block)
        epoch, block_in_epoch = divmod(share.first_block + block, self.num_blocks[share.source])
        size = self.num_blocks[share.source]
        stored = int(permute(np.array([block_in_epoch]), size, self.seed, "block", share.source, epoch)[0])
        return stored * self.block_length + sample_in_block * length

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
        """For each place in a window: the index of its source, and the ordinal of the sample within that source's share."""
        first, last = self._before(phase, window), self._before(phase, window + 1)
        which = np.repeat(np.arange(len(first)), last - first)
        ordinals = np.concatenate([np.arange(start, stop) for start, stop in zip(first, last, strict=True)])
        order = permute(np.arange(len(which)), len(which), self.seed, "window", self.phases[phase].name, window)
        return which[order], ordinals[order]
