"""Documents that are there twice, and the lines that a site puts on all of its pages."""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from datatrove.data import Document
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveInt

from data_prep.steps.records import Records, group_starts, id_file, id_of, number_of, read_range, record_file, slices
from data_prep.steps.step import CorpusStep, Judge, texts_of

PARAGRAPH = re.compile(r"\n\s*\n")
# Lines that documents share because they are written so, not because a site puts them there: markup, code, and rules without a letter.
MARKUP = re.compile(
    r"(?: {4}|\t)\s*(?![-*+•・●]\s?)\S|\s*(?:\\|%|</?[a-zA-Z!?]|[{}\])]|```|>>> |\$ |#!|//|/\*|\*/|@\w+\{"
    r"|#\s*(?:include|define|undef|if|ifdef|ifndef|else|endif|pragma)\b|package\s+\w+\s*\Z|import\s|from\s+\S+\s+import\s"
    r"|#{1,6}\s|=+\s.*\s=+\s*\Z|\|.*\|\s*\Z|\$\$|[\W_]*\Z|(?:def|class|if|else|for|while)\b.*:\s*\Z)|.*[{};]\s*\Z",
    re.DOTALL,
)
ENDS, CLOSING = "。．.！!？?…、，,", "」』）)\"'”’"
SENTENCE_WITHIN = re.compile(r"[.!?…]\s+\S|[。．！？]")
IN_BRACKETS = re.compile(r"[（〔][^（）〔〕]*[）〕]")  # who signed, what happened in the room
COPYRIGHT = re.compile(r"©|\(c\)\s*\d|copyright|rights reserved|無断転載|転載を禁", re.IGNORECASE)
NOTICE = re.compile(rf"{COPYRIGHT.pattern}|\(c\)|転載|cookie|クッキー|javascript", re.IGNORECASE)
BLOCK = 3  # lines of a site inside of a text, such as a menu's


class ExactDuplicates(CorpusStep):
    """Keeps the first of the documents whose texts are equal up to white space, told by 128 bits of XXH3."""

    step: Literal["exact_duplicates"] = "exact_duplicates"

    def mark(self, documents: Iterable[Document], folder: Path, rank: int) -> Iterator[Document]:
        with record_file(folder / f"marks-{rank:05}", 3) as marks, id_file(folder, rank) as ids:
            for position, document in enumerate(documents):
                text = "\0".join(" ".join(text.split()) for text in texts_of(document))
                high, low = divmod(xxhash.xxh3_128_intdigest(text.encode("utf-8", "surrogatepass")), 1 << 64)
                marks.add(np.array([[high], [low], [number_of(rank, position)]], np.uint64))
                ids.add(document.id)
                yield document

    def find(self, folder: Path, num_ranks: int) -> list[tuple[int, Callable[[int], None]]]:
        return [(num_ranks, partial(_find_copies, folder, num_ranks))]

    def judge(self, folder: Path, rank: int) -> Judge:
        copies, originals = read_range(sorted(folder.glob("copies-*[0-9]")), 2, number_of(rank, 0), number_of(rank + 1, 0) - 1)
        positions = count()

        def judge(document: Document) -> str | None:
            number = np.uint64(number_of(rank, next(positions)))
            place = np.searchsorted(copies, number)
            if place < len(copies) and copies[place] == number:
                return f"exact_duplicate: of {id_of(folder, int(originals[place]))}"
            return None

        return judge


def _find_copies(folder: Path, num_ranks: int, part: int) -> None:
    """Writes (document, the first of the same text) for the hashes of one range."""
    with record_file(folder / f"copies-{part:05}", 2) as copies:
        for marks_CN in slices(sorted(folder.glob("marks-*[0-9]")), 3, part, num_ranks):
            high, low, numbers = marks_CN[:, np.lexsort((marks_CN[1], marks_CN[0]))]  # stable: the first document stays first
            same = np.zeros(len(high), bool)
            same[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
            first = np.maximum.accumulate(np.where(same, 0, np.arange(len(same))))
            copies.add(np.stack([numbers[same], numbers[first[same]]]))


class RepeatedLines(CorpusStep):
    """Takes out the lines, or paragraphs, that a site puts on its pages: they stand in more than `max_documents` documents, and in this one
    at its beginning or end, or three or more together, or are about copyright; the first of those documents keeps them.

    A single sentence stays, unless it lies outside of such a line at the beginning or end; so does markup, such as LaTeX's. Lines count
    as equal up to white space. Code and dialogues pass as they are: what is repeated there, an import or a system turn, is meant.
    """

    step: Literal["repeated_lines"] = "repeated_lines"
    unit: Literal["line", "paragraph"] = "line"
    """What is compared."""
    max_documents: PositiveInt = 10
    """Documents that may hold the same one."""
    min_characters: PositiveInt = 10
    """Shorter ones stay: closing brackets, dates, names of speakers."""
    min_remaining: NonNegativeFloat = Field(0.2, le=1)
    """Share of the characters below which the document is dropped."""

    def mark(self, documents: Iterable[Document], folder: Path, rank: int) -> Iterator[Document]:
        with record_file(folder / f"lines-{rank:05}", 3, _merged) as lines:
            for position, document in enumerate(documents):
                if _is_prose(document):
                    hashes = np.unique(self._hashes(self._split(document.text)))
                    hashes = hashes[hashes != 0]
                    lines.add(np.stack([hashes, np.full_like(hashes, number_of(rank, position)), np.ones_like(hashes)]))
                yield document

    def find(self, folder: Path, num_ranks: int) -> list[tuple[int, Callable[[int], None]]]:
        return [(num_ranks, partial(_find_repeated, folder, self.max_documents, num_ranks))]

    def judge(self, folder: Path, rank: int) -> Judge:
        repeated, first = _repeated_of(folder, rank)
        positions = count()

        def judge(document: Document) -> str | None:
            number = np.uint64(number_of(rank, next(positions)))
            if not _is_prose(document) or not len(repeated):
                return None
            lines = self._split(document.text)
            hashes = self._hashes(lines)
            place = np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)
            is_repeated = repeated[place] == hashes
            out = _of_the_site(lines, is_repeated.tolist(), (hashes == 0).tolist()) & (first[place] != number)
            if not out.any():
                return None
            kept = [line for line, gone in zip(lines, out.tolist(), strict=True) if not gone]
            share = sum(map(len, kept)) / sum(map(len, lines))
            document.text = ("\n" if self.unit == "line" else "\n\n").join(kept).strip("\n")
            return f"only_repeated_lines: {share:.2f}" if share < self.min_remaining or not document.text.strip() else None

        return judge

    def _split(self, text: str) -> list[str]:
        return text.split("\n") if self.unit == "line" else PARAGRAPH.split(text)

    def _hashes(self, lines: list[str]) -> Records:
        """One hash for each line, 0 for those that are never touched."""
        plain = (" ".join(line.split()) for line in lines)
        least = self.min_characters
        hashes = [xxhash.xxh3_64_intdigest(line.encode("utf-8", "surrogatepass")) if len(line) >= least else 0 for line in plain]
        return np.array(hashes, np.uint64)


def _is_prose(document: Document) -> bool:
    return "messages" not in document.metadata and document.metadata.get("kind") != "code"


def _is_sentence(line: str) -> bool:
    """Whether it is one sentence, the beginning of a letter, or a remark in brackets."""
    if IN_BRACKETS.fullmatch(line.strip()):
        return True
    line = line.strip().rstrip(CLOSING)
    return line.endswith(tuple(ENDS)) and not SENTENCE_WITHIN.search(line.rstrip(ENDS))


def _of_the_site(lines: list[str], repeated: list[bool], short: list[bool]) -> NDArray[np.bool_]:
    """Which of the repeated lines are a site's, by where they stand. Short ones, which are never touched, do not part a menu."""
    is_markup = [again and MARKUP.match(line) is not None for line, again in zip(lines, repeated, strict=True)]
    # Alone a line of the site; a sentence is one beside such a line only.
    is_sure = [
        again and not markup and (not _is_sentence(line) or NOTICE.search(line) is not None)
        for line, again, markup in zip(lines, repeated, is_markup, strict=True)
    ]
    out = np.zeros(len(lines), bool)
    for numbers in range(len(lines)), range(len(lines) - 1, -1, -1):  # from the beginning, and from the end
        outside = list(takewhile(lambda n: repeated[n] or not lines[n].strip(), numbers))
        innermost = max((place for place, n in enumerate(outside) if is_sure[n]), default=-1)
        for n in outside[: innermost + 1]:
            out[n] = repeated[n] and not is_markup[n]
    block: list[int] = []
    for n in range(len(lines) + 1):
        if n < len(lines) and is_sure[n] and COPYRIGHT.search(lines[n]):  # whatever comes behind it: a counter, a date
            out[n] = True
        if n < len(lines) and is_sure[n]:
            block.append(n)
        elif n == len(lines) or not short[n]:
            if len(block) >= BLOCK:
                out[block] = True
            block = []
    return out


def _merged(lines_CN: Records) -> Records:
    """Joins sorted records (hash, first document, number of documents): a line that stands everywhere is one record a run."""
    starts = group_starts(lines_CN[0])
    return np.stack([*lines_CN[:2, starts], np.add.reduceat(lines_CN[2], starts)]) if len(starts) else lines_CN


def _find_repeated(folder: Path, max_documents: int, num_ranks: int, part: int) -> None:
    """Writes (hash, first document) of the repeated lines of one range of hashes."""
    with record_file(folder / f"repeated-{part:05}", 2) as repeated:
        for lines_CN in slices(sorted(folder.glob("lines-*[0-9]")), 3, part, num_ranks):
            lines_CN = _merged(lines_CN)
            repeated.add(lines_CN[:2, lines_CN[2] > max_documents])


def _repeated_of(folder: Path, rank: int) -> Records:
    """The repeated lines that stand in the documents of one rank, (hash, first document), sorted by hash."""
    repeated = sorted(folder.glob("repeated-*[0-9]"))
    found = [np.empty((2, 0), np.uint64)]
    for lines_CN in slices([folder / f"lines-{rank:05}"], 3, 0, 1):
        if lines_CN.shape[1]:
            here_CN = read_range(repeated, 2, int(lines_CN[0, 0]), int(lines_CN[0, -1]))
            found.append(here_CN[:, np.isin(here_CN[0], lines_CN[0])])
    return np.concatenate(found, axis=1)
