"""Planted pieces of evaluation sets are found, whatever their width, case and spacing; what merely resembles them stays."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document

from data_prep.steps import decontaminate
from data_prep.steps.decontaminate import Decontaminate
from mujina.user_input import UserError

JAPANESE = "太郎さんは時速４キロで歩き、花子さんは時速６キロで歩きます。二人が同時に出発したとき、花子さんは何分早く着くでしょうか。"
ENGLISH = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take to make one?"
SHORT = "日本で一番高い山は何ですか。"
ANSWER = "富士山"


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    rows = [{"question": JAPANESE, "choices": [ANSWER, "北岳"], "answer": ANSWER}, {"question": SHORT, "answer": ANSWER}]
    with gzip.open(tmp_path / "ja_reasoning.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "gsm8k.txt").write_text(f"\n{ENGLISH}\n", encoding="utf-8")
    return [str(tmp_path / "ja_*.jsonl.gz"), str(tmp_path / "gsm8k.txt")]


def judged(sets: list[str], text: str, **values: object) -> str | None:
    return Decontaminate.model_validate({"sets": sets} | values).start()(Document(text=text, id=""))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"問題集より。{JAPANESE}答えは次のページ。", "contaminated: ja_reasoning"),
        ("前置き" + "\n".join(JAPANESE).replace("４", "4") + "後書き", "contaminated: ja_reasoning"),
        ("前" + JAPANESE[5:48] + "後", "contaminated: ja_reasoning"),
        (f"Solve: {ENGLISH.upper().replace(' ', '  ')}!", "contaminated: gsm8k"),
        (ENGLISH.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)}), "contaminated: gsm8k"),
        (f"「{SHORT}」", "contaminated: ja_reasoning"),  # short, and all of the document
        (f"{SHORT}と聞かれて、富士山だと答えた。", None),
        (ANSWER, None),
        ("前" + JAPANESE[:25] + "後", None),
        (ENGLISH[:60], None),  # 49 letters
        (JAPANESE.replace("歩", "走").replace("出発", "開始"), None),
        ("", None),
    ],
)
def test_planted_pieces(sets: list[str], text: str, reason: str | None) -> None:
    assert judged(sets, text) == reason


def test_a_run_of_exactly_the_length_counts(sets: list[str]) -> None:
    letters = "".join(filter(str.isalnum, ENGLISH))
    for start in range(len(letters) - 60):
        assert judged(sets, f"そして{letters[start : start + 60]}である") == "contaminated: gsm8k"
        assert judged(sets, f"そして{letters[start : start + 59]}である") is None


def test_turns_and_fields(sets: list[str]) -> None:
    turns = [{"role": "user", "content": SHORT}, {"role": "assistant", "content": ANSWER}]
    dialogue = Document(text="", id="", metadata={"messages": turns})
    assert Decontaminate(sets=sets).start()(dialogue) == "contaminated: ja_reasoning"
    with pytest.raises(UserError, match="holds no text of 10 letters or more in the fields answer"):
        judged(sets, "", fields=["answer"])


def test_equal_hashes_are_no_proof(sets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontaminate, "ngram_hashes", lambda codes, n: np.full(max(len(codes) - n + 1, 0), 7, np.uint64))
    assert judged(sets, "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。") is None


def test_missing_sets(sets: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        judged([*sets, str(tmp_path / "none*.jsonl")], "")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        judged([str(tmp_path / "empty.txt")], "")
