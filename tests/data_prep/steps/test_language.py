"""The language is recognised offline, noted with its score, and kept only where it is wanted."""

import pytest
from datatrove.data import Document

from data_prep.steps.language import Language
from mujina.user_input import UserError, parse

TEXTS = {
    "ja": "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。",
    "en": "It was the best of times, it was the worst of times.\nIt was the age of wisdom.",
    "de": "Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte.",
    "zh": "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？",
}


@pytest.mark.parametrize("language", TEXTS)
def test_languages(language: str, capfd: pytest.CaptureFixture[str]) -> None:
    judge = Language(keep=["ja", "en"]).start()
    document = Document(text=TEXTS[language], id="a")
    reason = judge(document)
    score = document.metadata["language_score"]
    assert document.metadata["language"] == language and 0.65 < score <= 1
    assert reason == (None if language in ("ja", "en") else f"language: {language} {score:.2f}")
    assert capfd.readouterr() == ("", "")


def test_a_doubtful_document_is_dropped() -> None:
    document = Document(text="ok 123 OK", id="a")
    found = Language(keep=["en"], threshold=0.95).start()(document)
    assert found is not None and found == f"language: {document.metadata['language']} {document.metadata['language_score']:.2f}"


def test_the_beginning_decides() -> None:
    document = Document(text=TEXTS["ja"] * 30 + TEXTS["en"] * 300, id="a")
    assert Language(keep=["ja"]).start()(document) is None


def test_a_document_without_letters_has_some_language_and_a_low_score() -> None:
    assert Language(keep=["en", "ja"]).start()(Document(text=" \n", id="a")) is not None


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UserError, match="keep.*must not be empty"):
        parse({"keep": []}, Language, "here")
    with pytest.raises(UserError, match="threshold .65.*less than or equal to 1"):
        parse({"keep": ["ja"], "threshold": 65}, Language, "here")
