"""Which language a document is in, and whether that is wanted, by fastText's identifier of 176 languages.

The model beside this file, lid.176.ftz, is of https://fasttext.cc/docs/en/language-identification.html (Joulin et al., Bag of Tricks for
Efficient Text Classification, 2016), licence CC-BY-SA-3.0.
"""

from pathlib import Path
from typing import Literal

from datatrove.data import Document
from pydantic import Field

from data_prep.steps.step import Judge, Step

MODEL = Path(__file__).with_name("lid.176.ftz")
CHARACTERS = 1000  # enough to tell, and four times as fast as whole documents


class Language(Step):
    """Keeps documents in one of the languages `keep` that score at least `threshold`.

    Sets metadata `language` and `language_score`. Dropped: language, with what was found.
    """

    step: Literal["language"] = "language"
    keep: list[str] = Field(min_length=1)
    """ISO 639 codes: ja, en."""
    threshold: float = Field(default=0.65, ge=0, le=1)
    """The least score, of 1."""

    def start(self) -> Judge:
        from fasttext.FastText import _FastText  # fasttext.load_model prints a warning

        model = _FastText(str(MODEL))

        def judge(document: Document) -> str | None:
            (label,), (score,) = model.predict(document.text[:CHARACTERS].replace("\n", " "))
            language = label.removeprefix("__label__")
            document.metadata |= {"language": language, "language_score": round(float(score), 4)}
            return None if language in self.keep and score >= self.threshold else f"language: {language} {score:.2f}"

        return judge
