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
HALF_WIDTH_KATAKANA = re.compile("[\uff61-\uff9f]+")
BLANK_LINES = re.compile("\n{3,}")


class Normalise(Step):
    """Rewrites each text; drops none.

    NFC keeps what the writer saw; NFKC also turns full-width ASCII, ligatures and circled digits into plain ones. Half-width katakana
    become full-width in both, because they are the same letters in the encoding of old terminals.
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
            text = HALF_WIDTH_KATAKANA.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text).replace("\xa0", " ")
            text = unicodedata.normalize(self.form, text)
        text = "\n".join(map(str.rstrip, text.split("\n")))
        return BLANK_LINES.sub("\n\n", text).strip("\n")
