"""Documents that say almost the same: MinHash over n-grams of letters (Broder 1997), bands for finding pairs (Indyk and Motwani 1998).

mark      A signature for each document: the low bytes of NUM_HASHES minima. Hashes of its bands go into a file of records.
find 1    Ranges of band hashes: documents that share a band are candidates.
find 2    Ranks: candidates stay whose whole signatures agree in as many places as such similar documents' would.
find 3    One task, in the order of documents: a document is dropped when a kept one before it is that similar. So what is dropped
          resembles what stands for it; a chain of small changes does not pull unlike documents into one.
judge     Compares each document's number with that of the document kept for it.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import FileIO
from itertools import batched, count, groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
import rensa
from datatrove.data import Document
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from data_prep.steps.ngrams import letters, ngram_hashes
from data_prep.steps.records import POSITIONS, Records, group_starts, id_file, id_of, number_of, read_range, record_file, slices
from data_prep.steps.step import CorpusStep, Judge, texts_of
from mujina.files import whole_file

NUM_HASHES = 512
NUM_BANDS = 20
SEED = 1  # of the permutations
RECALL = 0.995  # of the bands: the chance that two documents of the wanted similarity share one
BEFORE = 4  # documents of a bucket that each is compared with, besides the first
BATCH = 256  # documents whose signatures are computed, or pairs that are compared, at once
SPAN = 1 << 14  # documents whose pairs are read at once

Signatures = NDArray[np.uint8]  # signatures_NH


class NearDuplicates(CorpusStep):
    """Keeps the first of the documents whose sets of n-grams have a Jaccard similarity of `similarity` or more.

    N-grams are of letters, marks and digits (NFKC, lower case; spaces, punctuation and symbols count for nothing). A text that is
    shorter than an n-gram is compared as a whole; one without letters passes. What is exactly that similar is
    found five times in six, what is 0.03 more nearly always; what is 0.03 less stays nearly always.
    """

    step: Literal["near_duplicates"] = "near_duplicates"
    similarity: float = Field(0.8, ge=0.5, le=0.95)
    """Jaccard similarity from which documents count as the same."""
    ngram: PositiveInt = 5
    """Characters of an n-gram."""

    @property
    def rows(self) -> int:
        """Minima in a band: as many as the recall allows, for the fewest candidates."""
        return max(rows for rows in range(1, NUM_HASHES // NUM_BANDS + 1) if 1 - (1 - self.similarity**rows) ** NUM_BANDS >= RECALL)

    @property
    def threshold(self) -> float:
        """What a pair's estimate must reach: one standard deviation of the estimate below the similarity."""
        return self.similarity - (self.similarity * (1 - self.similarity) / NUM_HASHES) ** 0.5

    def mark(self, documents: Iterable[Document], folder: Path, rank: int) -> Iterator[Document]:
        # A rank is a process with a core of its own; and the threads that rensa would start do not live on in a fork.
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        factors_BR = np.random.default_rng(SEED).integers(1 << 64, size=(NUM_BANDS, self.rows), dtype=np.uint64)
        start = 0
        with (
            record_file(folder / f"bands-{rank:05}", 2) as bands,
            whole_file(folder / f"signatures-{rank:05}") as signatures,
            id_file(folder, rank) as ids,
        ):
            for batch in batched(documents, BATCH):
                hashes = [ngram_hashes(letters("\n".join(texts_of(document))), self.ngram) for document in batch]
                minima_NH = _minima(hashes)
                signatures.write(minima_NH.astype(np.uint8).tobytes())
                filled = np.flatnonzero([len(one) for one in hashes])
                rows_NBR = minima_NH[filled, : factors_BR.size].reshape(-1, *factors_BR.shape)
                keys_NB = (rows_NBR * factors_BR).sum(axis=2)
                numbers = np.repeat((filled + number_of(rank, start)).astype(np.uint64), NUM_BANDS)
                bands.add(np.stack([keys_NB.ravel(), numbers]))
                start += len(batch)
                for document in batch:
                    ids.add(document.id)
                    yield document

    def find(self, folder: Path, num_ranks: int) -> list[tuple[int, Callable[[int], None]]]:
        return [
            (num_ranks, partial(_find_candidates, folder, num_ranks)),
            (num_ranks, partial(_verify, folder, self.threshold)),
            (1, partial(_choose, folder, self.threshold, num_ranks)),
        ]

    def judge(self, folder: Path, rank: int) -> Judge:
        positions = count()
        kept = _numbers(folder / f"kept-{rank:05}")
        signatures = _SignatureReader(folder)

        def judge(document: Document) -> str | None:
            position = next(positions)
            number, keeper = number_of(rank, position), int(kept[position])
            if keeper == number:
                return None
            estimate = _similarity(*signatures.read(np.array([number, keeper])))
            return f"near_duplicate: {estimate:.2f} of {id_of(folder, keeper)}"

        return judge


def _minima(hashes: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """The NUM_HASHES minima (32 bits) of each document's n-gram hashes: shape [documents, NUM_HASHES]."""
    ends = np.cumsum([0, *map(len, hashes)], dtype=np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(hashes), ends, NUM_HASHES, SEED)
    return np.array(matrix.to_rows(), np.uint64)


def _find_candidates(folder: Path, num_ranks: int, part: int) -> None:
    """Writes the pairs (later, earlier document) that share a band of one range of hashes.

    In a bucket each document is paired with the first and some before it, not with all: pages of one template fill large buckets.
    """
    with record_file(folder / f"candidates-{part:05}", 2) as candidates:
        for bands_CN in slices(sorted(folder.glob("bands-*[0-9]")), 2, part, num_ranks):
            keys, numbers = bands_CN
            starts = group_starts(keys)
            first = np.repeat(starts, np.diff(starts, append=len(keys)))
            places = np.arange(len(keys))
            for before in range(1, BEFORE + 1):
                later = places[places - before > first]
                candidates.add(np.stack([numbers[later], numbers[later - before]]))
            later = places[places > first]
            candidates.add(np.stack([numbers[later], numbers[first[later]]]))


def _verify(folder: Path, threshold: float, rank: int) -> None:
    """Keeps the candidates of a rank's documents whose signatures are similar."""
    signatures = _SignatureReader(folder)
    paths = sorted(folder.glob("candidates-*[0-9]"))
    with record_file(folder / f"pairs-{rank:05}", 2) as pairs:
        for first, last in signatures.spans(rank):
            candidates_2N = _distinct(read_range(paths, 2, first, last))
            for low in range(0, candidates_2N.shape[1], BATCH):
                some_2N = candidates_2N[:, low : low + BATCH]
                similar = _similarity(signatures.read(some_2N[0]), signatures.read(some_2N[1])) >= threshold
                pairs.add(some_2N[:, similar])


def _distinct(pairs_2N: Records) -> Records:
    """The pairs, each once: most share several bands."""
    pairs_2N = pairs_2N[:, np.lexsort(pairs_2N[::-1])]
    return pairs_2N[:, np.append(np.ones(min(pairs_2N.shape[1], 1), bool), (pairs_2N[:, 1:] != pairs_2N[:, :-1]).any(axis=0))]


def _choose(folder: Path, threshold: float, num_ranks: int, _: int) -> None:
    """Writes for each rank's documents the number of the document that is kept for each: its own unless it is dropped."""
    signatures = _SignatureReader(folder)
    kept: list[NDArray[np.uint64]] = []
    for rank in range(num_ranks):
        with whole_file(folder / f"kept-{rank:05}") as stream:
            stream.write((np.arange(signatures.count(rank), dtype=np.uint64) + np.uint64(number_of(rank, 0))).tobytes())
        kept.append(_numbers(folder / f"kept-{rank:05}", "r+"))
        for first, last in signatures.spans(rank):
            later, earlier = read_range([folder / f"pairs-{rank:05}"], 2, first, last).tolist()
            for number, pairs in groupby(zip(later, earlier, strict=True), key=itemgetter(0)):
                similar = {other for _, other in pairs}
                for keeper in sorted({int(kept[other // POSITIONS][other % POSITIONS]) for other in similar}):
                    # Another one may be kept for the similar document, and be less similar to this one.
                    if keeper in similar or _similarity(*signatures.read(np.array([number, keeper]))) >= threshold:
                        kept[rank][number % POSITIONS] = keeper
                        break


def _similarity(one: Signatures, other: Signatures) -> NDArray[np.float64]:
    """The estimated Jaccard similarity. Bytes also agree by chance, one in 256 (b-bit minwise hashing, Li and König 2010)."""
    return ((one == other).mean(axis=-1) - 1 / 256) / (1 - 1 / 256)


class _SignatureReader:
    """Reads signatures by the numbers of documents; mapped memory would grow with what was touched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, FileIO] = {}

    def count(self, rank: int) -> int:
        return os.path.getsize(self._folder / f"signatures-{rank:05}") // NUM_HASHES

    def spans(self, rank: int) -> Iterator[tuple[int, int]]:
        """The first and the last number of each SPAN documents of a rank."""
        end = number_of(rank, self.count(rank))
        return ((first, min(first + SPAN, end) - 1) for first in range(number_of(rank, 0), end, SPAN))

    def read(self, numbers: NDArray[np.uint64]) -> Signatures:
        rows = (os.pread(self._file(n // POSITIONS).fileno(), NUM_HASHES, n % POSITIONS * NUM_HASHES) for n in numbers.tolist())
        return np.frombuffer(b"".join(rows), np.uint8).reshape(-1, NUM_HASHES)

    def _file(self, rank: int) -> FileIO:
        if rank not in self._files:
            self._files[rank] = FileIO(self._folder / f"signatures-{rank:05}")
        return self._files[rank]


def _numbers(path: Path, mode: Literal["r", "r+"] = "r") -> NDArray[np.uint64]:
    """A file of numbers, mapped; an empty file, which cannot be mapped, as an empty array."""
    return np.memmap(path, np.uint64, mode) if os.path.getsize(path) else np.empty(0, np.uint64)
