"""Lets a model answer prompts several times, judges its answers, and writes pairs of a preferred and a rejected one.

    mujina preferences CONFIG.yaml [key=value …]

`mujina explain --of preferences` tells what the configuration holds. The folder `output` gets

    pairs.jsonl      {"id", "messages", "chosen", "rejected", "provenance"} a line, which `mujina prepare` reads in sources of kind
                     preferences; `language` and `licence` where the prompt's row has them. `provenance`: `model`, `judge`, the sampling,
                     and `numbers` and `scores` of the two answers
    summary.json     how many there were of what, and why others are no pairs
    journal.jsonl    every answer (mujina/answers/journal.py): killed or stopped at any moment, the same command goes on, and asks nothing twice

An answer that is empty, or did not end by itself, is left out.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from evaluation.preferences.choice import Judged, by_scores, chosen_pairs
from evaluation.preferences.config import PreferencesConfig
from evaluation.preferences.prompts import Prompt, read_prompts
from evaluation.preferences.rules import scorer
from evaluation.progress import asked
from mujina.answers import Answer, Answerer, Failure, Request, open_answerer
from mujina.answers.journal import Journal, Journalled, open_journal
from mujina.files import write_whole
from mujina.user_input import UserError, command_line, read_yaml

COUNTS = ("prompts", "answers", "failed answers", "answers cut off", "empty answers", "prompts without a pair", "pairs")


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="the configuration")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for any field of it")] = None,
) -> None:
    """Makes pairs of preferred and rejected answers out of prompts."""
    make(read_yaml(config, PreferencesConfig, overrides))


def make(config: PreferencesConfig) -> None:
    """Raises UserError, and writes nothing, where no pair comes out."""
    prompts = read_prompts(config.prompts, config.limit)
    scorers = [scorer(config.judge, prompt) for prompt in prompts]  # a mistake in a row is told before a model is loaded
    with open_journal(config.output / "journal.jsonl") as journal:
        _make(config, prompts, scorers, journal)


def _make(config: PreferencesConfig, prompts: list[Prompt], scorers: list[Callable[[str], float]], journal: Journal) -> None:
    counts = dict.fromkeys(COUNTS, 0) | {"prompts": len(prompts)}
    model, answers = _answers(config, prompts, journal, counts)
    judged = [by_scores([None if text is None else score(text) for text in texts]) for score, texts in zip(scorers, answers, strict=True)]
    provenance = {"model": model, "judge": config.judge.model_dump(mode="json"), **asdict(config.answers.sampling)}
    rows = [row for one in zip(prompts, answers, judged, strict=True) for row in _rows(config, provenance, *one)]
    counts["pairs"] = len(rows)
    counts["prompts without a pair"] = len(prompts) - len({row["provenance"]["prompt"] for row in rows})
    _show(config, counts)
    if not rows:
        remedy = "raise answers.temperature or answers.number, or give prompts that the model answers now right, now wrong"
        raise UserError(f"{config.output}: no pairs: of no prompt is one answer better than another: {remedy}")
    write_whole(config.output / "pairs.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    write_whole(config.output / "summary.json", (json.dumps(counts, indent=2) + "\n").encode())
    print(f"{config.output / 'pairs.jsonl'}: {len(rows):,} pairs")


def _answers(
    config: PreferencesConfig, prompts: list[Prompt], journal: Journal, counts: dict[str, int]
) -> tuple[str, list[list[str | None]]]:
    """Who answered, and the answers to each prompt, None in the place of one that is left out."""
    answerer: Answerer = Journalled(open_answerer(config.answers.model), journal)
    sampling = config.answers.sampling
    texts: list[list[str | None]] = [[None] * sampling.num_answers for _ in prompts]
    wanted = (
        ((row, number), Request(prompt.conversation, sampling, number))
        for row, prompt in enumerate(prompts)
        for number in range(sampling.num_answers)
    )
    for (row, number), found in asked(answerer, wanted, len(prompts) * sampling.num_answers, "answering"):
        counts["answers"] += 1
        if isinstance(found, Failure):
            counts["failed answers"] += 1
            if counts["failed answers"] == 1:
                print(f"{prompts[row].where}: has no answer: {found.reason}")
        elif isinstance(found, Answer) and not found.stopped:
            counts["answers cut off"] += 1
        elif not found.text:
            counts["empty answers"] += 1
        else:
            texts[row][number] = found.text
    return answerer.model, texts


def _rows(
    config: PreferencesConfig, provenance: dict[str, Any], prompt: Prompt, texts: list[str | None], judged: Judged
) -> list[dict[str, Any]]:
    labels = {name: prompt.fields[name] for name in ("language", "licence") if isinstance(prompt.fields.get(name), str)}
    messages = [message.model_dump() for message in prompt.conversation.messages]
    rows = []
    for chosen, rejected in chosen_pairs(judged, [text or "" for text in texts], config.choose):
        scores = [judged.scores[number] for number in (chosen, rejected)]
        rows.append(
            {
                "id": f"{prompt.id}#{chosen}-{rejected}",
                "messages": messages,
                "chosen": texts[chosen],
                "rejected": texts[rejected],
                **labels,
                "provenance": {**provenance, "prompt": prompt.where, "numbers": [chosen, rejected], "scores": scores},
            }
        )
    return rows


def _show(config: PreferencesConfig, counts: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", str(config.output))
    table.columns[-1].justify = "right"
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    command_line(main)
