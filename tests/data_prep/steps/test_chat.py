"""A dialogue is what a chat template can render, and every other shape is named."""

import pytest
from datatrove.data import Document

from data_prep.steps.chat import Dialogue

LETTERS = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def judge(roles: str, step: Dialogue | None = None, content: str = "はい") -> str | None:
    messages = [{"role": LETTERS[letter], "content": content} for letter in roles]
    return (step or Dialogue()).start()(Document(text="", id="", metadata={"messages": messages}))


@pytest.mark.parametrize("roles", ["ua", "sua", "uaua", "suaua"])
def test_dialogues_are_kept(roles: str) -> None:
    assert judge(roles) is None


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("", "no_messages"),
        ("uta", "roles: tool"),
        ("a", "order: assistant"),
        ("u", "order: user"),
        ("s", "order: system"),
        ("au", "order: assistant user"),
        ("uuaa", "order: user user assistant assistant"),
        ("uaa", "order: user assistant assistant"),
        ("usa", "order: user system assistant"),
        ("uau", "order: user assistant user"),
        ("ssua", "order: system system user assistant"),
    ],
)
def test_other_shapes_are_named(roles: str, reason: str) -> None:
    assert judge(roles) == reason


def test_a_text_is_no_dialogue_and_an_empty_turn_none_either() -> None:
    assert Dialogue().start()(Document(text="はい", id="")) == "no_messages"
    assert judge("ua", content=" \n") == "empty_turn"


def test_limits_hold_when_they_are_set() -> None:
    assert judge("uaua", Dialogue(max_turns=4)) is None
    assert judge("suaua", Dialogue(max_turns=4)) == "too_many_turns: 5"
    assert judge("ua", Dialogue(max_characters=4)) is None
    assert judge("uaua", Dialogue(max_characters=7)) == "too_long: 8"
