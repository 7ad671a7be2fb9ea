"""The token binaries of a run, opened and checked against its configuration, and read ahead of the trainer. Needs no torch."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_prep.indexed import Manifest, TokenBinary, open_binary
from megatron_jobs.config import RunConfig
from megatron_jobs.config.phase import Phase
from megatron_jobs.data.order import DataOrder
from megatron_jobs.data.phases import Source, locate, num_steps
from mujina.user_input import UserError, nearest
from tokenization.load import load as load_tokenizer

OPENERS = 16  # threads: on a shared file system most of the time goes into waiting for its answers


def open_sources(config: RunConfig) -> dict[str, TokenBinary]:
    """Every source of the phases that is in `data.folder`, by name. Takes a time that does not depend on their size.

    Raises UserError when a binary is damaged or made with another tokenizer than the run's.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.end_of_document, config.begin_documents)
    if tokenizer.vocab_size > config.model.vocab_size:  # imported models may have more rows than their tokenizer has pieces
        raise UserError(
            f"model.vocab_size ({config.model.vocab_size}) must not be below the number of pieces of the tokenizer in {config.tokenizer} "
            f"({tokenizer.vocab_size}): change one of them"
        )
    used = {name for phase in config.phases for name in phase.sources}
    prefixes = {path.stem: path.with_suffix("") for path in sorted(config.data.folder.glob("*.json")) if path.stem in used}
    with ThreadPoolExecutor(OPENERS) as threads:
        binaries = threads.map(lambda prefix: open_binary(prefix, tokenizer.hash), prefixes.values())
        opened = dict(zip(prefixes, binaries, strict=True))
    for phase in config.phases:
        for name in phase.sources:
            if (channel := phase.loss.token_weights) and name in opened:
                _check_channel(f"phases.{phase.name}.loss.token_weights ({channel})", channel, name, opened[name].manifest)
    return opened


def _check_channel(field: str, channel: str, source: str, manifest: Manifest) -> None:
    per_token = [name for name, about in manifest.channels.items() if about.per == "token"]
    if channel not in per_token:
        raise UserError(
            f"{field}: the binary of source {source} has no such channel with a number for each token: {nearest(channel, per_token)}; "
            "prepare it again with answer_weights: true, which gives `weights`, or leave token_weights out"
        )


def facts(binaries: dict[str, TokenBinary]) -> dict[str, Source]:
    return {name: _facts_of(name, binary.manifest) for name, binary in binaries.items()}


def _facts_of(name: str, m: Manifest) -> Source:
    labels = {"languages": tuple(m.languages), "licences": tuple(m.licences), "teachers": tuple(m.teachers)}
    return Source(name, m.num_tokens, m.kind, m.origin, checksum=m.bin_sha256, **labels)


def read(binaries: dict[str, TokenBinary], where: Sequence[tuple[str, int]], length: int) -> np.ndarray:
    """The samples at (source, offset) of `DataOrder.samples`: int64 token ids, shape [samples, length + 1], the last one a label only."""
    tokens = np.empty((len(where), length + 1), np.int64)
    for row, (name, offset) in zip(tokens, where, strict=True):
        row[:] = binaries[name].read(offset, length + 1)
    return tokens


def documents(binaries: dict[str, TokenBinary], where: Sequence[tuple[str, int]], length: int) -> np.ndarray:
    """Which document of its sample each token belongs to, from 0: int32 [samples, length]. A sample may begin and end within one."""
    return np.stack([binaries[name].documents(offset, length) for name, offset in where])


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads: B samples of L tokens."""

    tokens: np.ndarray  # int64 [B, L + 1], the last one of a sample a label only
    sources: np.ndarray  # int64 [B], numbers of names in DataOrder.names
    documents: np.ndarray | None  # int32 [B, L], see `documents`; None unless the phase separates documents
    weights: np.ndarray | None = None  # float32 [B, L], of each label in the loss; None: 1 each

    @property
    def num_labels(self) -> int:
        return self.sources.size * (self.tokens.shape[1] - 1)


def weighs(phase: Phase) -> bool:
    """Whether the tokens of the phase differ in their weight."""
    return phase.loss.token_weights is not None or any(phase.portion(source).loss_weight != 1 for source in phase.sources)


def weights(binaries: dict[str, TokenBinary], where: Sequence[tuple[str, int]], phase: Phase) -> np.ndarray:
    """The weight of each label of the samples, that is of the tokens behind those that are read: float32 [samples, length].

    What the channel of the source says, times what the phase says of the source.
    """
    length = phase.sequence_length
    rows = np.ones((len(where), length), np.float32)
    for row, (name, offset) in zip(rows, where, strict=True):
        if (channel := phase.loss.token_weights) in binaries[name].manifest.channels:
            row[:] = binaries[name].read_channel(channel, offset + 1, length)
        if name in phase.sources:  # a validation set may be of another phase's source
            row *= phase.portion(name).loss_weight
    return rows


def micro_batch(order: DataOrder, binaries: dict[str, TokenBinary], where: Sequence[tuple[str, int]], phase: Phase) -> MicroBatch:
    """The samples at (source, offset), as `phase` wants them."""
    return MicroBatch(
        tokens=read(binaries, where, phase.sequence_length),
        sources=np.array([order.number_of[name] for name, _ in where]),
        documents=documents(binaries, where, phase.sequence_length) if phase.separate_documents else None,
        weights=weights(binaries, where, phase) if weighs(phase) else None,
    )


class Feeder:
    """The micro-batches of one data-parallel rank, each step's read by a thread while the step before it runs.

    Micro-batch n of rank r holds the samples of the global batch from (n · ranks + r) · micro_batch_size on.
    """

    def __init__(self, config: RunConfig, order: DataOrder, binaries: dict[str, TokenBinary], rank: int, ranks: int) -> None:
        self._config, self._order, self._binaries = config, order, binaries
        self._rank, self._ranks = rank, ranks
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def take(self, step: int) -> tuple[list[MicroBatch], float]:
        """The micro-batches of step `step`, and the seconds waited for them. Then reading of the next step begins.

        Any step may be asked for; only the one after the last is there at once. Raises what the reading raised.
        """
        began = time.perf_counter()
        future = self._ahead[1] if self._ahead and self._ahead[0] == step else self._begin(step)
        batches = future.result()
        waited = time.perf_counter() - began
        self._ahead = (step + 1, self._begin(step + 1)) if step + 1 < num_steps(self._config.phases) else None
        return batches, waited

    def read(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, read here and now."""
        index, step_in_phase = locate(self._config.phases, step)
        phase, size = self._config.phases[index], self._config.train.micro_batch_size
        numbers = np.arange(phase.batch_size(step_in_phase)).reshape(-1, self._ranks, size)[:, self._rank].ravel()
        where = self._order.samples(step, numbers)
        return [micro_batch(self._order, self._binaries, where[n : n + size], phase) for n in range(0, len(where), size)]

    def validation(self, phase: Phase) -> tuple[Iterator[MicroBatch], int]:
        """This rank's share of all held-out samples at the phase's sequence length: micro-batches, and how many there are.

        Samples that fill up the last ones have the source number len(order.names), and do not count.
        """
        names, size = self._order.names, self._config.train.micro_batch_size
        where = [(name, int(offset)) for name in names for offset in self._order.validation(name, phase.sequence_length)]
        group = size * self._ranks * self._config.parallel.pipeline  # the interleaved schedule takes micro-batches in groups
        num_micro_batches = -(-len(where) // group) * self._config.parallel.pipeline

        def micro_batches() -> Iterator[MicroBatch]:
            for number in range(num_micro_batches):
                first = (number * self._ranks + self._rank) * size
                mine = where[first : first + size]
                fill = size - len(mine)
                batch = micro_batch(self._order, self._binaries, mine + fill * where[:1], phase)
                batch.sources[len(mine) :] = len(names)
                yield batch

        return micro_batches(), num_micro_batches

    def _begin(self, step: int) -> Future[list[MicroBatch]]:
        future: Future[list[MicroBatch]] = Future()

        def work() -> None:
            try:
                future.set_result(self.read(step))
            except BaseException as error:  # of whatever kind, it is the trainer's
                future.set_exception(error)

        threading.Thread(target=work, daemon=True, name=f"data of step {step}").start()  # a daemon ends with its process
        return future
