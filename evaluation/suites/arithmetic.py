"""Does a chat model answer sums in the fixed form, and are the sums right? English and Japanese.

    mujina evaluate HF_FOLDER --prompts held_out.jsonl --output result.json

A row of the prompt file is {"id", "messages": [{"role": "user", "content": …}], "answer": "12", "language": "ja" or "en"}.
An answer is well-formed when the model stopped by itself and the last sentence is the language's fixed form, with or without working
before it: `The answer is 12.` or `答えは12です。`. It is correct when it is well-formed and the number is the expected one.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pydantic

from evaluation.progress import answered
from evaluation.result import Measure, Result, Sample, Suite, summarize
from mujina.answers import Answer, Answerer, Conversation, PromptMessages, Sampling
from mujina.files import sha256_of
from mujina.user_input import MOST, Section, UserError, parse, parse_object, read_text

SAMPLING = Sampling(max_new_tokens=128)  # room for some working before the fixed form
MEASURES = {
    "well-formed": Measure(
        meaning="the model stopped by itself and closed with the fixed form (“The answer is 12.”, 「答えは12です。」)", is_share=True
    ),
    "correct": Measure(meaning="well-formed, and the number is right", is_share=True),
}
GROUPS = {"en": "English", "ja": "Japanese"}
_SENTENCE_START = r"(?:^|(?<=[.!?。！？\n]))\s*"
FIXED_FORM = {
    "en": re.compile(_SENTENCE_START + r"The answer is (-?[0-9]+)\.\s*\Z"),
    "ja": re.compile(_SENTENCE_START + r"答えは(-?[0-9]+)です。\s*\Z"),
}


class Problem(Section):
    """One row of the prompt file; what else the row holds (id, source, licence) plays no part in scoring."""

    model_config = pydantic.ConfigDict(extra="ignore")

    messages: PromptMessages
    answer: str
    language: Literal["ja", "en"]

    @pydantic.field_validator("answer")
    @classmethod
    def _is_a_number(cls, answer: str) -> str:
        if not re.fullmatch("-?[0-9]{1,1000}", answer):
            raise ValueError("must be a whole number in digits, such as 42 or -7: write one")
        return answer


def evaluate(answerer: Answerer, model: str, prompts: Path, limit: int | None) -> Result:
    """Asks the first `limit` problems of the file `prompts`, and scores the answers; raises UserError when a row does not fit."""
    problems = read_problems(prompts)[:limit]
    suite = Suite(name="arithmetic", version=1, prompts=str(prompts), prompts_sha256=sha256_of(prompts), measures=MEASURES)
    found = answered(answerer, [Conversation(problem.messages) for problem in problems], SAMPLING)
    return summarize(suite, model, SAMPLING, score(problems, [answer for [answer] in found]))


def read_problems(path: Path) -> list[Problem]:
    """The rows of a prompt file; raises UserError naming the line when one does not fit, or when there is none."""
    remedy = "give a JSONL file of {id, messages, answer, language}"
    lines = read_text(path, remedy, MOST).split("\n")
    rows = [(f"{path}: line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: holds no prompts: {remedy}")
    return [parse(parse_object(line, where, remedy), Problem, where) for where, line in rows]


def score(problems: Sequence[Problem], found: Sequence[Answer]) -> list[Sample]:
    """Scores `found[i]` as the answer to `problems[i]`."""
    samples = []
    for problem, answer in zip(problems, found, strict=True):
        number = stated_number(answer, problem.language)
        well_formed, correct = number is not None, number == int(problem.answer)
        samples.append(
            Sample(
                prompt=problem.messages[-1].content,
                expected=problem.answer,
                answer=answer.text,
                group=GROUPS[problem.language],
                right=correct,
                verdict="correct" if correct else "wrong number" if well_formed else "not well-formed",
                scores={"well-formed": float(well_formed), "correct": float(correct)},
            )
        )
    return samples


def stated_number(answer: Answer, language: str) -> int | None:
    """The number that a well-formed answer states, or None when the answer is not well-formed."""
    found = FIXED_FORM[language].search(answer.text)
    return int(found.group(1)) if answer.stopped and found else None
