"""Whether a Japanese text is prose worth reading, told from its characters, sentences, repetitions and words. No word is segmented.

The Swallow corpus's rules `apply_v1` as published with it (Okazaki et al. 2024, arXiv:2404.17733); and after
HojiChar's filters those on rare full stops, too many nouns, adverts, bulletin boards and NG words.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from data_prep.steps.measure import NO_LIMIT, Rule, code_points, duplicates, first_broken, repeated_ngrams
from data_prep.steps.step import Judge, Step
from mujina.files import read_texts
from mujina.user_input import Section, UserError

WORDS = Path(__file__).parent / "words"
SENTENCE = re.compile(r"[^。．！？!?\n]+[。．！？!?]?")
# >>12, ID:AbCdEf12, (月) 12:34: what varies stands in lookaheads, so that each is one word however often it stands there.
BOARD_MARK = re.compile(r">>(?=\d)|＞＞(?=\d)|ID:(?=[A-Za-z0-9+/]{8})|\((?=[月火水木金土日]\) ?\d{1,2}:\d{2})|投稿日(?=[:： ])")
# Classes of characters. Particles are hiragana too, and the ends of sentences and commas count as Japanese.
OTHER, HIRAGANA, PARTICLE, KATAKANA, KANJI, COMMA, FULL_STOP = range(7)


class WordLimit(Section):
    """How much of a list of words a text may hold: it is dropped beyond both limits, so that one mention, or one word often, is none."""

    words: Path
    """A list of the package's folder words/, or an absolute path: one word a line, # comments."""
    max_distinct: NonNegativeInt
    """Different words of the list."""
    max_per_thousand: NonNegativeFloat
    """Occurrences a thousand characters."""


class _Finder:
    """Finds the words of all lists in one reading of a text, at the places where two characters are the first of a word."""

    def __init__(self, lists: dict[str, list[str]]) -> None:
        self.lists = {reason: frozenset(words) for reason, words in lists.items()}
        words = sorted(frozenset().union(*self.lists.values()), key=len, reverse=True)  # of two that begin alike the longer one
        self.word = re.compile("|".join(map(re.escape, words)) or "(?!)")
        self.begins = np.zeros(1 << 16, bool)
        for word in words:
            self.begins[self._pairs(code_points(word[:2]))] = True

    def find(self, text: str, characters: NDArray[np.uint16]) -> dict[str, list[str]]:
        """The occurrences, by the reason that they count for."""
        places = self.begins.take(self._pairs(characters)).nonzero()[0].tolist()
        words = [match[0] for place in places if (match := self.word.match(text, place))]
        found = {reason: [word for word in words if word in known] for reason, known in self.lists.items()}
        if "board" in found:
            found["board"] += BOARD_MARK.findall(text)
        return found

    @staticmethod
    def _pairs(characters: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Each character and the next in 16 bits; few others fall together with a word's."""
        return characters[:-1] * np.uint16(0x9E37) + characters[1:]


class JapaneseQuality(Step):
    """Keeps Japanese prose, after Swallow's and HojiChar's rules.

    Lengths are in characters. The ratios of scripts are of Japanese characters: kana, kanji and 、，。．！？"""

    step: Literal["japanese_quality"] = "japanese_quality"
    min_characters: PositiveInt = 400
    """All characters, and the Japanese ones alone."""
    min_japanese_ratio: NonNegativeFloat = 0.5
    """Japanese characters, of all."""
    min_hiragana_ratio: NonNegativeFloat = 0.2
    """Hiragana, of Japanese characters."""
    max_katakana_ratio: NonNegativeFloat = 0.5
    """Katakana, of Japanese characters."""
    min_mean_sentence: NonNegativeFloat = 20
    """Characters of a sentence on average, at least."""
    max_mean_sentence: NonNegativeFloat = 90
    """Characters of a sentence on average, at most."""
    max_sentence: PositiveInt = 200
    """Characters of the longest sentence."""
    max_ellipsis_ratio: NonNegativeFloat = 0.2
    """Sentences that end in ・ or …."""
    max_repeated_lines: NonNegativeFloat = 0.3
    """Lines that stood before, of those that are not blank; the same of sentences."""
    max_repeated_characters: NonNegativeFloat = 0.2
    """Characters in lines that stood before, of those in lines; the same of sentences."""
    max_top_ngrams: dict[PositiveInt, NonNegativeFloat] = {2: 0.20, 3: 0.18, 4: 0.16}
    """Share of the most frequent n-gram, by n (characters)."""
    max_repeated_ngrams: dict[PositiveInt, NonNegativeFloat] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    """Share of the distinct n-grams that stand more than once, by n."""
    min_full_stops: NonNegativeFloat = 0.01
    """Full stops a character: one in a hundred."""
    min_particle_ratio: NonNegativeFloat = 0.06
    """は が を に で と の も へ, of Japanese characters; ours, where HojiChar counts nouns with a dictionary."""
    adverts: WordLimit | None = WordLimit(words=Path("advert_ja.txt"), max_distinct=5, max_per_thousand=4)
    """Words of advertisements; null: not looked for."""
    board: WordLimit | None = WordLimit(words=Path("board_ja.txt"), max_distinct=2, max_per_thousand=3)
    """Words of message boards; null: not looked for."""
    ng_words: WordLimit | None = WordLimit(words=Path("ng_ja.txt"), max_distinct=2, max_per_thousand=2)
    """Words of what is not to be learned; null: not looked for."""

    def files(self) -> list[Path]:
        return [WORDS / limit.words for limit in self._limits().values()]

    def _limits(self) -> dict[str, WordLimit]:
        limits = {"adverts": self.adverts, "board": self.board, "ng_words": self.ng_words}
        return {reason: limit for reason, limit in limits.items() if limit is not None}

    def start(self) -> Judge:
        used = self._limits()
        finder = _Finder({reason: _words(limit.words) for reason, limit in used.items()})
        return lambda document: first_broken(self._rules(document.text, used, finder))

    def _rules(self, text: str, limits: dict[str, WordLimit], finder: _Finder) -> Iterator[Rule]:
        yield "too_short", len(text), self.min_characters, NO_LIMIT
        characters = code_points(text)
        yield from self._scripts(characters)

        sentences = SENTENCE.findall(text)
        lengths = list(map(len, sentences))
        yield "sentence_length", sum(lengths) / len(sentences), self.min_mean_sentence, self.max_mean_sentence
        yield "longest_sentence", max(lengths), 0, self.max_sentence
        # Blanks at the end matter only to sentences that a line's end cuts off.
        ellipses = sum(sentence.endswith(("・", "…", " ", "　")) and sentence.rstrip().endswith(("・", "…")) for sentence in sentences)
        yield "ellipsis", ellipses / len(sentences), 0, self.max_ellipsis_ratio
        for reason, pieces in ("repeated_lines", [line for line in text.split("\n") if line]), ("repeated_sentences", sentences):
            count, length = duplicates(pieces)
            yield reason, count / len(pieces), 0, self.max_repeated_lines
            yield reason, length / sum(map(len, pieces)), 0, self.max_repeated_characters

        for reason, words in finder.find(text, characters).items():
            if len(set(words)) > limits[reason].max_distinct:
                yield reason, len(words) * 1000 / len(text), 0, limits[reason].max_per_thousand
        yield from self._ngrams(characters)

    def _scripts(self, characters: NDArray[np.uint16]) -> Iterator[Rule]:
        classes = _classes().take(characters)
        count = [int(np.count_nonzero(classes == kind)) for kind in range(7)]
        hiragana = count[HIRAGANA] + count[PARTICLE]
        letters = hiragana + count[KATAKANA] + count[KANJI]
        japanese = letters + count[COMMA] + count[FULL_STOP]
        yield "japanese_ratio", japanese / len(characters), self.min_japanese_ratio, NO_LIMIT
        yield "too_short", japanese, self.min_characters, NO_LIMIT
        yield "hiragana_ratio", hiragana / japanese, self.min_hiragana_ratio, NO_LIMIT
        yield "katakana_ratio", count[KATAKANA] / japanese, 0, self.max_katakana_ratio
        yield "sentence_ends", count[FULL_STOP] / len(characters), self.min_full_stops, NO_LIMIT
        yield "nouns", count[PARTICLE] / japanese, self.min_particle_ratio, NO_LIMIT

    def _ngrams(self, characters: NDArray[np.uint16]) -> Iterator[Rule]:
        """Share of the most frequent n-gram, then share of the n-grams that repeat."""
        length, limits = len(characters), self.max_top_ngrams
        if limits:
            # No n-gram is more frequent than its characters, and no character than its low byte.
            if np.bincount(characters.view(np.uint8)[::2]).max() > min(limits.values()) * (length - max(limits)):
                for n, positions, starts in repeated_ngrams(characters, range(min(limits), max(limits) + 1)):
                    most = int(np.diff(starts, append=len(positions)).max(initial=1))
                    yield "repeated_ngrams", most / max(length - n + 1, 1), 0, limits.get(n, NO_LIMIT)
        if limits := self.max_repeated_ngrams:
            for n, positions, starts in repeated_ngrams(characters, range(min(limits), max(limits) + 1)):
                distinct = length - n + 1 - len(positions) + len(starts)
                yield "repeated_ngrams", len(starts) / max(distinct, 1), 0, limits.get(n, NO_LIMIT)
                # Longer ones repeat at these places only, at least at two each, and no fewer of them are distinct but for the text's end.
                if len(positions) / 2 <= min(limits.values()) * (distinct - max(limits) + n):
                    return


@cache
def _classes() -> NDArray[np.uint8]:
    """The class of each character; kanji outside the basic plane are OTHER."""
    classes = np.full(1 << 16, OTHER, np.uint8)
    classes[0x3041:0x3097] = HIRAGANA
    classes[0x30A1:0x30FB] = KATAKANA
    classes[0x3400:0xA000] = classes[0xF900:0xFB00] = KANJI
    for characters, kind in ("々〇〻", KANJI), ("はがをにでとのもへ", PARTICLE), ("、，", COMMA), ("。．！？", FULL_STOP):
        classes[[ord(character) for character in characters]] = kind
    return classes


def _words(words: Path) -> list[str]:
    found = [line.strip() for line in read_texts(WORDS / words) if line.strip() and not line.startswith("#")]
    for word in found:
        if len(word) == 1:
            raise UserError(f"words {words}: {word!r} is one character: give words of two or more, a character alone says little")
    return found
