"""Which dialogues can be trained on for their answers: what their template makes of them, with templates in the shapes of public ones."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.answers import problem_of
from tokenization.chat import ChatTemplate, plain
from tokenization.tokenizer import Rendered

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen. You help.<|im_end|>\n{% endif %}" + CHATML
SHORT = QWEN.replace("You are Qwen. You help.", "あなたは賢いです。")
DATED = "{{ 'Knowledge Date: December 2023' }}<|im_start|>" + CHATML
EMPTY_THOUGHT = CHATML.replace(
    "<|im_start|>{{ m.role }}\n", "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
)
NO_SYSTEM = CHATML.replace("in messages", "in messages if m.role != 'system'")
LAST_TURNS = CHATML.replace("in messages", "in messages[-2:]")
UNTHINKING = CHATML.replace("{{ m.content | trim }}", "{{ m.content.split('</think>')[-1] | trim }}")
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}\n\n### Instruction:\n{{ m.content }}{% else %}\n\n### Response:\n"
    "{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}\n\n### Response:\n{% endif %}"
)
LLAMA_2 = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST] {% if loop.first and s %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <|im_end|>{% endif %}{% endfor %}"
)
SYSTEM_LAST = (
    "{% for m in messages[1:] %}{% if m.role == 'user' %}[INST]{{ messages[0].content }}\n\n{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)

ONE = [("user", " 山は? "), ("assistant", "The hill. It is high.\n")]
SYSTEM = [("system", "You are kind."), *ONE]
THOUGHT = [("user", "2 + 3?"), ("assistant", "<think>2, 3</think>5"), ("user", "user"), ("assistant", "assistant")]


def problem(template: str, turns: list[tuple[str, str]], may_change: bool = False) -> str | None:
    messages = [{"role": role, "content": text} for role, text in turns]
    controls = {piece: (False, False) for piece in ("<|im_start|>", "<|im_end|>")}
    parts = ChatTemplate(template, Path("x"), controls).parts(messages, with_answers=False)
    return problem_of(messages, Rendered(np.zeros(1, np.int32), np.ones(1, bool), plain(parts)), may_change)


@pytest.mark.parametrize("template", [CHATML, ALPACA, LLAMA_2], ids=["chatml", "alpaca", "llama 2"])
@pytest.mark.parametrize("turns", [ONE, THOUGHT], ids=["one", "thought"])
def test_what_templates_write_between_turns_is_nothing_added(template, turns):
    assert problem(template, turns) is None


def test_a_systems_turn_may_stand_elsewhere():
    assert problem(LLAMA_2, SYSTEM) is None and problem(SYSTEM_LAST, SYSTEM) is None and problem(QWEN, SYSTEM) is None


@pytest.mark.parametrize(
    ("template", "turns", "told"),
    [
        (QWEN, ONE, "adds 'system\\nYou are Qwen. You help.', which no turn says"),
        (SHORT, ONE, "adds 'system\\nあなたは賢いです。', which no turn says"),
        (DATED, ONE, "adds 'Knowledge Date: December 2023'"),
        (EMPTY_THOUGHT, ONE, "adds 'assistant\\n<think>\\n\\n</think>'"),
        (NO_SYSTEM, SYSTEM, "leaves out what turn 1 (system) says"),
        (LAST_TURNS, THOUGHT, "leaves out what turn 2 (assistant) says"),
        (UNTHINKING, THOUGHT, "leaves out what turn 2 (assistant) says, or a part of it"),
    ],
)
def test_what_a_template_adds_or_leaves_out_is_told(template, turns, told):
    found = problem(template, turns)
    assert found is not None and told in found and "template_may_change: true" in found
    assert problem(template, turns, may_change=True) is None
