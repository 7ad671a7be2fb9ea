"""The token binaries of a run, opened and checked against its configuration, and read ahead of the trainer. Needs no torch."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_prep.indexed import Manifest, TokenBinary, open_binary
from megatron_jobs.config import RunConfig
from megatron_jobs.config.phase import Answers, NextToken, Phase
from megatron_jobs.data.dialogues import Dialogues
from megatron_jobs.data.order import DataOrder, Sample
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
                asked = f"kind ({phase.loss.kind})" if phase.is_of_dialogues else f"token_weights ({channel})"
                _check_channel(f"phases.{phase.name}.loss.{asked}", channel, name, opened[name].manifest)
    return opened


def _check_channel(field: str, channel: str, source: str, manifest: Manifest) -> None:
    per_token = [name for name, about in manifest.channels.items() if about.per == "token"]
    if channel not in per_token:
        raise UserError(
            f"{field}: the binary of source {source} has no such channel with a number for each token: {nearest(channel, per_token)}; "
            "prepare it again with answer_weights: true, which gives `weights`, or take another loss"
        )


def facts(binaries: dict[str, TokenBinary]) -> dict[str, Source]:
    return {name: _facts_of(name, binary) for name, binary in binaries.items()}


def _facts_of(name: str, binary: TokenBinary) -> Source:
    m = binary.manifest
    labels = {"languages": tuple(m.languages), "licences": tuple(m.licences), "teachers": tuple(m.teachers)}
    dialogues = Dialogues(binary) if m.kind in ("chat", "preferences") else None
    return Source(name, m.num_tokens, m.kind, m.origin, m.bin_sha256, **labels, dialogues=dialogues, num_answer_tokens=m.num_answer_tokens)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads: B samples of L tokens."""

    tokens: np.ndarray  # int64 [B, L + 1], the last one of a sample a label only
    sources: np.ndarray  # int64 [B], numbers of names in DataOrder.names
    documents: np.ndarray | None  # int32 [B, L], see `documents`; None unless the phase separates documents
    weights: np.ndarray | None = None  # float32 [B, L], of each label in the loss; None: 1 each
    pairs: np.ndarray | None = None  # int64 [B, P], numbers of the pairs of answers in their source, -1 behind the last; pair p of a
    #                                  sample is its documents 2p and 2p + 1

    @property
    def num_labels(self) -> int:
        return self.sources.size * (self.tokens.shape[1] - 1)


def weighs(phase: Phase) -> bool:
    """Whether the tokens of the phase differ in their weight."""
    return phase.loss.token_weights is not None or any(phase.portion(source).loss_weight != 1 for source in phase.sources)


def micro_batch(order: DataOrder, binaries: dict[str, TokenBinary], where: Sequence[Sample], phase: Phase) -> MicroBatch:
    """The samples at these places, as `phase` wants them."""
    rows = [_stretch(binaries[name], at, phase) if isinstance(at, int) else _packed(binaries[name], at, phase) for name, at in where]
    tokens, documents, weights = zip(*rows, strict=True)
    # a validation set may be of another phase's source; what fills up a batch does not count
    factors = [phase.portion(name).loss_weight if name in phase.sources else 1.0 for name, _ in where]
    return MicroBatch(
        tokens=np.stack(tokens, dtype=np.int64),
        sources=np.array([len(order.names) if at == () else order.number_of[name] for name, at in where]),
        documents=np.stack(documents) if phase.keeps_apart else None,
        weights=np.stack(weights) * np.array(factors, np.float32)[:, None] if weighs(phase) else None,
        pairs=_numbers([at for _, at in where if isinstance(at, tuple)]) if phase.loss.kind == "preference" else None,
    )


def _numbers(packed: Sequence[tuple[int, ...]]) -> np.ndarray:
    """int64 [B, P], -1 behind the last of each."""
    numbers = np.full((len(packed), max(1, *map(len, packed))), -1)
    for row, its in zip(numbers, packed, strict=True):
        row[: len(its)] = its
    return numbers


Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # of a micro-batch: tokens [L + 1], documents [L], weights [L]


def _stretch(binary: TokenBinary, offset: int, phase: Phase) -> Row:
    """Of a stream: it may begin and end within a document."""
    length, channel = phase.sequence_length, phase.loss.token_weights
    documents = binary.documents(offset, length) if phase.separate_documents else np.zeros(length, np.int32)
    weights = np.ones(length, np.float32)
    if channel in binary.manifest.channels and not phase.is_of_dialogues:
        weights[:] = binary.read_channel(channel, offset + 1, length)
    return binary.read(offset, length + 1), documents, weights


def _packed(binary: TokenBinary, dialogues: tuple[int, ...], phase: Phase) -> Row:
    """Whole dialogues, one behind the other, and what is left of the sequence as one document more, in which nothing has a weight."""
    length, loss = phase.sequence_length, phase.loss
    assert not isinstance(loss, NextToken)  # as in no phase of dialogues
    each = 2 if loss.kind == "preference" else 1
    tokens, weights = np.zeros(length + 1, np.int64), np.zeros(length, np.float32)
    documents, place = np.full(length, each * len(dialogues), np.int32), 0
    for number, document in enumerate(each * dialogue + side for dialogue in dialogues for side in range(each)):
        start, end = binary.bounds(document)
        size = min(end - start, length)
        tokens[place : place + size] = binary.read(start, size)
        documents[place : place + size] = number
        said = weights[place : place + size - 1]  # the last token has no label
        said[:] = binary.read_channel(loss.token_weights, start + 1, size - 1)
        if isinstance(loss, Answers) and loss.mean_over == "dialogues":
            said /= max(1.0, float(said.sum()))
        place += size
    return tokens, documents, weights


class Feeder:
    """The micro-batches of one data-parallel rank, each step's read by a thread while the step before it runs.

    Micro-batch n of rank r holds the samples of the global batch from (n · ranks + r) · micro_batch_size on.
    """

    def __init__(self, config: RunConfig, order: DataOrder, binaries: dict[str, TokenBinary], rank: int, ranks: int) -> None:
        self._config, self._order, self._binaries = config, order, binaries
        self._rank, self.ranks = rank, ranks
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
        numbers = np.arange(phase.batch_size(step_in_phase)).reshape(-1, self.ranks, size)[:, self._rank].ravel()
        where = self._order.samples(step, numbers)
        return [micro_batch(self._order, self._binaries, where[n : n + size], phase) for n in range(0, len(where), size)]

    def validation(self, phase: Phase) -> tuple[Iterator[MicroBatch], int]:
        """This rank's share of all held-out samples at the phase's sequence length, as `share` gives it."""
        return self.share(self._order.validation(phase), phase)

    def share(self, where: Sequence[Sample], phase: Phase) -> tuple[Iterator[MicroBatch], int]:
        """This rank's share of the samples, as `phase` wants them: micro-batches, and how many there are.

        Samples that fill up the last ones have the source number len(order.names), and do not count.
        """
        size = self._config.train.micro_batch_size
        group = size * self.ranks * self._config.parallel.pipeline  # the interleaved schedule takes micro-batches in groups
        num_micro_batches = -(-len(where) // group) * self._config.parallel.pipeline

        def micro_batches() -> Iterator[MicroBatch]:
            for number in range(num_micro_batches):
                first = (number * self.ranks + self._rank) * size
                mine = where[first : first + size]
                fill = size - len(mine)
                batch = micro_batch(self._order, self._binaries, [*mine, *[where[0]] * fill], phase)
                batch.sources[len(mine) :] = len(self._order.names)
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
