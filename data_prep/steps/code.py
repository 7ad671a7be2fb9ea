"""Whether a file of source code was written by people to be read: not generated, not packed, not data."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, PositiveInt

from data_prep.steps.measure import NO_LIMIT, Rule, code_points, duplicates, first_broken
from data_prep.steps.step import Judge, Step

GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated (?:automatically|by|from)\b|this file (?:is|was) generated"
    r"|do not (?:edit|modify)(?: (?:this file|by hand|manually))|@generated\b",
    re.IGNORECASE,
)
# Text that encodes bytes. Quantifiers are possessive (++): a run is read once.
ENCODED = re.compile(
    r"(?<![A-Za-z0-9+/])(?:[A-Za-z0-9+/]{60,}+={0,2}\s?)++"  # base64, over its lines
    r"|(?:\b(?:0x)?[0-9A-Fa-f]{2}[hHuU]?(?:,\s{0,8}|[ \n])){16,}+"  # 0x1f, 0x8b, ... and hex dumps
    r"|(?:\\x[0-9A-Fa-f]{2}){16,}+|(?:\\u[0-9A-Fa-f]{4}){8,}+|(?:\\[0-7]{3}){16,}+"
)


class CodeQuality(Step):
    """Keeps code that people wrote and can read.

    The rules of codeparrot and StarCoder (Li et al. 2023, arXiv:2305.06161), data inside code after The Stack v2
    (Lozhkov et al. 2024, arXiv:2402.19173). Lengths are in characters; ratios are of all characters unless said otherwise.
    """

    step: Literal["code_quality"] = "code_quality"
    min_characters: PositiveInt = 100
    """Of the file."""
    max_line_length: PositiveInt = 1000
    """Characters of the longest line."""
    max_mean_line_length: NonNegativeFloat = 100
    """Characters of a line on average."""
    generated_lines: PositiveInt = 5
    """A note that a program wrote the file is looked for in so many first lines."""
    min_alphanumeric_ratio: NonNegativeFloat = 0.25
    """Letters and digits."""
    min_alphabetic_ratio: NonNegativeFloat = 0.5
    """Letters, of letters and digits; ours: tables of numbers fall short of it."""
    max_repeated_lines: NonNegativeFloat = 0.5
    """Characters in lines that stood before, of those in lines."""
    max_encoded_ratio: NonNegativeFloat = 0.5
    """Characters of base64, hex and escapes."""
    max_encoded_characters: PositiveInt = 8192
    """The longest such run."""

    def start(self) -> Judge:
        return lambda document: self._note(document.text) or first_broken(self._rules(document.text))

    def _note(self, text: str) -> str | None:
        head = text.lstrip()[:1000]
        if head.startswith("<?xml"):
            return "xml"
        found = GENERATED.search("\n".join(head.split("\n")[: self.generated_lines]))
        return f"generated: {found[0].lower()}" if found else None

    def _rules(self, text: str) -> Iterator[Rule]:
        yield "too_short", len(text), self.min_characters, NO_LIMIT
        lines = text.splitlines()
        lengths = list(map(len, lines))
        yield "line_length", max(lengths), 0, self.max_line_length
        yield "mean_line_length", sum(lengths) / len(lines), 0, self.max_mean_line_length

        characters = code_points(text)
        kinds = _kinds().take(characters)
        letters, digits = int(np.count_nonzero(kinds == 1)), int(np.count_nonzero(kinds == 2))
        yield "alphanumeric_ratio", (letters + digits) / len(text), self.min_alphanumeric_ratio, NO_LIMIT
        yield "alphabetic_ratio", letters / max(letters + digits, 1), self.min_alphabetic_ratio, NO_LIMIT
        yield "repeated_lines", duplicates(lines)[1] / max(sum(lengths), 1), 0, self.max_repeated_lines

        encoded = [found.end() - found.start() for found in ENCODED.finditer(text)]
        yield "encoded_ratio", sum(encoded) / len(text), 0, self.max_encoded_ratio
        yield "encoded_characters", max(encoded, default=0), 0, self.max_encoded_characters


@cache
def _kinds() -> NDArray[np.uint8]:
    """For each character of the basic plane: 1 a letter, 2 a digit, else 0."""
    return np.array([1 if chr(point).isalpha() else 2 if chr(point).isdigit() else 0 for point in range(1 << 16)], np.uint8)
