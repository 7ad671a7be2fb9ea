"""Documents that hold a piece of an evaluation set are dropped: a model that has read the questions is not measured by them."""

import glob
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from data_prep.steps.ngrams import letters, ngram_hashes
from data_prep.steps.step import Judge, Step, texts_of
from mujina.files import read_rows, read_texts
from mujina.user_input import UserError

FEWEST = 10  # letters: shorter texts of a set are answers such as "Paris", which say nothing
MOST_TOLD = 3  # texts of a set in the report
NO_RUNS = np.empty(0, np.uint64)
CJK = 0x2E80  # here the scripts begin that say in one character what others say in two or more


class Decontaminate(Step):
    """Drops documents that share a run of `num_characters` with a text of an evaluation set.

    A shorter text of a set counts where it is the whole of a document or of a dialogue's turn. What stands in many rows of a set, such as
    the header of its prompts, is no leak and does not count, nor does a run that is such a header by more than half; the report has it.
    Many are more than half of the rows, of the set or of all sets; where there are 20 or more, ten of them and one in a hundred.
    """

    step: Literal["decontaminate"] = "decontaminate"
    sets: list[str] = Field(min_length=1)
    """Files or patterns: .jsonl, .jsonl.gz, .jsonl.zst, where every string of a row counts, or .txt, where every line does."""
    fields: list[str] | None = None
    """The keys of a row whose strings count; null: all."""
    num_characters: PositiveInt = 60
    """Letters, marks and digits (NFKC, lower case). Half as many do for a text that is mostly Chinese, Japanese or Korean, so 60 stands
    for the 13 words of GPT-3 (Brown et al. 2020, appendix C) and 30 for the same in Japanese.
    """

    def files(self) -> list[Path]:
        files: list[Path] = []
        for pattern in self.sets:
            paths = sorted(glob.glob(pattern, recursive=True))
            if not paths:
                raise UserError(f"sets: {pattern}: no such file: check the path, which starts at the folder where the command runs")
            files += map(Path, paths)
        return files

    def start(self) -> Judge:
        runs = {n: _Runs() for n in self._lengths()}
        whole: dict[bytes, str] = {}
        for one in self._sets():
            for text, is_shared in zip(one.texts, one.shared, strict=True):
                if len(text.hashes):
                    runs[text.n].add(one.name, text.codes, text.hashes, np.flatnonzero(_own(text, is_shared)))
                elif not is_shared.any():
                    whole.setdefault(text.codes.tobytes(), one.name)
        finders = [(n, found.finder()) for n, found in runs.items() if found.names]

        def judge(document: Document) -> str | None:
            for text in texts_of(document):
                codes = letters(text)
                name = whole.get(codes.tobytes())
                for n, find in finders:
                    if name is None and len(codes) >= n:
                        name = find(codes, ngram_hashes(codes, n), n)
                if name is not None:
                    return f"contaminated: {name}"
            return None

        return judge

    def notes(self) -> list[str]:
        """What counts as no leak because many rows of a set have it."""
        return [
            f"no leak: {number:,} of the {one.num_rows:,} rows of {one.name} have “{text}”"
            for one in self._sets()
            for text, number in one.shared_texts().most_common(MOST_TOLD)
        ]

    def _lengths(self) -> tuple[int, int]:
        """Of a run of letters, and of one in a script that says more with each."""
        return self.num_characters, (self.num_characters + 1) // 2

    def _sets(self) -> list["_Set"]:
        long, short = self._lengths()
        sets, numbers = list[_Set](), dict[tuple[bytes, ...], int]()  # of rows: equal ones are one
        for path in self.files():
            rows = {tuple(letters(text).tobytes() for text in row) for row in self._rows(path)}
            texts = list[_Text]()
            for row in sorted(rows):
                number = numbers.setdefault(row, len(numbers))
                for codes in (np.frombuffer(text, np.uint32) for text in row):
                    n = short if np.count_nonzero(codes >= CJK) * 2 > len(codes) else long
                    if len(codes) >= min(n, FEWEST):
                        texts.append(_Text(number, n, codes, ngram_hashes(codes, n) if len(codes) >= n else NO_RUNS))
            if not any(len(text.codes) >= FEWEST for text in texts):
                fields = f" in the fields {', '.join(self.fields)}" if self.fields else ""
                raise UserError(f"sets: {path}: holds no text of {FEWEST} letters or more{fields}: check the file and `fields`")
            sets.append(_Set(path.name.split(".")[0], len(rows), texts, []))
        _mark_shared(sets, len(numbers))
        return sets

    def _rows(self, path: Path) -> Iterator[list[str]]:
        """The strings of each row."""
        if path.suffix == ".txt":
            yield from ([line] for line in read_texts(path))
            return
        for _, row in read_rows(path):
            yield [text for key, value in row.items() if self.fields is None or key in self.fields for text in _strings(value)]


class _Text(NamedTuple):
    """A text of a set: its row, the length of its runs, its code points, and the hash of each run (none where it is shorter)."""

    row: int
    n: int
    codes: NDArray[np.uint32]
    hashes: NDArray[np.uint64]


@dataclass(frozen=True)
class _Set:
    """The texts of the rows of a set, equal rows once, and which letters of each are shared: they stand in a part of a run, or in a whole
    short text, that many rows have."""

    name: str
    num_rows: int
    texts: list[_Text]
    shared: list[NDArray[np.bool_]]

    def shared_texts(self) -> Counter[str]:
        """How the stretches of letters begin that stand in many rows, and in how many they do."""
        found = set[tuple[str, int]]()
        for text, shared in zip(self.texts, self.shared, strict=True):
            edges = np.flatnonzero(np.diff(np.concatenate([[False], shared, [False]])))
            found |= {("".join(map(chr, text.codes[a : min(b, a + text.n)].tolist())), text.row) for a, b in edges.reshape(-1, 2).tolist()}
        return Counter(stretch for stretch, _ in found)


def _own(text: _Text, shared: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which runs of a text count."""
    ends = np.cumsum(np.append(0, shared))
    num_shared = ends[text.n :] - ends[: -text.n]
    keep = 2 * num_shared <= text.n
    # of a text with little of its own the runs that have most of that
    return keep if keep.any() else (num_shared == num_shared.min()) & (num_shared <= text.n - FEWEST)


def _part(n: int) -> int:
    """Letters of a part of a run of n: what is shorter is no header but a phrase."""
    return min(n, max(FEWEST, (n + 1) // 2))


def _mark_shared(sets: list[_Set], num_rows: int) -> None:
    """Fills in `shared`. What many rows of one set have, or of all sets together, which have so many rows, is shared in each."""
    parts, whole = defaultdict[int, set[int]](set), set[bytes]()
    for num, texts in [(one.num_rows, one.texts) for one in sets] + [(num_rows, [text for one in sets for text in one.texts])]:
        many = max(2, num // 2 if num < 20 else max(9, num // 100))
        for n in {text.n for text in texts}:
            of_n = [text for text in texts if text.n == n and len(text.hashes)]
            hashes = [ngram_hashes(text.codes, _part(n)) for text in of_n]
            rows = [np.full(len(found), text.row) for found, text in zip(hashes, of_n, strict=True)]
            parts[n].update(_in_many(np.concatenate([NO_RUNS, *hashes]), np.concatenate([NO_RUNS, *rows]), many).tolist())
        short = Counter(codes for _, codes in {(text.row, text.codes.tobytes()) for text in texts if not len(text.hashes)})
        whole.update(codes for codes, number in short.items() if number > many)
    common = {n: np.array(sorted(found), np.uint64) for n, found in parts.items()}
    for one in sets:
        for text in one.texts:
            if not len(text.hashes):
                one.shared.append(np.full(len(text.codes), text.codes.tobytes() in whole))
                continue
            edges = np.zeros(len(text.codes) + 1, np.int64)
            starts = np.flatnonzero(np.isin(ngram_hashes(text.codes, _part(text.n)), common[text.n]))
            np.add.at(edges, starts, 1)
            np.add.at(edges, starts + _part(text.n), -1)
            one.shared.append(np.cumsum(edges)[:-1] > 0)


def _in_many(hashes: NDArray[np.uint64], rows: NDArray[Any], many: int) -> NDArray[np.uint64]:
    """The hashes that stand in more than so many rows."""
    order = np.lexsort((rows, hashes))
    hashes, rows = hashes[order], rows[order]
    is_new = np.append(np.ones(min(len(hashes), 1), bool), (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1]))
    found, counts = np.unique(hashes[is_new], return_counts=True)
    return found[counts > many]


class _Runs:
    """The runs of n characters of all sets."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._codes: list[NDArray[np.uint32]] = []
        self._hashes: list[NDArray[np.uint64]] = []
        self._offsets: list[NDArray[np.int64]] = []

    def add(self, name: str, codes: NDArray[np.uint32], hashes: NDArray[np.uint64], offsets: NDArray[np.int64]) -> None:
        """The runs of a text that begin at these offsets."""
        self.names.append(name)
        self._codes.append(codes)
        self._hashes.append(hashes[offsets])
        self._offsets.append(offsets)

    def finder(self) -> Callable[[NDArray[np.uint32], NDArray[np.uint64], int], str | None]:
        """A function (code points, hashes of their n-grams, n) that gives the name of the set with an equal run, or None."""
        hashes, places = np.unique(np.concatenate(self._hashes), return_index=True)
        starts = np.cumsum([0, *map(len, self._hashes)])
        bits = max(16, len(hashes).bit_length() + 4)  # so one run in sixteen or fewer that is not there passes the first look
        seen = np.zeros(1 << bits, bool)
        seen[hashes >> np.uint64(64 - bits)] = True

        def find(codes: NDArray[np.uint32], document: NDArray[np.uint64], n: int) -> str | None:
            hits = np.flatnonzero(seen[document >> np.uint64(64 - bits)])
            nearest = np.minimum(np.searchsorted(hashes, document[hits]), len(hashes) - 1)
            equal = hashes[nearest] == document[hits]
            for hit, place in zip(hits[equal].tolist(), places[nearest[equal]].tolist(), strict=True):
                text = int(np.searchsorted(starts, place, "right")) - 1
                offset = int(self._offsets[text][place - int(starts[text])])
                # Equal hashes are no proof.
                if np.array_equal(codes[hit : hit + n], self._codes[text][offset : offset + n]):
                    return self.names[text]
            return None

        return find


def _strings(value: object) -> list[str]:
    """All strings in a value of a row: choices are lists, turns are lists of objects."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inside for text in _strings(one)]
