"""Rule-based dialogues: small sums, look-ups and comparisons in Japanese and English, for a model too small to learn from a teacher.

    python -m data_prep.synthetic.rules OUT_FOLDER --dialogues 6000 --held-out 200 --pairs 1000 --seed 1

Writes OUT_FOLDER/chat.jsonl.gz (documents of kind chat, origin synthetic), OUT_FOLDER/held_out.jsonl ({id, messages: [user turn],
answer, language}) and OUT_FOLDER/pairs.jsonl.gz ({messages, chosen, rejected}: a right answer, and one with another number). All ask in the
same forms, and no question is asked in two of the files. Every answer ends in one fixed sentence, `The answer is 12.` or `答えは12です。`,
after one sentence of working. The bytes depend on the arguments alone.
"""

import gzip
import json
import random
import re
from collections.abc import Callable
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
MOST = 9  # the largest number that is asked or answered: one digit, which a few million tokens teach a small model to reckon with
MAX_TRIES = 200  # for a question that has not been asked; beyond it the forms are used up


Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Turn:
    """A question and its answer. `follow_up` asks the same with another number."""

    question: str
    working: str
    answer: str
    follow_up: "Turn | None" = None


def _addition(rng: random.Random, language: str) -> Turn:
    a = rng.randint(1, MOST - 2)
    b, c = rng.sample(range(1, MOST - a + 1), 2)
    ask = rng.choice(
        {"en": ("What is {} + {}?", "Add {} and {}.", "What is the sum of {} and {}?"),
         "ja": ("{} + {} は?", "{}と{}を足してください。", "{}たす{}はいくつですか。")}[language]
    )  # fmt: skip
    again = {"en": f"What if the second number is {c}?", "ja": f"2つ目の数が{c}ならどうですか。"}[language]
    return Turn(ask.format(a, b), f"{a} + {b} = {a + b}", str(a + b), Turn(again, f"{a} + {c} = {a + c}", str(a + c)))


def _subtraction(rng: random.Random, language: str) -> Turn:
    a = rng.randint(3, MOST)
    b, c = rng.sample(range(1, a), 2)
    ask = rng.choice(
        {"en": ("What is {} - {}?", "What is {} minus {}?", "Start at {} and take away {}."),
         "ja": ("{} - {} は?", "{}ひく{}はいくつですか。", "{}から{}を引いてください。")}[language]
    )  # fmt: skip
    again = {"en": f"What if the second number is {c}?", "ja": f"2つ目の数が{c}ならどうですか。"}[language]
    return Turn(ask.format(a, b), f"{a} - {b} = {a - b}", str(a - b), Turn(again, f"{a} - {c} = {a - c}", str(a - c)))


def _gain(rng: random.Random, language: str) -> Turn:
    name, (thing, unit) = rng.choice(NAMES[language]), rng.choice(THINGS[language])
    a = rng.randint(2, MOST - 2)
    b, c = rng.sample(range(1, MOST - a + 1), 2)
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
    a = rng.randint(3, MOST)
    b, c = rng.sample(range(1, a), 2)
    ask, again = {
        "en": (f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?", f"What if {name} gives away {c} instead?"),
        "ja": (f"{name}は{thing}を{a}{unit}持っています。{b}{unit}あげました。残りは何{unit}ですか。", f"{c}{unit}あげたらどうですか。"),
    }[language]
    return Turn(ask, f"{a} - {b} = {a - b}", str(a - b), Turn(again, f"{a} - {c} = {a - c}", str(a - c)))


def _look_up(rng: random.Random, language: str) -> Turn:
    thing, unit = rng.choice(THINGS[language])
    names, numbers = rng.sample(NAMES[language], 2), rng.sample(range(2, MOST + 1), 2)
    asked = rng.randrange(2)
    facts = list(zip(names, numbers, strict=True))
    ask, again = {
        "en": (
            " and ".join(f"{name} has {number} {thing}" for name, number in facts) + f". How many does {names[asked]} have?",
            f"And {names[1 - asked]}?",
        ),
        "ja": (
            "、".join(f"{name}は{thing}を{number}{unit}" for name, number in facts) + f"持っています。{names[asked]}は何{unit}ですか。",
            f"では、{names[1 - asked]}は?",
        ),
    }[language]
    says = [f"{number} {thing}" if language == "en" else f"{number}{unit}" for number in numbers]
    follow_up = Turn(again, says[1 - asked], str(numbers[1 - asked]))
    return Turn(ask, says[asked], str(numbers[asked]), follow_up)


def _boxes(rng: random.Random, language: str) -> Turn:
    thing, unit = rng.choice(THINGS[language])
    a = rng.randint(2, MOST // 3)
    b, c = rng.sample(range(2, MOST // a + 1), 2)
    ask, again = {
        "en": (f"There are {a} boxes with {b} {thing} in each. How many {thing} are there?", f"What if each box holds {c}?"),
        "ja": (f"箱が{a}つあり、どの箱にも{thing}が{b}{unit}入っています。全部で何{unit}ですか。", f"どの箱にも{c}{unit}ならどうですか。"),
    }[language]
    return Turn(ask, f"{a} × {b} = {a * b}", str(a * b), Turn(again, f"{a} × {c} = {a * c}", str(a * c)))


def _comparison(rng: random.Random, language: str) -> Turn:
    small, large = sorted(rng.sample(range(1, MOST + 1), 2))
    shown = rng.sample((small, large), 2)
    ask = {
        "en": f"Which number is larger, {shown[0]} or {shown[1]}?",
        "ja": f"{shown[0]}と{shown[1]}では、どちらの数が大きいですか。",
    }[language]
    return Turn(ask, f"{large} > {small}", str(large))


def _sequence(rng: random.Random, language: str) -> Turn:
    step = rng.randint(1, 2)
    first = rng.randint(1, MOST - 3 * step)
    shown = [first + step * i for i in range(3)]
    ask = {
        "en": f"What number comes next: {', '.join(map(str, shown))}?",
        "ja": f"次の数は何ですか。{'、'.join(map(str, shown))}",
    }[language]
    return Turn(ask, f"{shown[-1]} + {step} = {shown[-1] + step}", str(shown[-1] + step))


Form = Callable[[random.Random, str], Turn]
FORMS: tuple[Form, ...] = (_addition, _subtraction, _gain, _loss, _look_up, _boxes, _comparison, _sequence)
FOLLOW_UP_SHARE = 0.3


def answer_sentence(answer: str, language: str) -> str:
    """The sentence that every answer ends in."""
    return f"The answer is {answer}." if language == "en" else f"答えは{answer}です。"


def generate(num_dialogues: int, num_held_out: int, seed: int, num_pairs: int = 0) -> tuple[Rows, Rows, Rows]:
    """Rows of the training file, of the held-out file and of the pairs, drawn alike. No two open with one question. Raises UserError when
    questions run out.
    """
    rng = random.Random(seed)
    turns = _new_turns(rng, num_dialogues + num_held_out + num_pairs)
    rng.shuffle(turns)  # of forms with few questions the first ones have more
    dialogues, held_out, pairs = Rows(), Rows(), Rows()
    for number, (turn, language) in enumerate(turns[:num_held_out]):
        messages = [{"role": "user", "content": turn.question}]
        held_out.append({"id": f"held-out-{number}", "messages": messages, "answer": turn.answer, "language": language})
    for number, (turn, language) in enumerate(turns[num_held_out : num_held_out + num_pairs]):
        question, right = _messages(turn, language)
        _, wrong = _messages(_mistaken(rng, turn), language)
        answers = {"chosen": right["content"], "rejected": wrong["content"]}
        pairs.append({"id": f"pair-{number}", "messages": [question], **answers} | _labels(language))
    for number, (turn, language) in enumerate(turns[num_held_out + num_pairs :]):
        messages = _messages(turn, language)
        if turn.follow_up is not None and rng.random() < FOLLOW_UP_SHARE:
            messages += _messages(turn.follow_up, language)
        dialogues.append({"id": f"rules-{number}", "messages": messages, "kind": "chat"} | _labels(language))
    return dialogues, held_out, pairs


def _labels(language: str) -> dict[str, str]:
    return {"source": "rules", "origin": "synthetic", "language": language, "licence": LICENCE}


def _mistaken(rng: random.Random, turn: Turn) -> Turn:
    """The same question, answered with another number: one that it names, where it names the right one too."""
    named = set(re.findall(r"\d", turn.question))
    others = named if turn.answer in named else map(str, range(1, MOST + 1))
    wrong = rng.choice(sorted(set(others) - {turn.answer}))
    before, _, after = turn.working.rpartition(turn.answer)
    return Turn(turn.question, before + wrong + after, wrong)


def _new_turns(rng: random.Random, count: int) -> list[tuple[Turn, str]]:
    """(turn, language), no question twice."""
    turns: dict[str, tuple[Turn, str]] = {}
    for _ in range(count):
        for _ in range(MAX_TRIES):
            language = rng.choice(LANGUAGES)
            turn = rng.choice(FORMS)(rng, language)
            if turn.question not in turns:
                break
        else:
            raise UserError(f"the rules have no more new questions after {len(turns):,}: ask for fewer --dialogues and --pairs")
        turns[turn.question] = turn, language
    return list(turns.values())


def _messages(turn: Turn, language: str) -> list[dict[str, str]]:
    working = f"{turn.working}. " if language == "en" else f"{turn.working}。"
    return [
        {"role": "user", "content": turn.question},
        {"role": "assistant", "content": working + answer_sentence(turn.answer, language)},
    ]


def _lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def main(
    out_folder: Annotated[Path, typer.Argument(help="folder for chat.jsonl.gz, held_out.jsonl and pairs.jsonl.gz")],
    dialogues: Annotated[int, typer.Option(help="dialogues to train on", min=1)] = 6000,
    held_out: Annotated[int, typer.Option(help="questions kept for evaluation", min=0)] = 200,
    pairs: Annotated[int, typer.Option(help="pairs of a right and a wrong answer", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="another seed gives other dialogues")] = 1,
) -> None:
    """Writes rule-based Japanese and English dialogues, and of the same forms held-out questions and pairs of answers."""
    training, evaluation, preferences = generate(dialogues, held_out, seed, pairs)
    out_folder.mkdir(parents=True, exist_ok=True)
    write_whole(out_folder / "chat.jsonl.gz", gzip.compress(_lines(training), mtime=0))
    write_whole(out_folder / "held_out.jsonl", _lines(evaluation))
    if pairs:
        write_whole(out_folder / "pairs.jsonl.gz", gzip.compress(_lines(preferences), mtime=0))
    print(
        f"{out_folder}: {len(training):,} dialogues in chat.jsonl.gz, {len(evaluation):,} questions in held_out.jsonl"
        + (f", {pairs:,} pairs in pairs.jsonl.gz" if pairs else "")
    )


if __name__ == "__main__":
    command_line(main)
