"""Templates in the shape of public ones write what transformers writes; what they add and leave out is told; a hostile one ends."""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from mujina.user_input import UserError
from tokenization import chat
from tokenization.chat import ChatTemplate

TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
CONTROLS = dict.fromkeys(
    ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>"]
    + [
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
    ],
    (False, False),
)
SYSTEM = {"role": "system", "content": " あなたは猫です。<&>\n"}
USER, OTHER = {"role": "user", "content": "12 + 3 は?"}, {"role": "user", "content": "  and\nthen?  "}
ANSWER = {"role": "assistant", "content": " 15です。\n\n"}
THOUGHT = {"role": "assistant", "content": "<think>\n12 + 3 = 15\n</think>\n\n15です。"}
REASONED = {"role": "assistant", "content": "15", "reasoning": "12 + 3", "name": None}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "足す", "arguments": {"a": 12, "b": [3, None]}}}]}
RESULT = {"role": "tool", "content": "15"}
DIALOGUES: list[list[dict[str, Any]]] = [
    [USER],
    [SYSTEM, USER, ANSWER],
    [USER, ANSWER, OTHER, ANSWER],
    [SYSTEM, USER, THOUGHT, OTHER, THOUGHT],
    [USER, REASONED, OTHER],
    [USER, CALL, RESULT, ANSWER],
    [USER, USER],
    [{"role": "comment", "content": "no"}, USER, ANSWER],
]


def written(template: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str | None:
    """None: it refuses."""
    try:
        parts = ChatTemplate(template, Path("here"), CONTROLS, SPECIAL).parts(messages, add_generation_prompt, with_answers=False)
    except UserError:
        return None
    return "".join(part.text for part in parts)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), chat_template=TEMPLATES[name], **SPECIAL
    )
    some = 0
    for messages in DIALOGUES:
        for add_generation_prompt in (False, True):
            try:
                expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
            except Exception:  # raise_exception, or what the template runs into
                expected = None
            assert written(TEMPLATES[name], messages, add_generation_prompt) == expected, messages
            some += expected is not None
    assert some >= 6


ADDS = {
    "alpaca": [
        "adds 'Below is an instruction that describes a task. Write a response that appropriately completes",
        "adds '### Response:'",
    ],
    "deepseek-r1": ["leaves out what earlier answers have between <think>", "leaves out what the last answer has between <think>"],
    "llama-3.1": ["writes the date of the day", "adds 'Cutting Knowledge Date: December 2023"],
    "mistral-v3": ["leaves out the system's turn"],  # where an answer is the last turn
    "qwen-2.5": [r"adds 'system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.'"],
    "qwen-3": [r"adds 'assistant\\n<think>\\n\\n</think>'", "leaves out what earlier answers have between <think>"],
    "smollm3": ["writes the date of the day", "adds .*Knowledge Cutoff Date: June 2025"],
    "tools-as-json": ["adds"] * 5,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_adds_and_leaves_out_is_told(name: str) -> None:
    notes = ChatTemplate(TEMPLATES[name], Path("here"), CONTROLS, SPECIAL).notes()
    expected = ADDS.get(name, [])
    assert len(notes) == len(expected) and all(any(re.search(one, note) for note in notes) for one in expected), notes


def test_a_system_turn_that_is_left_out_is_told() -> None:
    template = "{% for m in messages if m.role != 'system' %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    assert ChatTemplate(template, Path("here"), CONTROLS, SPECIAL).notes() == ["leaves out the system's turn"]


def test_the_date_is_that_of_the_day() -> None:
    assert written("{{ strftime_now('%d %b %Y') }}", [USER], False) == datetime.now().strftime("%d %b %Y")


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
END = "{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (f"{LOOP}{{% set x = a %}}{END}", "takes more than 1 seconds for one dialogue: mend the loop that does not end"),
        (f"{LOOP}{{{{ messages }}}}{END}", "writes more and more that nobody said: mend the loop"),
        ("{{ 'a' * 10 ** 11 }}", "takes more than 0 GiB for one dialogue: mend what repeats a text so often"),
        ("{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "takes more than"),
        ("{{ 10 ** (10 ** 10) }}", "takes more than"),
        ("{% set ns = namespace(x=7) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "takes more than"),
        ("{{ 'a'.ljust(10 ** 11) }}", "takes more than"),
        ("{{ 'a' | center(10 ** 11) }}", "takes more than"),
        ("{{ '%100000000000d' % 1 }}", "takes more than"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"cannot write this dialogue \(RecursionError"),
        ("{{ 1 / 0 }}", r"cannot write this dialogue \(ZeroDivisionError: division by zero\)"),
        ("{{ messages[0].content.x.y }}", r"cannot write this dialogue \('str object' has no attribute 'x'\)"),
        ("{{ messages.append(1) }}", "cannot write this dialogue"),
        ("{{ ''.__class__.__mro__ }}", "cannot write this dialogue"),
        ("{% for", "cannot write this dialogue"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", r"cannot write this dialogue \(.*Error"),
        ("{{ strftime_now(1) }}", r"cannot write this dialogue \(TypeError"),
    ],
)
def test_a_hostile_template_ends_with_one_line(template: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)
    monkeypatch.setattr(chat, "MEMORY", 1 << 28)
    monkeypatch.setattr(chat, "MOST_ADDED", 1 << 20)
    with pytest.raises(UserError, match=f"^here: its chat template {problem}") as caught:
        ChatTemplate(template, Path("here"), CONTROLS, SPECIAL).parts([USER], with_answers=False)
    assert "\n" not in str(caught.value)
    assert written(TEMPLATES["chatml"], [USER], False), "and the next one is written as before"
