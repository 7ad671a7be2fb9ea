"""Does a chat model answer sums in the fixed form, and are the sums right? English and Japanese.

    python -m evaluation.arithmetic HF_FOLDER --prompts held_out.jsonl --output result.json [--limit 100]

A row of the prompt file is {"id", "messages": [{"role": "user", "content": …}], "answer": "12", "language": "ja" or "en"}.
An answer is well-formed when the model stopped by itself and the last sentence is the language's fixed form, with or without working
before it: `The answer is 12.` or `答えは12です。`. It is correct when it is well-formed and the number is the expected one.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import typer

from evaluation.files import parse_object, read_text
from evaluation.generate import Answer, answers
from mujina.files import write_whole
from mujina.user_input import Section, UserError, parse, run

MAX_NEW_TOKENS = 128  # room for some working before the fixed form
_SENTENCE_START = r"(?:^|(?<=[.!?。！？\n]))\s*"
FIXED_FORM = {
    "en": re.compile(_SENTENCE_START + r"The answer is (-?[0-9]+)\.\s*\Z"),
    "ja": re.compile(_SENTENCE_START + r"答えは(-?[0-9]+)です。\s*\Z"),
}


class Message(Section):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Problem(Section):
    """One row of the prompt file; what else the row holds (id, source, licence) plays no part in scoring."""

    model_config = pydantic.ConfigDict(extra="ignore")

    messages: list[Message] = pydantic.Field(min_length=1)
    answer: str = pydantic.Field(pattern=r"^-?[0-9]+$")
    language: Literal["ja", "en"]

    @pydantic.field_validator("messages")
    @classmethod
    def _ends_with_the_user(cls, messages: list[Message]) -> list[Message]:
        if messages[-1].role != "user":
            raise ValueError("the last message must be the user's: leave out the answer, or the model is shown it")
        return messages


class Shares(Section):
    """Shares of `num_prompts`, 0 to 1."""

    num_prompts: int
    well_formed: float
    correct: float


class Sample(Section):
    """One prompt (the last user message) and how it was answered."""

    prompt: str
    expected: str
    answer: str
    well_formed: bool
    correct: bool


class Result(Shares):
    """The result file: the shares over all prompts and by language, and every sample. `prompts` is the prompt file."""

    folder: str
    prompts: str
    by_language: dict[str, Shares]
    samples: list[Sample]


def stated_number(answer: Answer, language: str) -> int | None:
    """The number that a well-formed answer states, or None when the answer is not well-formed."""
    found = FIXED_FORM[language].search(answer.text)
    return int(found.group(1)) if answer.stopped and found else None


def read_problems(path: Path) -> list[Problem]:
    """The rows of a prompt file; raises UserError naming the line when one does not fit, or when there is none."""
    remedy = "give a JSONL file of {id, messages, answer, language}"
    lines = read_text(path, remedy).split("\n")
    rows = [(f"{path}: line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: holds no prompts: {remedy}")
    return [parse(parse_object(line, where, remedy), Problem, where) for where, line in rows]


def score(problems: list[Problem], found: list[Answer], folder: Path, prompts: Path) -> Result:
    """Scores `found[i]` as the answer to `problems[i]`."""
    samples = []
    for problem, answer in zip(problems, found, strict=True):
        number = stated_number(answer, problem.language)
        samples.append(
            Sample(
                prompt=problem.messages[-1].content,
                expected=problem.answer,
                answer=answer.text,
                well_formed=number is not None,
                correct=number == int(problem.answer),
            )
        )
    languages = [problem.language for problem in problems]
    by_language = {
        language: _shares([sample for sample, its in zip(samples, languages, strict=True) if its == language])
        for language in sorted(set(languages))
    }
    return Result(folder=str(folder), prompts=str(prompts), by_language=by_language, samples=samples, **_shares(samples).model_dump())


def _shares(samples: list[Sample]) -> Shares:
    num_prompts = len(samples)
    return Shares(
        num_prompts=num_prompts,
        well_formed=sum(sample.well_formed for sample in samples) / num_prompts,
        correct=sum(sample.correct for sample in samples) / num_prompts,
    )


def main(
    folder: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="Folder of a Hugging Face model with a chat tokenizer.")],
    prompts: Annotated[Path, typer.Option(help="JSONL of held-out sums.")],
    output: Annotated[Path, typer.Option(help="Where the result goes, as JSON.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")] = None,
) -> None:
    """Scores a chat model on sums: the share of answers in the fixed form, and of right ones."""
    problems = read_problems(prompts)[:limit]
    found = answers(folder, [[message.model_dump() for message in problem.messages] for problem in problems], MAX_NEW_TOKENS)
    result = score(problems, found, folder, prompts)
    write_whole(output, (result.model_dump_json(indent=2) + "\n").encode())

    from rich.console import Console
    from rich.table import Table

    table = Table(folder.resolve().name, "prompts", "well-formed", "correct")
    for name, shares in {"all": result, **result.by_language}.items():
        table.add_row(name, str(shares.num_prompts), f"{shares.well_formed:.1%}", f"{shares.correct:.1%}")
    Console().print(table)


if __name__ == "__main__":
    run(main)
