"""Letters by the short way are those of NFKC, and n-grams that are equal have equal hashes."""

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.steps.ngrams import letters, ngram_hashes

# Letters that NFKC joins, splits or maps: kana and their marks of both widths, jamo, ligatures, sigmas, and any others.
tricky = st.text(st.sampled_from("aAÀ가각ᄀ\u1161\u11a8ㅏｶﾞかはﾊﾟ\u3099\u309a\u0301\u0327ﬁ㍿①ΣςσİıǅẞÅ𠮷𝐀😀、 \n\ud800")) | st.text()


def by_nfkc(text: str) -> str:
    return "".join(character for character in unicodedata.normalize("NFKC", text).lower() if unicodedata.category(character)[0] in "LMN")


@given(tricky)
@example("ΟΔΟΣ ΣΑΣ")
@example("ᄀ\u1161")
@example("가\u11a8")
@example("か\u3099ｶﾞ")
def test_letters_are_those_of_nfkc(text: str) -> None:
    assert letters(text).tobytes().decode("utf-32-le", "surrogatepass") == by_nfkc(text)


def test_every_character_alone_is_what_nfkc_makes_of_it() -> None:
    for start in range(0, 0x110000, 64):
        text = " ".join(map(chr, range(start, start + 64)))
        assert letters(text).tobytes().decode("utf-32-le", "surrogatepass") == by_nfkc(text)


@pytest.mark.parametrize("n", [1, 2, 5, 30, 60])
def test_hashes_are_equal_where_ngrams_are(n: int) -> None:
    codes = np.random.default_rng(0).integers(0x3041, 0x3044, 2_000).astype(np.uint32)
    codes[700:900] = codes[100:300]
    ngrams = [codes[start : start + n].tobytes() for start in range(len(codes) - n + 1)]
    hashes = ngram_hashes(codes, n).tolist()
    assert len(hashes) == len(ngrams) and len(set(hashes)) == len(set(ngrams)) == len(set(zip(hashes, ngrams, strict=True)))


def test_what_is_shorter_than_an_ngram_is_one() -> None:
    codes = np.array([1, 2, 3], np.uint32)
    assert ngram_hashes(codes, 5).tolist() == ngram_hashes(codes, 3).tolist()
    assert len(ngram_hashes(codes[:0], 5)) == 0
