from decimal import Decimal
from typing import Any

import pytest

from evaluation.preferences.config import NumberRule, PatternRule
from evaluation.preferences.rows import Prompt
from evaluation.preferences.rules import last_number, scorer
from mujina.answers import question
from mujina.user_input import UserError, parse

FIXED_FORM = r"(?:The answer is (-?[0-9]+)\.|答えは(-?[0-9]+)です。)\s*\Z"


def prompt(**fields: Any) -> Prompt:
    return Prompt("1", "rows.jsonl line 1", question("?"), fields)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7. The answer is 7.", "7"),
        ("答えは-3です。", "-3"),
        ("答えは１，２３４です。", "1234"),
        ("1,234,567.50 yen", "1234567.5"),
        ("3 − 4 = −1", "-1"),
        ("10-3", "3"),
        ("f(2)-3", "3"),
        ("1,2", "2"),
        ("12,3456", "3456"),
        ("7,", "7"),
        ("about 1.5.", "1.5"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_last_number(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


def test_no_number() -> None:
    assert last_number("twelve ・ 十二 ٣") is None


@pytest.mark.parametrize("truth", ["12", 12, 12.0, "12.0", "１２"])
def test_a_number_is_right_however_it_is_written(truth: Any) -> None:
    score = scorer(NumberRule(), prompt(answer=truth))
    assert [score(text) for text in ("5 + 7 = 12", "12 or 13", "twelve", "")] == [1, 0, 0, 0]


def test_a_pattern_and_what_its_group_has_to_equal() -> None:
    score = scorer(PatternRule(pattern=FIXED_FORM, field="answer"), prompt(answer="12"))
    right = ["5 + 7 = 12. The answer is 12.", "答えは12です。\n"]
    assert [score(text) for text in right] == [1, 1]
    assert [score(text) for text in ("The answer is 13.", "12", "The answer is 12. Bye.", "答えは12です")] == [0] * 4
    is_list = scorer(PatternRule(pattern=r"^- "), prompt())
    assert [is_list("- a"), is_list("a")] == [1, 0]


@pytest.mark.parametrize(
    ("rule", "fields", "message"),
    [
        (NumberRule(), {}, r"rows.jsonl line 1: answer \(None\) must be a text or a number"),
        (NumberRule(), {"answer": True}, r"answer \(True\) must be"),
        (NumberRule(field="sum"), {"sum": "twelve"}, r"sum \('twelve'\) is no number"),
        (PatternRule(pattern="(a)", field="key"), {"key": ["a"]}, "key .* must be a text or a number"),
    ],
)
def test_a_row_without_what_the_rule_compares_with(rule: NumberRule | PatternRule, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scorer(rule, prompt(**fields))


@pytest.mark.parametrize(("values", "message"), [({"pattern": "("}, "no regular expression"), ({"pattern": "a", "field": "b"}, "no group")])
def test_a_pattern_that_cannot_be(values: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(values, PatternRule, "x.yaml")
