"""The order of the training data: a pure function of (seed, phases, sample number).

No index is built, cached or exchanged between processes; the n-th sample of a phase is computed when it is asked for.

    source stream   cut into blocks of `data.block_length` tokens, some of which are held out for validation;
                    a keyed permutation of each epoch orders the others
    phase           owns a range of that order (`phases.shares`); a second permutation orders the samples inside the range
    mix             the sources of a phase are interleaved in windows of about WINDOW samples, each source within one
                    sample of its exact share in every window; a third permutation shuffles each window

In a phase of dialogues a sample is a pack of whole ones (`dialogues.py`), epoch after epoch; the mix is the same, in smaller windows.

So a token is used at most once per epoch, across phases and sequence lengths, and the order is the same at every
data-parallel size, micro-batch size and restart.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_jobs.config import RunConfig
from megatron_jobs.config.phase import Phase
from megatron_jobs.data import dialogues
from megatron_jobs.data.ledger import Consumed, Ledger, PhaseRecord
from megatron_jobs.data.permutation import permute, permute_each, round_keys
from megatron_jobs.data.phases import Source, consumed_tokens, locate, num_steps, shares, training_blocks, validation_blocks
from mujina.user_input import UserError

WINDOW = 1024  # samples
WINDOW_OF_PACKS = 32  # packs: they are shuffled already, and the epochs of a small source should follow each other
Sample = tuple[str, int | tuple[int, ...]]  # a source; the offset of the first token in it, or the numbers of the dialogues packed together


class DataOrder:
    """Where in which source each sample of the run lies. `config` must have been through `phases.resolve`.

    names       the sources of all phases, in the order of the alphabet
    number_of   the place of each in `names`
    """

    def __init__(self, config: RunConfig, sources: dict[str, Source]) -> None:
        self.seed, self.sources, self._config = config.seed, sources, config
        self.phases = config.phases
        self.block_length = config.data.block_length
        self.shares = shares(config, sources)
        self._held_out = validation_blocks(config.data)
        blocks = {share.source for row in self.shares for share in row if share.taken is None}
        self._training = {name: training_blocks(sources[name], config.data) for name in blocks}
        self.names = sorted({share.source for row in self.shares for share in row})
        self.number_of = {name: number for number, name in enumerate(self.names)}
        self._quotas = [np.array([share.num_samples for share in row], np.int64) for row in self.shares]
        self._window = lru_cache(maxsize=8)(self._window_order)

    def samples(self, step: int, numbers: Sequence[int] | np.ndarray) -> list[Sample]:
        """Where the samples with `numbers` (from 0, ascending) in the batch of step `step` lie.

        A sample of sequence length L reads tokens offset … offset + L; the last one serves as a label only. A pack without dialogues
        fills up the last batch of a phase of dialogues.
        """
        index, step_in_phase = locate(self.phases, step)
        first = self.phases[index].num_samples(step_in_phase)
        return self._samples(index, first + np.asarray(numbers, np.int64))

    def validation(self, phase: Phase) -> list[Sample]:
        """The samples that are held out of training, as `phase` measures them: dialogues only where it is a phase of them itself, and
        nothing but pairs where it is one of pairs."""
        samples: list[Sample] = []
        for name in self.names:
            if (self.sources[name].kind == "preferences") != (phase.loss.kind == "preference"):
                continue
            if name in self._training:
                samples += [(name, offset) for offset in self.held_out(name, phase.sequence_length).tolist()]
            elif phase.is_of_dialogues and (there := self.sources[name].dialogues):
                packs = dialogues.held_out(self._config, phase, there)
                samples += [(name, packs[number]) for number in range(len(packs))]
        return samples

    def held_out(self, source: str, sequence_length: int) -> np.ndarray:
        """Offsets of the samples that are held out of training: int64 [validation blocks × samples in a block].

        Which blocks they lie in follows from the seed and the source alone. No token is read here and in training, nor a label here and
        there (but the label behind a block's end is the first token that another block reads).
        """
        blocks = permute(np.arange(self._held_out), self._held_out + self._training[source], *self._validation_key(source))
        return (blocks[:, None] * self.block_length + np.arange(0, self.block_length, sequence_length)).ravel()

    def consumed(self, phase: int, steps: int) -> dict[str, int]:
        """Samples by source in the first `steps` steps of a phase."""
        total = int(self._quotas[phase].sum())
        number = min(total, self.phases[phase].num_samples(steps))
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
                    first_block=None if share.taken else share.first_block,
                    num_blocks=None if share.taken else share.num_blocks,
                    first_dialogue=share.taken and share.taken.first,
                    num_dialogues=share.taken and share.taken.count,
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

    def _samples(self, phase: int, numbers: np.ndarray) -> list[Sample]:
        found: list[Sample] = []
        shares, there = self.shares[phase], int(self._quotas[phase].sum())
        filling: list[Sample] = [(self.names[0], ())] * int((numbers >= there).sum())
        assert not filling or self.phases[phase].is_of_dialogues
        numbers = numbers[numbers < there]
        while len(found) < len(numbers):
            window = self._window_of(phase, int(numbers[len(found)]))
            which, offsets = self._window(phase, window)
            places = numbers[len(found) :] - self._before(phase, window).sum()
            places = places[places < len(which)]
            for n, place in zip(which[places].tolist(), offsets[places].tolist(), strict=True):
                taken = shares[n].taken
                found.append((shares[n].source, taken.packs[place] if taken else place))
        return found + filling

    def _num_windows(self, phase: int) -> int:
        return -(-int(self._quotas[phase].sum()) // (WINDOW_OF_PACKS if self.phases[phase].is_of_dialogues else WINDOW))

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
        """For each place in a window: the number of its source among the phase's, and the sample's offset in that source, or the number of
        the pack."""
        first, last = self._before(phase, window), self._before(phase, window + 1)
        which = np.repeat(np.arange(len(first)), last - first)
        # The how-manieth sample of its source's share each is: first … last - 1 of each source.
        ordinals = np.arange(len(which)) + np.repeat(last - np.cumsum(last - first), last - first)
        order = permute(np.arange(len(which)), len(which), self.seed, "window", self.phases[phase].name, window)
        which, ordinals = which[order], ordinals[order]
        return which, ordinals if self.phases[phase].is_of_dialogues else self._offsets(phase, which, ordinals)

    def _offsets(self, phase: int, which: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """The offsets of samples, each given by the number of its source and its ordinal within the share of that source. All [n]."""
        name, length = self.phases[phase].name, self.phases[phase].sequence_length
        sources, slot = np.unique(which, return_inverse=True)
        rows = [self.shares[phase][n] for n in sources]
        training = np.array([self._training[share.source] for share in rows])[slot]
        keys = np.stack([round_keys(self.seed, "sample", name, share.source) for share in rows])[slot]
        places = permute_each(ordinals, np.array([share.num_samples for share in rows])[slot], keys)
        block, sample_in_block = np.divmod(places, self.block_length // length)
        epoch, block = np.divmod(np.array([share.first_block for share in rows])[slot] + block, training)
        pairs = zip(slot.tolist(), epoch.tolist(), strict=True)
        keys = np.stack([round_keys(self.seed, "block", rows[n].source, e) for n, e in pairs])
        block = permute_each(block, training, keys)
        if self._held_out:  # the first so many places of one more permutation, over all blocks of the source
            keys = np.stack([round_keys(*self._validation_key(share.source)) for share in rows])[slot]
            block = permute_each(self._held_out + block, self._held_out + training, keys)
        return block * self.block_length + sample_in_block * length
