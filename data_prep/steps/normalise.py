"""One spelling for one text: Unicode form, line ends, invisible characters and white space. Broken encodings are not guessed at."""

import re
import unicodedata
from typing import Literal

from data_prep.steps.step import Judge, Step, rewrite

LINE_END = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
# Controls, soft hyphens, zero-width spaces, joiners of words, marks of direction, byte order marks, objects cut out, halves of pairs.
# The zero-width joiner and non-joiner stay: emoji and several scripts are written with them.
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc\ud800-\udfff]+")
ASCII_CONTROLS = bytes({*range(0x20), 0x7F} - {*b"\t\n"})
HALF_WIDTH = re.compile("[\uff61-\uff9f]")
# A half-width mark after a kana that has one such letter belongs to it. Any other is written for its looks, as in (ﾟ∀ﾟ), where a combining
# mark would sit on the bracket.
VOICED, SEMI_VOICED = (
    "".join(
        chr(code)
        for code in (*range(0x3041, 0x3100), *range(0xFF66, 0xFF9E))
        if len(unicodedata.normalize("NFC", unicodedata.normalize("NFKC", chr(code)) + mark)) == 1
    )
    for mark in "\u3099\u309a"
)
HALF_WIDTH_KATAKANA = re.compile(f"(?:[\uff61-\uff9d]|(?<=[{VOICED}])\uff9e|(?<=[{SEMI_VOICED}])\uff9f)+")
# Marks that stand alone, such as ゛ and ´, are a space and a combining mark to NFKC.
ALONE = "".join(chr(code) for code in range(0x10000) if re.match(" .", unicodedata.normalize("NFKC", chr(code))))
NOT_ALONE = re.compile(f"[^\uff9e\uff9f{ALONE}]+")
BLANK_LINES = re.compile("\n{3,}")


class Normalise(Step):
    """Rewrites each text; drops none.

    NFC keeps what the writer saw, but for some CJK compatibility ideographs; NFKC also turns full-width ASCII, ligatures and circled digits
    into plain ones. Half-width katakana become full-width in both, because they are the same letters in the encoding of old terminals.
    """

    step: Literal["normalise"] = "normalise"
    form: Literal["NFC", "NFKC"] = "NFC"
    """Unicode normal form."""

    def start(self) -> Judge:
        return lambda document: rewrite(document, self.normalise)

    def normalise(self, text: str) -> str:
        if not text.isascii() or len(text.encode().translate(None, ASCII_CONTROLS)) < len(text):  # which most English texts pass by
            text = INVISIBLE.sub("", LINE_END.sub("\n", text))
        if not text.isascii():
            if HALF_WIDTH.search(text):
                text = HALF_WIDTH_KATAKANA.sub(_nfkc, text)
            if self.form == "NFKC":
                text = NOT_ALONE.sub(_nfkc, text)
            text = unicodedata.normalize("NFC", text.replace("\xa0", " "))
        text = "\n".join(map(str.rstrip, text.split("\n")))
        return BLANK_LINES.sub("\n\n", text).strip("\n")


def _nfkc(run: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", run[0])
