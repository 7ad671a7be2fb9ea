"""Whether an English page is prose worth reading: the rules of Gopher, C4 and FineWeb, in FineWeb's order and with datatrove's names.

The arithmetic is datatrove's. Its filters cut words with a tokenizer of the language, which is where their time goes; here a word is
what a regular expression finds (a run of signs is one too), and n-grams are compared in numpy.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.c4_filters import CITATION_REGEX, ELLIPSIS, END_PUNCTUATION, POLICY_SUBSTRINGS
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from data_prep.steps.measure import NO_LIMIT, Rule, duplicates, first_broken, repeated_ngrams
from data_prep.steps.step import Judge, Step

WORD = re.compile(r"\w+(?:['’.-]\w+)*|[^\w\s]+")
SENTENCE = re.compile(r"\S(?:.*?[.!?][\"'”’)\]]*(?=\s)|.*)")
PUNCTUATION = "".join(sorted(PUNCTUATION_SET))
STOP_CHARACTERS = tuple(TERMINAL_PUNCTUATION)


class EnglishQuality(Step):
    """Keeps English prose by three sets of rules.

    Gopher: Rae et al. 2021, arXiv:2112.11446, section A1.1; C4: Raffel et al. 2020, arXiv:1910.10683, section 2.2; FineWeb:
    Penedo et al. 2024, arXiv:2406.17557. Lengths are in characters, ratios of words are of words and signs.
    """

    step: Literal["english_quality"] = "english_quality"
    # Gopher: repetition (table A1)
    max_dup_para_frac: NonNegativeFloat = 0.3
    """Paragraphs that stood before, of all."""
    max_dup_para_char_frac: NonNegativeFloat = 0.2
    """Characters in paragraphs that stood before, of all."""
    max_dup_line_frac: NonNegativeFloat = 0.3
    """Lines that stood before, of those that are not blank."""
    max_dup_line_char_frac: NonNegativeFloat = 0.2
    """Characters in lines that stood before, of all."""
    max_top_ngrams: dict[PositiveInt, NonNegativeFloat] = {2: 0.20, 3: 0.18, 4: 0.16}
    """Share of the characters in the most frequent n-gram, by n (words)."""
    max_dup_ngrams: dict[PositiveInt, NonNegativeFloat] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    """Share of the characters in n-grams that stand more than once, by n (words)."""
    # Gopher: quality
    min_words: NonNegativeInt = 50
    """The fewest words of a text."""
    max_words: PositiveInt = 100_000
    """The most words of a text."""
    min_mean_word_length: NonNegativeFloat = 3
    """Characters of a word on average, at least."""
    max_mean_word_length: NonNegativeFloat = 10
    """Characters of a word on average, at most."""
    max_symbol_ratio: NonNegativeFloat = 0.1
    """Hashes, and ellipses, by words."""
    max_bullet_lines: NonNegativeFloat = 0.9
    """Share of the lines that begin with a bullet."""
    max_ellipsis_lines: NonNegativeFloat = 0.3
    """Share of the lines that end in an ellipsis."""
    min_alphabetic_words: NonNegativeFloat = 0.8
    """Share of the words that have a letter."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """Words that English can hardly do without."""
    min_stop_words: NonNegativeInt = 2
    """How many different ones of `stop_words` a text must have."""
    # C4
    drop_lines: bool = True
    """C4: lines are taken out (not of a dialogue), and a page with too little left is dropped."""
    terminal_punctuation: bool = False
    """C4: only lines that end as a sentence does stay. FineWeb left this rule out."""
    min_words_per_line: NonNegativeInt = 3
    """C4: shorter lines are taken out."""
    max_word_length: PositiveInt = 1000
    """C4: lines with a longer word (characters) are taken out."""
    min_sentences: NonNegativeInt = 5
    """C4: a text with fewer is dropped."""
    curly_bracket: bool = True
    """C4: pages with one are dropped, for they are taken for code."""
    # FineWeb
    min_line_punct_ratio: NonNegativeFloat = 0.12
    """FineWeb: share of the lines that end in punctuation."""
    max_short_lines: NonNegativeFloat = 0.67
    """FineWeb: share of the lines of at most 30 characters."""
    max_char_dup_ratio: NonNegativeFloat = 0.01
    """FineWeb: share of the characters in lines that stood before."""
    max_newline_ratio: NonNegativeFloat = 0.3
    """FineWeb: line breaks by words."""

    def start(self) -> Judge:
        return self._judge

    def _judge(self, document: Document) -> str | None:
        text = document.text
        if not text.strip():
            return "empty"
        words = WORD.findall(text)
        if reason := first_broken(self._repetition(text, words)) or first_broken(self._words(text, words)):
            return reason
        if self.drop_lines and "messages" not in document.metadata:
            document.text, reason = self._without_bad_lines(text)
            if reason:
                return reason
        return first_broken(self._lines(document.text, len(words) if document.text == text else len(WORD.findall(document.text))))

    def _repetition(self, text: str, words: list[str]) -> Iterator[Rule]:
        paragraphs = [inner for part in text.strip().split("\n\n") if (inner := part.strip("\n"))]
        count, characters = duplicates(paragraphs)
        yield "dup_para_frac", count / len(paragraphs), 0, self.max_dup_para_frac
        yield "dup_para_char_frac", characters / len(text), 0, self.max_dup_para_char_frac
        lines = [line for line in text.split("\n") if line]
        count, characters = duplicates(lines)
        yield "dup_line_frac", count / len(lines), 0, self.max_dup_line_frac
        yield "dup_line_char_frac", characters / len(text), 0, self.max_dup_line_char_frac

        symbols = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
        ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        if limits := self.max_top_ngrams:
            for n, positions, starts in repeated_ngrams(symbols, range(min(limits), min(max(limits), len(words)) + 1)):
                counts = np.diff(starts, append=len(positions))
                # Of the most frequent the first in the text; the first of all when none is there twice.
                first, count = (min(positions[starts][counts == counts.max()]), counts.max()) if len(counts) else (0, 1)
                characters = ends[first + n - 1] - (ends[first - 1] if first else 0) + n - 1
                yield f"top_{n}_gram", float(characters * count / len(text)), 0, limits.get(n, NO_LIMIT)
        if limits := self.max_dup_ngrams:
            for n, positions, starts in repeated_ngrams(symbols, range(min(limits), max(limits) + 1)):
                yield f"duplicated_{n}_n_grams", _characters_again(n, positions, starts, ends) / len(text), 0, limits.get(n, NO_LIMIT)

    def _words(self, text: str, words: list[str]) -> Iterator[Rule]:
        counts = Counter(words)
        spoken = [(word, count) for word, count in counts.items() if word.strip(PUNCTUATION)]
        num_spoken = sum(count for _, count in spoken)
        yield "gopher_short_doc", num_spoken, self.min_words, NO_LIMIT
        yield "gopher_long_doc", num_spoken, 0, self.max_words
        mean = sum(len(word) * count for word, count in spoken) / max(num_spoken, 1)
        yield "gopher_below_avg_threshold", mean, self.min_mean_word_length, NO_LIMIT
        yield "gopher_above_avg_threshold", mean, 0, self.max_mean_word_length
        yield "gopher_too_many_hashes", text.count("#") / len(words), 0, self.max_symbol_ratio
        yield "gopher_too_many_ellipsis", (text.count("...") + text.count("…")) / len(words), 0, self.max_symbol_ratio
        lines = text.splitlines()
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        yield "gopher_too_many_bullets", bullets / len(lines), 0, self.max_bullet_lines
        ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        yield "gopher_too_many_end_ellipsis", ellipses / len(lines), 0, self.max_ellipsis_lines
        alphabetic = sum(count for word, count in spoken if word.isalpha() or any(map(str.isalpha, word)))
        yield "gopher_below_alpha_threshold", alphabetic / len(words), self.min_alphabetic_words, NO_LIMIT
        yield "gopher_enough_stop_words", sum(word in counts for word in self.stop_words), self.min_stop_words, NO_LIMIT

    def _without_bad_lines(self, text: str) -> tuple[str, str | None]:
        """The text without the lines that C4 leaves out, and why the page is to be dropped."""
        kept, num_sentences = [], 0
        for line in map(str.strip, text.splitlines()):
            words = line.split()
            if len(line) > self.max_word_length and max(map(len, words)) > self.max_word_length:
                continue
            if "[" in line:
                line = CITATION_REGEX.sub("", line)
            if self.terminal_punctuation and (not line.endswith(END_PUNCTUATION) or line.endswith(ELLIPSIS)):
                continue
            if len(words) < self.min_words_per_line:
                continue
            lowered = line.lower()
            if "lorem ipsum" in lowered:
                return text, "lorem_ipsum"
            if "javascript" in lowered:
                continue
            if self.curly_bracket and "{" in line:
                return text, "curly_bracket"
            if any(phrase in lowered for phrase in POLICY_SUBSTRINGS):
                continue
            if num_sentences < self.min_sentences:
                num_sentences += len(SENTENCE.findall(line))
            kept.append(line)
        few = num_sentences < self.min_sentences
        return (text, f"too_few_sentences: {num_sentences}") if few else ("\n".join(kept).strip(), None)

    def _lines(self, text: str, num_words: int) -> Iterator[Rule]:
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            yield "empty", 0, 1, NO_LIMIT
        yield "line_punct_ratio", sum(line.endswith(STOP_CHARACTERS) for line in lines) / len(lines), self.min_line_punct_ratio, NO_LIMIT
        yield "short_line_ratio", sum(len(line) <= 30 for line in lines) / len(lines), 0, self.max_short_lines
        yield "char_dup_ratio", duplicates(lines)[1] / len(text.replace("\n", "")), 0, self.max_char_dup_ratio
        yield "list_ratio", text.count("\n") / num_words, 0, self.max_newline_ratio


def _characters_again(n: int, positions: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> int:
    """The characters in n-grams that stood before, read from the left: behind one that is counted the reading goes on."""
    ngrams = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(positions)))
    order = positions.argsort()
    before, characters, after_last = set(), 0, 0
    for place, ngram in zip(positions[order].tolist(), ngrams[order].tolist(), strict=True):
        if place < after_last:
            continue
        if ngram in before:
            characters += int(ends[place + n - 1] - ends[place - 1])  # one that stood before is not the first: place > 0
            after_last = place + n
        before.add(ngram)
    return characters
