"""The dialogues are right, all different, and the held-out questions are not among them."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.blocks import read_blocks, rows_of
from data_prep.row import SourceFacts
from data_prep.synthetic.rules import NAMES, THINGS, generate
from mujina.user_input import UserError

Row = dict[str, Any]
Rows = tuple[list[Row], list[Row], list[Row]]
CALCULATION = re.compile(r"([\d+×\- ]+) = (\d+)[.。] ?(?:The answer is|答えは)(?: )?(\d+)(?:です。|\.)$")
ANSWER = {"en": re.compile(r"\. The answer is (\w+)\.$"), "ja": re.compile(r"。答えは(\w+)です。$")}


@pytest.fixture(scope="module")
def rows() -> Rows:
    return generate(6000, 200, seed=1, num_pairs=500)


def test_no_two_dialogues_are_alike(rows: Rows) -> None:
    dialogues, _, _ = rows
    rendered = {json.dumps(row["messages"], ensure_ascii=False) for row in dialogues}
    assert len(rendered) == len(dialogues) == 6000
    assert len({row["id"] for row in dialogues}) == 6000


def test_held_out_questions_are_nowhere_in_the_training_file(rows: Rows) -> None:
    dialogues, held_out, _ = rows
    asked = {turn["content"] for row in dialogues for turn in row["messages"] if turn["role"] == "user"}
    questions = [row["messages"][0]["content"] for row in held_out]
    assert len(set(questions)) == 200
    assert asked.isdisjoint(questions)
    assert all(len(row["messages"]) == 1 and row["answer"].isdigit() for row in held_out)
    assert {row["language"] for row in held_out} == {"ja", "en"}


def test_held_out_questions_have_the_forms_of_the_training_file(rows: Rows) -> None:
    dialogues, held_out, _ = rows
    words = [*NAMES["ja"], *NAMES["en"], *(thing for pairs in THINGS.values() for thing, _ in pairs if thing != "本")]
    blank = re.compile("|".join([r"\d+", *words]))
    forms = {blank.sub("_", row["messages"][0]["content"]) for row in dialogues}
    assert {blank.sub("_", row["messages"][0]["content"]) for row in held_out} <= forms


def test_every_answer_ends_in_the_fixed_sentence_and_is_right(rows: Rows) -> None:
    calculations = 0
    for row in rows[0]:
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            assert (question["role"], answer["role"]) == ("user", "assistant")
            assert ANSWER[row["language"]].search(answer["content"]), answer
            if found := CALCULATION.fullmatch(answer["content"]):
                calculations += 1
                assert eval(found[1].replace("×", "*")) == int(found[2]) == int(found[3])
                assert int(found[2]) >= 0
    assert calculations > 3000


def test_the_held_out_answers_are_right(rows: Rows) -> None:
    """Computed anew from the question alone, for the forms that say it in signs."""
    checked = 0
    for row in rows[1]:
        question = row["messages"][0]["content"]
        numbers = [int(number) for number in re.findall(r"\d", question)]
        if re.search(" [+] |sum of|Add|足して|たす|gets|もらい", question):
            checked += 1
            assert row["answer"] == str(sum(numbers))
        if re.search(" - |minus|take away|引いて|ひく|gives away|あげました", question):
            checked += 1
            assert row["answer"] == str(numbers[0] - numbers[1])
        if "larger" in question or "大きい" in question:
            checked += 1
            assert row["answer"] == str(max(numbers))
    assert checked >= 100


def test_of_a_pair_the_right_answer_was_chosen(rows: Rows) -> None:
    dialogues, held_out, pairs = rows
    asked = {row["messages"][0]["content"] for row in [*dialogues, *held_out]}
    assert len(pairs) == 500 and asked.isdisjoint(row["messages"][0]["content"] for row in pairs)
    for row in pairs:
        number = {side: ANSWER[row["language"]].search(row[side])[1] for side in ("chosen", "rejected")}
        assert number["chosen"] != number["rejected"] and row["chosen"].count(number["chosen"]) >= 2
        if found := CALCULATION.fullmatch(row["chosen"]):
            assert eval(found[1].replace("×", "*")) == int(found[3])
        if found := CALCULATION.fullmatch(row["rejected"]):
            assert eval(found[1].replace("×", "*")) != int(found[3]) == int(found[2])
        assert {"kind"}.isdisjoint(row), "pairs are no chat"


def test_both_languages_and_some_second_turns(rows: Rows) -> None:
    dialogues, _, _ = rows
    japanese = sum(row["language"] == "ja" for row in dialogues)
    assert 2400 < japanese < 3600
    assert 600 < sum(len(row["messages"]) == 4 for row in dialogues) < 3000


def test_the_command_writes_the_same_bytes_for_a_seed(tmp_path: Path) -> None:
    written = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        line = f"-m data_prep.synthetic.rules {tmp_path / name} --dialogues 300 --held-out 20 --pairs 30 --seed {seed}"
        subprocess.run([sys.executable, *line.split()], cwd=Path(__file__).parents[2], check=True, capture_output=True)
        written.append([(tmp_path / name / file).read_bytes() for file in ("chat.jsonl.gz", "held_out.jsonl", "pairs.jsonl.gz")])
    assert written[0] == written[1]
    assert written[0] != written[2]
    assert len(gzip.decompress(written[0][0]).splitlines()) == 300
    labels = SourceFacts(kind="chat", origin="synthetic").labels("chat")
    found = [row for block in read_blocks(str(tmp_path / "a/chat.jsonl.gz")) for row in rows_of(block, labels)]
    assert len(found) == 300 and {row["source"] for row in found} == {"rules"}


def test_running_out_of_questions_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.synthetic import rules

    monkeypatch.setattr(rules, "FORMS", (rules._boxes,))
    with pytest.raises(UserError, match="no more new questions"):
        generate(5000, 10, seed=1)
