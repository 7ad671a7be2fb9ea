"""Text in numbers, at the speed of C: what the rules of quality share.

A rule is a row (reason, value, least, most); the first value outside its range is why a document is dropped.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Rule = tuple[str, float, float, float]
NO_LIMIT = float("inf")
ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: multiplication by it mixes the upper bits


def first_broken(rules: Iterable[Rule]) -> str | None:
    """The first reason whose value is not within [least, most], with the value. Rules behind it are not computed."""
    for reason, value, least, most in rules:
        if not least <= value <= most:
            return f"{reason}: {round(value, 3):g}"
    return None


def code_points(text: str) -> NDArray[np.uint16]:
    """The number of each character; the rare one beyond the basic plane is 65535, which is no character."""
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16)
    if len(units) == len(text):
        return units
    return np.minimum(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32), 0xFFFF).astype(np.uint16)


def duplicates(pieces: list[str]) -> tuple[int, int]:
    """How many pieces stood before, and how many characters these repetitions hold."""
    distinct = set(pieces)
    if len(distinct) == len(pieces):
        return 0, 0
    return len(pieces) - len(distinct), sum(map(len, pieces)) - sum(map(len, distinct))


def repeated_ngrams(symbols: NDArray[np.generic], sizes: range) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Yields (n, positions, starts) for the n of `sizes`, which rise by one: all places of the n-grams that occur more than once.

    positions  where they begin; those of one n-gram stand together, in rising order
    starts     where in `positions` each n-gram's places begin, so that `len(starts)` is their number and `np.diff` their counts

    An n-gram can only repeat where its beginning does, so only the first size sorts all of the text. N-grams are compared by their
    hashes, which with the position fill 64 bits: at a million symbols one pair in 10^13 is taken for equal.
    """
    codes = symbols.astype(np.uint64)
    length, n = len(codes), sizes.start
    low = np.uint64((1 << length.bit_length()) - 1)
    hashes = codes[: max(length - n + 1, 0)].copy()
    for offset in range(1, n):
        hashes = hashes * ODD + codes[offset : offset + len(hashes)]
    keys = hashes * ODD & ~low | np.arange(len(hashes), dtype=np.uint64)
    for n in sizes:
        keys.sort()
        as_before = np.zeros(len(keys) + 1, bool)  # one more, so that the first is no repetition and the last has none behind it
        np.less_equal(keys[1:] ^ keys[:-1], low, out=as_before[1:-1])
        repeated = as_before[:-1] | as_before[1:]
        positions = (keys[repeated] & low).view(np.int64)
        yield n, positions, (~as_before[:-1][repeated]).nonzero()[0]

        positions = positions[positions < length - n]
        hashes[positions] = longer = hashes[positions] * ODD + codes[positions + n]
        keys = longer * ODD & ~low | positions.view(np.uint64)
