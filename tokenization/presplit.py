"""Japanese text cut into words by MeCab, so that no piece of a vocabulary is learnt across two words.

For training only: the text that a tokenizer encodes is never cut.
"""

import re
from collections.abc import Callable

from mujina.user_input import UserError

JAPANESE = re.compile(r"[\u3005-\u3007\u3040-\u30ff\u4e00-\u9fff]")  # 々〆〇, kana, kanji


def mecab() -> Callable[[str], list[str]]:
    """A function from text to its words; joined, they are the text again. Text without kana and kanji is one word.

    A space belongs to the word that it stands before, as in sentencepiece. The dictionary is unidic-lite.
    Raises UserError when MeCab is not installed.
    """
    try:
        import MeCab
        import unidic_lite
    except ImportError:
        raise UserError("presplit: mecab needs MeCab and its dictionary: pip install mecab-python3 unidic-lite") from None
    tagger = MeCab.Tagger(f'-r /dev/null -d "{unidic_lite.DICDIR}" -Owakati')

    def words(text: str) -> list[str]:
        if not JAPANESE.search(text):
            return [text]
        found, end = [], 0
        # MeCab drops spaces and stops at a NUL; the words are therefore cut out of the text itself.
        for surface in filter(None, re.split("[ \n]", tagger.parse(text))):
            start, end = end, text.index(surface, end) + len(surface)
            found.append(text[start:end])
        return [*found, text[end:]] if end < len(text) else found

    return words
