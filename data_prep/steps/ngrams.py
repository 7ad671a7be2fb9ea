"""Texts as n-grams of their letters: what steps compare that look past spelling, spacing and punctuation."""

import functools
import unicodedata

import numpy as np
from numpy.typing import NDArray

BASE = 0x9E3779B97F4A7C15
TABLE = 0x20000  # code points from here on are rare kanji
UNTOLD = 0xFFFFFFFF


def letters(text: str) -> NDArray[np.uint32]:
    """The code points of letters, marks and digits under NFKC and in lower case; spaces, punctuation and symbols are gone."""
    codes = _letter_of()[np.minimum(_codes(text), TABLE)]
    if (codes == UNTOLD).any():
        codes = _codes("".join(filter(_is_letter, unicodedata.normalize("NFKC", text).lower())))
    return codes[codes != 0]


def ngram_hashes(codes: NDArray[np.uint32], n: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each n-gram, in order; of the whole when it is shorter than n, and nothing of nothing.

    A polynomial in the code points, built by doubling: a hash of 2m characters is that of the first m times BASE^m plus that of the next
    m. Its bits are mixed at the end (Stafford's variant 13 of the finisher of MurmurHash3).
    """
    symbols = codes.astype(np.uint64)
    n = min(n, len(symbols))
    if n == 0:
        return symbols
    hashes, length = symbols, 1
    for bit in f"{n:b}"[1:]:
        hashes = hashes[:-length] * np.uint64(pow(BASE, length, 1 << 64)) + hashes[length:]
        length *= 2
        if bit == "1":
            hashes = hashes[:-1] * np.uint64(BASE) + symbols[length:]
            length += 1
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


@functools.cache
def _letter_of() -> NDArray[np.uint32]:
    """The letter that each code point is, 0 for what is none, and UNTOLD where a character alone does not tell: NFKC joins marks and
    Korean vowels to what stands before them, makes several letters of one, and a sigma's lower case depends on the word."""
    table = np.full(TABLE + 1, UNTOLD, np.uint32)
    for code in range(TABLE):
        found = list(filter(_is_letter, unicodedata.normalize("NFKC", chr(code)).lower()))
        if not found:
            table[code] = 0
        elif len(found) == 1 and unicodedata.category(found[0])[0] != "M" and not "\u1160" <= found[0] <= "\u11ff" and found[0] != "σ":
            table[code] = ord(found[0])
    return table
