"""Marks of documents in binary files, for comparing those of all ranks in memory that does not grow with the source.

A file of records holds columns of unsigned 64-bit numbers. It consists of runs: the number of records R, then C columns of R numbers,
sorted by the first column, the key. So a range of keys is one piece of each run, whoever wrote it. Shapes: C columns, N records.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mujina.files import whole_file

Records = NDArray[np.uint64]  # records_CN
RUN = 1 << 18  # records that a writer holds before it sorts them
SLICE = 1 << 19  # records that a task holds at once
KEYS = 1 << 64
POSITIONS = 1 << 40  # documents that a rank may have


def number_of(rank: int, position: int) -> int:
    """One number for a document of the source; their order is that of (rank, position)."""
    return rank * POSITIONS + position


class RecordWriter:
    """Collects records and writes them in sorted runs, those of one key in the order in which they came."""

    def __init__(self, stream: IO[bytes], num_columns: int, merge: Callable[[Records], Records] | None) -> None:
        self._stream, self._num_columns, self._merge = stream, num_columns, merge
        self._pieces: list[Records] = []
        self._size = 0

    def add(self, records_CN: Records) -> None:
        self._pieces.append(records_CN)
        self._size += records_CN.shape[1]
        if self._size >= RUN:
            self.flush()

    def flush(self) -> None:
        """Writes what was collected."""
        records_CN = _sorted(self._pieces, self._num_columns)
        if self._merge is not None:
            records_CN = self._merge(records_CN)
        self._stream.write(np.uint64(records_CN.shape[1]).tobytes() + records_CN.tobytes())
        self._pieces, self._size = [], 0


@contextmanager
def record_file(path: Path, num_columns: int, merge: Callable[[Records], Records] | None = None) -> Iterator[RecordWriter]:
    """A writer of a file that is there only when the block has ended without an error. `merge` may join records of a run."""
    with whole_file(path) as stream:
        records = RecordWriter(stream, num_columns, merge)
        yield records
        records.flush()


def read_range(paths: list[Path], num_columns: int, first: int = 0, last: int = KEYS - 1) -> Records:
    """The records whose keys are first to last (both included), sorted by key, those of one key in the order of files and runs."""
    pieces = []
    for path in paths:
        numbers = np.memmap(path, np.uint64, "r")
        start = 0
        while start < len(numbers):
            size = int(numbers[start])
            run_CR = numbers[start + 1 : start + 1 + num_columns * size].reshape(num_columns, size)
            low = np.searchsorted(run_CR[0], np.uint64(first), "left")
            high = np.searchsorted(run_CR[0], np.uint64(last), "right")
            pieces.append(np.array(run_CR[:, low:high]))
            start += 1 + num_columns * size
    return _sorted(pieces, num_columns)


def slices(paths: list[Path], num_columns: int, part: int, num_parts: int) -> Iterator[Records]:
    """The records of the part-th of `num_parts` equal ranges of keys, SLICE or so at a time, in the order of keys.

    Keys must be hashes for the ranges to hold about as many records each. Records of one key come together.
    """
    num_records = sum(os.path.getsize(path) for path in paths) / (8 * num_columns)
    count = max(1, ceil(num_records / num_parts / SLICE))
    for piece in range(part * count, (part + 1) * count):
        yield read_range(paths, num_columns, KEYS * piece // (num_parts * count), KEYS * (piece + 1) // (num_parts * count) - 1)


def group_starts(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each key of a sorted array first stands."""
    return np.flatnonzero(np.append(np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]))


def _sorted(pieces: list[Records], num_columns: int) -> Records:
    records_CN = np.concatenate([np.empty((num_columns, 0), np.uint64), *pieces], axis=1)
    return records_CN[:, np.argsort(records_CN[0], kind="stable")]


class IdWriter:
    """Keeps the ids of a rank's documents, so that another rank can name them (`id_of`)."""

    def __init__(self, ids: IO[bytes], ends: IO[bytes]) -> None:
        self._ids, self._ends = ids, ends

    def add(self, id: str) -> None:
        self._ids.write(id.encode())
        self._ends.write(self._ids.tell().to_bytes(8, "little"))


@contextmanager
def id_file(folder: Path, rank: int) -> Iterator[IdWriter]:
    with whole_file(folder / f"ids-{rank:05}.text") as ids, whole_file(folder / f"ids-{rank:05}.ends") as ends:
        yield IdWriter(ids, ends)


def id_of(folder: Path, number: int) -> str:
    """The id of the document of that number."""
    rank, position = divmod(number, POSITIONS)
    skipped = max(position - 1, 0)
    ends = np.fromfile(folder / f"ids-{rank:05}.ends", np.uint64, offset=8 * skipped, count=position - skipped + 1).tolist()
    start = ends[0] if position else 0
    with open(folder / f"ids-{rank:05}.text", "rb") as ids:
        ids.seek(start)
        return ids.read(ends[-1] - start).decode()
