"""Rules for answers that can be checked: a number that has to be right, a form that has to be kept."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from evaluation.preferences.choice import Judged, Texts, by_scores
from evaluation.preferences.config import NumberRule, PatternRule
from evaluation.preferences.rows import Prompt
from mujina.user_input import UserError

# A minus behind a digit or a letter takes away, and is no sign; commas part thousands. Digits are ASCII once NFKC has been over them.
_NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)])[-+])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")


class RuleJudge:
    """Raises UserError where a row lacks what the rule compares with."""

    def __init__(self, rule: NumberRule | PatternRule, prompts: Sequence[Prompt]) -> None:
        self._scorers = [scorer(rule, prompt) for prompt in prompts]
        self.provenance: dict[str, Any] = rule.model_dump(mode="json")

    def judge(self, answers: Texts) -> list[Judged]:
        scored = zip(self._scorers, answers, strict=True)
        return [by_scores([None if text is None else score(text) for text in texts]) for score, texts in scored]


def scorer(rule: NumberRule | PatternRule, prompt: Prompt) -> Callable[[str], float]:
    """Gives an answer to the prompt its score: 1 or 0. Raises UserError where the row lacks what the rule compares with."""
    if isinstance(rule, NumberRule):
        truth = last_number(_field(rule.field, prompt))
        if truth is None:
            raise UserError(
                f"{prompt.where}: {rule.field} ({_field(rule.field, prompt)[:100]!r}) is no number: write one such as 12 or -3.5"
            )
        return lambda answer: float(last_number(answer) == truth)
    pattern, expected = re.compile(rule.pattern), None if rule.field is None else _field(rule.field, prompt)
    return lambda answer: float(_matches(pattern, expected, answer))


def last_number(text: str) -> Decimal | None:
    """The last number of a text, full-width digits and thousands with commas included."""
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text).replace("\u2212", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def _matches(pattern: re.Pattern[str], expected: str | None, answer: str) -> bool:
    found = list(pattern.finditer(answer))
    if not found or expected is None:
        return bool(found)
    return next((group for group in found[-1].groups() if group is not None), "").strip() == expected


def _field(name: str, prompt: Prompt) -> str:
    value = prompt.fields.get(name)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise UserError(f"{prompt.where}: {name} ({str(value)[:100]}) must be a text or a number, which judge.field compares with: add it")
    return str(value).strip()
