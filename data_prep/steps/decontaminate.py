"""Documents that hold a piece of an evaluation set are dropped: a model that has read the questions is not measured by them."""

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from data_prep.steps.ngrams import letters, ngram_hashes
from data_prep.steps.step import Judge, Step, texts_of
from mujina.files import read_rows
from mujina.user_input import UserError

FEWEST = 10  # letters: shorter texts of a set are answers such as "Paris", which say nothing
CJK = 0x2E80  # here the scripts begin that say in one character what others say in two or more


class Decontaminate(Step):
    """Drops documents that share a run of `num_characters` with a text of an evaluation set.

    A shorter text of a set counts where it is the whole of a document or of a dialogue's turn.
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
        runs = {n: _Runs() for n in (self.num_characters, (self.num_characters + 1) // 2)}
        whole: dict[bytes, str] = {}
        for path in self.files():
            name, texts = path.name.split(".")[0], [letters(text) for text in self._texts(path)]
            if not any(len(codes) >= FEWEST for codes in texts):
                fields = f" in the fields {', '.join(self.fields)}" if self.fields else ""
                raise UserError(f"sets: {path}: holds no text of {FEWEST} letters or more{fields}: check the file and `fields`")
            for codes in texts:
                n = (self.num_characters + 1) // 2 if np.count_nonzero(codes >= CJK) * 2 > len(codes) else self.num_characters
                if len(codes) >= n:
                    runs[n].add(name, codes, ngram_hashes(codes, n))
                elif len(codes) >= FEWEST:
                    whole.setdefault(codes.tobytes(), name)
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

    def _texts(self, path: Path) -> list[str]:
        if path.suffix == ".txt":
            try:
                return path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"sets: {path}: cannot be read as UTF-8 ({error}): convert the file") from None
        rows = (row for _, row in read_rows(path))
        return [text for row in rows for key, value in row.items() if self.fields is None or key in self.fields for text in _strings(value)]


class _Runs:
    """The runs of n characters of all sets."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._codes: list[NDArray[np.uint32]] = []
        self._hashes: list[NDArray[np.uint64]] = []

    def add(self, name: str, codes: NDArray[np.uint32], hashes: NDArray[np.uint64]) -> None:
        self.names.append(name)
        self._codes.append(codes)
        self._hashes.append(hashes)

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
                offset = place - int(starts[text])
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
