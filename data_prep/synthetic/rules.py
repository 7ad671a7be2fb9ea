"""Rule-based dialogues: small arithmetic and reasoning in Japanese and English, for a model too small to learn from a teacher.

    python -m data_prep.synthetic.rules OUT_FOLDER --dialogues 6000 --held-out 200 --seed 1

Writes OUT_FOLDER/chat.jsonl.gz (documents of kind chat, origin synthetic) and OUT_FOLDER/held_out.jsonl ({id, messages: [user turn],
answer, language}): questions of the same forms, none of which is asked in the training file. Every answer ends in one fixed
sentence, `The answer is 12.` or `答えは12です。`, after one sentence of working. The bytes depend on the arguments alone.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mujina.files import write_whole
from mujina.user_input import UserError, command_line

LICENCE = "CC0-1.0"
LANGUAGES = ("ja", "en")
NAMES = {
    "ja": ("花子", "太郎", "健", "美咲", "陽子", "直樹", "さくら", "翔太", "由美", "大輔"),
    "en": ("Anna", "Ben", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Tom"),
}
THINGS = {  # what is counted, and in Japanese its counter
    "ja": (("りんご", "個"), ("みかん", "個"), ("鉛筆", "本"), ("本", "冊"), ("切手", "枚"), ("カード", "枚"), ("花", "本"), ("卵", "個")),
    "en": tuple((thing, "") for thing in ("apples", "oranges", "pencils", "books", "stamps", "cards", "flowers", "eggs")),
}
MAX_TRIES = 200  # for a question that has not been asked; beyond it the forms are used up


@dataclass(frozen=True)
class Turn:
    """A question and its answer. `follow_up` asks the same with another number."""

    question: str
    working: str
    answer: str
    follow_up: "Turn | None" = None


def _number(rng: random.Random, low: int = 2, high: int = 20) -> int:
    return rng.randint(low, high)


def _other(rng: random.Random, number: int, high: int = 20) -> int:
    """A number from 2 to `high` that is not `number`."""
    return rng.choice([other for other in range(2, high + 1) if other != number])


def _addition(rng: random.Random, language: str) -> Turn:
    a, b = _number(rng), _number(rng)
    c = _other(rng, b)
    ask = rng.choice(
        {"en": ("What is {} + {}?", "Add {} and {}.", "What is the sum of {} and {}?"),
         "ja": ("{} + {} は?", "{}と{}を足してください。", "{}たす{}はいくつですか。")}[language]
    )  # fmt: skip
    again = {"en": f"What if the second number is {c}?", "ja": f"2つ目の数が{c}ならどうですか。"}[language]
    return Turn(ask.format(a, b), f"{a} + {b} = {a + b}", str(a + b), Turn(again, f"{a} + {c} = {a + c}", str(a + c)))


def _subtraction(rng: random.Random, language: str) -> Turn:
    b = _number(rng)
    c = _other(rng, b)
    a = max(b, c) + _number(rng, 1)
    ask = rng.choice(
        {"en": ("What is {} - {}?", "What is {} minus {}?", "Start at {} and take away {}."),
         "ja": ("{} - {} は?", "{}ひく{}はいくつですか。", "{}から{}を引いてください。")}[language]
    )  # fmt: skip
    again = {"en": f"What if the second number is {c}?", "ja": f"2つ目の数が{c}ならどうですか。"}[language]
    return Turn(ask.format(a, b), f"{a} - {b} = {a - b}", str(a - b), Turn(again, f"{a} - {c} = {a - c}", str(a - c)))


def _gain(rng: random.Random, language: str) -> Turn:
    name, (thing, unit) = rng.choice(NAMES[language]), rng.choice(THINGS[language])
    a, b = _number(rng), _number(rng)
    c = _other(rng, b)
    ask, again = {
        "en": (f"{name} has {a} {thing} and gets {b} more. How many {thing} are there now?", f"What if {name} gets {c} more instead?"),
        "ja": (
            f"{name}は{thing}を{a}{unit}持っています。{b}{unit}もらいました。今、何{unit}持っていますか。",
            f"{c}{unit}もらったらどうですか。",
        ),
    }[language]
    return Turn(ask, f"{a} + {b} = {a + b}", str(a + b), Turn(again, f"{a} + {c} = {a + c}", str(a + c)))


def _loss(rng: random.Random, language: str) -> Turn:
    name, (thing, unit) = rng.choice(NAMES[language]), rng.choice(THINGS[language])
    b = _number(rng)
    c = _other(rng, b)
    a = max(b, c) + _number(rng, 1)
    ask, again = {
        "en": (f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?", f"What if {name} gives away {c} instead?"),
        "ja": (f"{name}は{thing}を{a}{unit}持っています。{b}{unit}あげました。残りは何{unit}ですか。", f"{c}{unit}あげたらどうですか。"),
    }[language]
    return Turn(ask, f"{a} - {b} = {a - b}", str(a - b), Turn(again, f"{a} - {c} = {a - c}", str(a - c)))


def _gain_and_loss(rng: random.Random, language: str) -> Turn:
    name, (thing, unit) = rng.choice(NAMES[language]), rng.choice(THINGS[language])
    a, b = _number(rng), _number(rng)
    c = _number(rng, 1, a + b - 1)
    ask = {
        "en": f"{name} has {a} {thing}, gets {b} more and then gives away {c}. How many {thing} are left?",
        "ja": f"{name}は{thing}を{a}{unit}持っています。{b}{unit}もらい、{c}{unit}あげました。残りは何{unit}ですか。",
    }[language]
    return Turn(ask, f"{a} + {b} - {c} = {a + b - c}", str(a + b - c))


def _boxes(rng: random.Random, language: str) -> Turn:
    thing, unit = rng.choice(THINGS[language])
    a, b = _number(rng, 2, 9), _number(rng, 2, 9)
    c = _other(rng, b, high=9)
    ask, again = {
        "en": (f"There are {a} boxes with {b} {thing} in each. How many {thing} are there?", f"What if each box holds {c}?"),
        "ja": (f"箱が{a}つあり、どの箱にも{thing}が{b}{unit}入っています。全部で何{unit}ですか。", f"どの箱にも{c}{unit}ならどうですか。"),
    }[language]
    return Turn(ask, f"{a} × {b} = {a * b}", str(a * b), Turn(again, f"{a} × {c} = {a * c}", str(a * c)))


def _comparison(rng: random.Random, language: str) -> Turn:
    small = _number(rng, 2, 60)
    large = small + _number(rng, 1, 30)
    shown = rng.sample((small, large), 2)
    ask = {
        "en": f"Which number is larger, {shown[0]} or {shown[1]}?",
        "ja": f"{shown[0]}と{shown[1]}では、どちらの数が大きいですか。",
    }[language]
    return Turn(ask, f"{large} > {small}", str(large))


def _sequence(rng: random.Random, language: str) -> Turn:
    first, step = _number(rng, 1, 40), _number(rng, 2, 9)
    shown = [first + step * i for i in range(4)]
    ask = {
        "en": f"What number comes next: {', '.join(map(str, shown))}?",
        "ja": f"次の数は何ですか。{'、'.join(map(str, shown))}",
    }[language]
    return Turn(ask, f"{shown[-1]} + {step} = {shown[-1] + step}", str(shown[-1] + step))


def _ordering(rng: random.Random, language: str) -> Turn:
    first, second, third = rng.sample(NAMES[language], 3)
    more, most, least = rng.choice(
        {"en": (("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest")),
         "ja": (("背が高い", "背が高いの", "背が低いの"), ("年上", "年上", "年下"), ("足が速い", "足が速いの", "足が遅いの"))}[language]
    )  # fmt: skip
    wants_most = rng.random() < 0.5
    asked = most if wants_most else least
    facts = [(first, second), (second, third)]
    rng.shuffle(facts)
    ask = {
        "en": " ".join(f"{a} is {more} than {b}." for a, b in facts) + f" Who is the {asked}?",
        "ja": "".join(f"{a}は{b}より{more}です。" for a, b in facts) + f"一番{asked}は誰ですか。",
    }[language]
    return Turn(ask, f"{first} > {second} > {third}", first if wants_most else third)


Form = Callable[[random.Random, str], Turn]
FORMS: tuple[Form, ...] = (
    _addition, _subtraction, _gain, _loss, _gain_and_loss, _boxes, _comparison, _sequence, _ordering,
)  # fmt: skip
NUMERIC_FORMS = tuple(form for form in FORMS if form is not _ordering)
FOLLOW_UP_SHARE = 0.3


def answer_sentence(answer: str, language: str) -> str:
    """The sentence that every answer ends in."""
    return f"The answer is {answer}." if language == "en" else f"答えは{answer}です。"


def generate(num_dialogues: int, num_held_out: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the training file and of the held-out file. No two rows open with one question. Raises UserError when questions run out."""
    rng = random.Random(seed)
    asked: set[str] = set()
    held_out = []
    for number, (turn, language) in enumerate(_new_turns(rng, NUMERIC_FORMS, num_held_out, asked)):
        messages = [{"role": "user", "content": turn.question}]
        held_out.append({"id": f"held-out-{number}", "messages": messages, "answer": turn.answer, "language": language})
    dialogues = []
    for number, (turn, language) in enumerate(_new_turns(rng, FORMS, num_dialogues, asked)):
        messages = _messages(turn, language)
        if turn.follow_up is not None and rng.random() < FOLLOW_UP_SHARE:
            messages += _messages(turn.follow_up, language)
        labels = {"source": "rules", "kind": "chat", "origin": "synthetic", "language": language, "licence": LICENCE}
        dialogues.append({"id": f"rules-{number}", "messages": messages} | labels)
    return dialogues, held_out


def _new_turns(rng: random.Random, forms: tuple[Form, ...], count: int, asked: set[str]) -> Iterator[tuple[Turn, str]]:
    """Yields (turn, language) with questions that are not among `asked`, and adds them to it."""
    for _ in range(count):
        for _ in range(MAX_TRIES):
            language = rng.choice(LANGUAGES)
            turn = rng.choice(forms)(rng, language)
            if turn.question not in asked:
                break
        else:
            raise UserError(f"the rules have no more new questions after {len(asked):,}: ask for fewer --dialogues")
        asked.add(turn.question)
        yield turn, language


def _messages(turn: Turn, language: str) -> list[dict[str, str]]:
    working = f"{turn.working}. " if language == "en" else f"{turn.working}。"
    return [
        {"role": "user", "content": turn.question},
        {"role": "assistant", "content": working + answer_sentence(turn.answer, language)},
    ]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def main(
    out_folder: Annotated[Path, typer.Argument(help="folder for chat.jsonl.gz and held_out.jsonl")],
    dialogues: Annotated[int, typer.Option(help="dialogues to train on", min=1)] = 6000,
    held_out: Annotated[int, typer.Option(help="questions kept for evaluation", min=0)] = 200,
    seed: Annotated[int, typer.Option(help="another seed gives other dialogues")] = 1,
) -> None:
    """Writes rule-based Japanese and English dialogues, and held-out questions of the same forms."""
    training, evaluation = generate(dialogues, held_out, seed)
    out_folder.mkdir(parents=True, exist_ok=True)
    write_whole(out_folder / "chat.jsonl.gz", gzip.compress(_lines(training), mtime=0))
    write_whole(out_folder / "held_out.jsonl", _lines(evaluation))
    print(f"{out_folder}: {len(training):,} dialogues in chat.jsonl.gz, {len(evaluation):,} questions in held_out.jsonl")


if __name__ == "__main__":
    command_line(main)
