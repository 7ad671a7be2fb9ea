import json
from pathlib import Path

import pytest

from evaluation import arithmetic
from evaluation.arithmetic import Message, Problem, Result, read_problems, score, stated_number
from evaluation.generate import Answer
from mujina.user_input import UserError


def problem(answer: str = "12", language: str = "en", prompt: str = "What is 5 + 7?") -> Problem:
    return Problem(messages=[Message(role="user", content=prompt)], answer=answer, language=language)


def row(**changes: object) -> str:
    values = {"id": "a-1", "messages": [{"role": "user", "content": "What is 5 + 7?"}], "answer": "12", "language": "en"} | changes
    return json.dumps({key: value for key, value in values.items() if value is not None})


@pytest.mark.parametrize(
    ("language", "text", "number"),
    [
        ("en", "The answer is 12.", 12),
        ("en", "The answer is -3.", -3),
        ("en", "5 and 7 make 12. The answer is 12.", 12),
        ("en", "5 + 7 = 12\nThe answer is 12.\n", 12),
        ("en", "The answer is 11. No! The answer is 12.", 12),
        ("en", "The answer is 12", None),
        ("en", "The answer is 1.5.", None),
        ("en", "the answer is 12.", None),
        ("en", "I think The answer is 12.", None),
        ("en", "The answer is 12. Good luck.", None),
        ("en", "The answer is 12.<|user|>", None),
        ("en", "The answer is twelve.", None),
        ("en", "答えは12です。", None),
        ("en", "", None),
        ("ja", "答えは12です。", 12),
        ("ja", "答えは-3です。", -3),
        ("ja", "5に7を足すと12になります。答えは12です。", 12),
        ("ja", "5+7=12\n答えは12です。", 12),
        ("ja", "答えは12です", None),
        ("ja", "この答えは12です。", None),
        ("ja", "答えは12です。よかったです。", None),
        ("ja", "答えは１２です。", None),
        ("ja", "答えは十二です。", None),
        ("ja", "The answer is 12.", None),
    ],
)
def test_the_fixed_form(language: str, text: str, number: int | None) -> None:
    assert stated_number(Answer(text, stopped=True), language) == number


def test_an_answer_that_was_cut_off_is_not_well_formed() -> None:
    assert stated_number(Answer("The answer is 12.", stopped=False), "en") is None


def test_shares_over_all_and_by_language() -> None:
    problems = [problem("12"), problem("-4"), problem("7", "ja"), problem("8", "ja")]
    found = [
        Answer("The answer is 12.", True),
        Answer("The answer is 4.", True),
        Answer("答えは7です。", False),
        Answer("はい。答えは8です。", True),
    ]
    result = score(problems, found, Path("model"), Path("held_out.jsonl"))
    assert (result.num_prompts, result.well_formed, result.correct) == (4, 0.75, 0.5)
    assert {language: shares.model_dump() for language, shares in result.by_language.items()} == {
        "en": {"num_prompts": 2, "well_formed": 1.0, "correct": 0.5},
        "ja": {"num_prompts": 2, "well_formed": 0.5, "correct": 0.5},
    }
    assert [(sample.well_formed, sample.correct) for sample in result.samples] == [
        (True, True),
        (True, False),
        (False, False),
        (True, True),
    ]
    assert result.samples[3].model_dump() == {
        "prompt": "What is 5 + 7?",
        "expected": "8",
        "answer": "はい。答えは8です。",
        "well_formed": True,
        "correct": True,
    }


def test_the_command_writes_the_result_and_prints_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def fake(folder: Path, conversations: list[list[dict[str, str]]], max_new_tokens: int) -> list[Answer]:
        asked.extend(conversations)
        return [Answer("The answer is 12.", True) for _ in conversations]

    monkeypatch.setattr(arithmetic, "answers", fake)
    prompts = tmp_path / "held_out.jsonl"
    prompts.write_text("\n".join([row(), row(answer="13"), row()]) + "\n")
    output = tmp_path / "new" / "result.json"
    arithmetic.main(tmp_path / "model", prompts, output, limit=2)

    result = json.loads(output.read_text())
    assert asked == [[{"role": "user", "content": "What is 5 + 7?"}]] * 2
    assert list(output.parent.iterdir()) == [output]
    assert (result["folder"], result["prompts"]) == (str(tmp_path / "model"), str(prompts))
    assert (result["num_prompts"], result["well_formed"], result["correct"]) == (2, 1.0, 0.5)
    assert len(result["samples"]) == 2
    assert Result.model_validate(result).by_language["en"].correct == 0.5
    printed = capsys.readouterr().out
    assert "100.0%" in printed and "50.0%" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "holds no prompts"),
        ("\n\n", "holds no prompts"),
        (row() + "\n{broken", "line 2: is not JSON"),
        ("[1]", "line 1: is not a JSON object"),
        (row(answer="twelve"), "line 1: answer ('twelve')"),
        (row(answer=None), "line 1: answer is missing"),
        (row(language="fr"), "line 1: language ('fr')"),
        (row(messages=[]), "line 1: messages"),
        (row(messages=[{"role": "teacher", "content": "?"}]), "messages.0.role ('teacher')"),
        (row(messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "12"}]), "last message must be the user's"),
    ],
)
def test_prompt_files_that_do_not_fit(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "held_out.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        read_problems(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_line_separators_inside_a_prompt_do_not_split_its_row(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps(json.loads(row(messages=[{"role": "user", "content": "a\u2028b"}])), ensure_ascii=False), encoding="utf-8")
    assert read_problems(path)[0].messages[0].content == "a\u2028b"
