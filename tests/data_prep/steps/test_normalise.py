"""One spelling for one text, and a second pass changes nothing."""

import pytest
from datatrove.data import Document
from hypothesis import given
from hypothesis import strategies as st

from data_prep.steps.normalise import Normalise


@pytest.mark.parametrize(
    ("raw", "nfc", "nfkc"),
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd", "a\nb\nc\nd"),
        ("a\rb\x7fc", "a\nbc", "a\nbc"),
        ("か\u3099 e\u0301", "が é", "が é"),
        ("か\u200b\u3099", "が", "が"),  # what stood between is taken out before the two are joined
        ("ﾃﾞｰﾀﾍﾞｰｽ｡｢ｶﾞ｣", "データベース。「ガ」", "データベース。「ガ」"),
        ("ＡＢＣ１２３ ① ㈱ ﬁ", "ＡＢＣ１２３ ① ㈱ ﬁ", "ABC123 1 (株) fi"),
        ("\ufeffa\x00b\x1b[0m\x9bc\xadd\u2060\u202ee", "ab[0mcde", "ab[0mcde"),
        ("👨\u200d👩\u200d👧 नमस\u200d्ते", "👨\u200d👩\u200d👧 नमस\u200d्ते", "👨\u200d👩\u200d👧 नमस\u200d्ते"),
        ("a \t\n\n \u3000\n\n\nb\xa0c\n\n", "a\n\nb c", "a\n\nb c"),
        ("\tx = 1\n    y", "\tx = 1\n    y", "\tx = 1\n    y"),
        ("(ﾟ∀ﾟ) (´･ω･ﾟ) ﾟДﾟ ｷﾀﾞﾟ ｱﾞｶﾟ", "(ﾟ∀ﾟ) (´・ω・ﾟ) ﾟДﾟ キダﾟ アﾞカﾟ", "(ﾟ∀ﾟ) (´・ω・ﾟ) ﾟДﾟ キダﾟ アﾞカﾟ"),
        ("カﾞ うﾞ ﾜﾞｦﾞｳﾞ あ゛は゜ ヽ(￣ー￣)ﾉ ¨´", "ガ ゔ ヷヺヴ あ゛は゜ ヽ(￣ー￣)ノ ¨´", "ガ ゔ ヷヺヴ あ゛は゜ ヽ(￣ー￣)ノ ¨´"),
        ("一\u3000二\u2003三", "一\u3000二\u2003三", "一 二 三"),
        ("㍻㌔½²™…‥～〜ー－―", "㍻㌔½²™…‥～〜ー－―", "平成キロ1⁄22TM.....~〜ー-―"),
        ("\ufa19社 﨑 葛\U000e0100 ☺\ufe0f", "神社 﨑 葛\U000e0100 ☺\ufe0f", "神社 﨑 葛\U000e0100 ☺\ufe0f"),
        ("ã\x81\x82 \ufffd", "ã \ufffd", "ã \ufffd"),  # a broken encoding is not guessed at
    ],
)
def test_each_rule(raw: str, nfc: str, nfkc: str) -> None:
    assert (Normalise().normalise(raw), Normalise(form="NFKC").normalise(raw)) == (nfc, nfkc)


@given(
    st.text(st.sampled_from("aが\u3099か\u200b\r\n \t\u3000\xa0ｶﾞﾊﾟ(´¨゛\x85\ufeffé\u0301①\x00\ud800"), max_size=12),
    st.sampled_from(("NFC", "NFKC")),
)
def test_a_normal_text_stays_and_is_utf_8(text: str, form: str) -> None:
    step = Normalise(form=form)
    once = step.normalise(text)
    assert step.normalise(once) == once
    once.encode()


def test_every_turn_of_a_dialogue() -> None:
    document = Document(
        text="", id="", metadata={"messages": [{"role": "user", "content": "ｶﾞ\r\n"}, {"role": "assistant", "content": "b \n"}]}
    )
    assert Normalise().start()(document) is None
    assert [turn["content"] for turn in document.metadata["messages"]] == ["ガ", "b"] and document.text == "ガ\nb"
