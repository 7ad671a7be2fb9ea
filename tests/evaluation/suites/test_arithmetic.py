import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from evaluation.suites.arithmetic import Problem, evaluate, read_problems, score, stated_number
from mujina.answers import Answer, Answerer, Conversation, Sampling, question
from mujina.user_input import UserError


def problem(answer: str = "12", language: str = "en", prompt: str = "What is 5 + 7?") -> Problem:
    return Problem(messages=question(prompt).messages, answer=answer, language=language)


class Scripted(Answerer):
    """Gives the answers that it was made with, and keeps what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = texts, []

    def answer(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[list[Answer]]:
        self.asked.append((list(conversations), sampling))
        yield from ([Answer(text, "stop")] for text in self.texts)


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
    assert stated_number(Answer(text, "stop"), language) == number


def test_an_answer_that_was_cut_off_is_not_well_formed() -> None:
    assert stated_number(Answer("The answer is 12.", "length"), "en") is None


def test_verdicts() -> None:
    problems = [problem("12"), problem("-4"), problem("7", "ja"), problem("8", "ja")]
    found = [
        Answer("The answer is 12.", "stop"),
        Answer("The answer is 4.", "stop"),
        Answer("答えは7です。", "length"),
        Answer("はい。答えは8です。", "stop"),
    ]
    samples = score(problems, found)
    assert [(sample.right, sample.verdict, sample.scores["well-formed"], sample.scores["correct"]) for sample in samples] == [
        (True, "correct", 1, 1),
        (False, "wrong number", 1, 0),
        (False, "not well-formed", 0, 0),
        (True, "correct", 1, 1),
    ]
    assert samples[3].model_dump() == {
        "prompt": "What is 5 + 7?",
        "expected": "8",
        "answer": "はい。答えは8です。",
        "group": "Japanese",
        "right": True,
        "verdict": "correct",
        "scores": {"well-formed": 1.0, "correct": 1.0},
    }


def test_the_first_problems_are_asked_and_their_answers_scored(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text("\n".join([row(), row(answer="13"), row(answer="14", language="ja"), row()]) + "\n")
    answerer = Scripted("The answer is 12.", "The answer is 12.", "答えは14です。")
    result = evaluate(answerer, "a model", path, limit=3)
    assert answerer.asked == [([question("What is 5 + 7?")] * 3, Sampling(max_new_tokens=128))]
    assert (result.model, result.sampling, result.suite.name, result.suite.prompts) == ("a model", Sampling(128), "arithmetic", str(path))
    assert (result.num_prompts, result.measures) == (3, {"well-formed": 1.0, "correct": pytest.approx(2 / 3)})
    assert {group: (scores.num_prompts, scores.measures["correct"]) for group, scores in result.groups.items()} == {
        "English": (2, 0.5),
        "Japanese": (1, 1.0),
    }
    path.write_text(row(answer="15"))
    assert evaluate(Scripted("15"), "a model", path, limit=None).suite.prompts_sha256 != result.suite.prompts_sha256


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
