"""Lets a model answer prompts several times, judges its answers, and writes pairs of a preferred and a rejected one.

    mujina preferences CONFIG.yaml [key=value …]

`mujina explain --of preferences` tells what the configuration holds. The folder `output` gets

    pairs.jsonl      {"id", "messages", "chosen", "rejected", "provenance"} a line, which `mujina prepare` reads in sources of kind
                     preferences; `language` and `licence` where the prompt's row has them. `provenance`: `model`; `judge` (a
                     rule, or a model with its prompt's name, version and SHA-256); the sampling; `numbers` and `scores` of the two answers
    summary.json     how many there were of what, and why others are no pairs
    journal.jsonl    every answer and judgement (mujina/answers/journal.py): killed or stopped at any moment, the same command goes on, and
                     asks nothing twice

An answer that is empty, or did not end by itself, is left out.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from evaluation.preferences.choice import Judged, chosen_pairs
from evaluation.preferences.config import NumberRule, PatternRule, PreferencesConfig
from evaluation.preferences.judge import ModelJudge
from evaluation.preferences.rows import Prompt, read_prompts
from evaluation.preferences.rules import RuleJudge
from evaluation.progress import asked
from mujina.answers import Answer, Answerer, Failure, Request, open_answerer
from mujina.answers.journal import Journal, Journalled, open_journal
from mujina.files import write_whole
from mujina.user_input import UserError, command_line, read_yaml

COUNTS = {  # what is counted, and what it is a share of
    "prompts": "",
    "answers": "",
    "failed answers": "answers",
    "answers cut off": "answers",
    "empty answers": "answers",
    "judgements": "",
    "failed judgements": "judgements",
    "judgements without a verdict": "judgements",
    "disagreements": "",
    "ties": "",
    "prompts without a pair": "prompts",
    "pairs": "",
}


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="the configuration")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for any field of it")] = None,
) -> None:
    """Makes pairs of preferred and rejected answers out of prompts."""
    make(read_yaml(config, PreferencesConfig, overrides))


def make(config: PreferencesConfig) -> None:
    """Raises UserError, and writes nothing, where no pair comes out."""
    prompts = read_prompts(config.prompts, config.limit)
    # A mistake in a row, or in a judge's prompt, is told before a model is opened.
    judge = RuleJudge(config.judge, prompts) if isinstance(config.judge, NumberRule | PatternRule) else ModelJudge(config.judge)
    counts = dict.fromkeys(COUNTS, 0) | {"prompts": len(prompts)}
    with open_journal(config.output / "journal.jsonl") as journal:
        model, answers = _answers(config, prompts, journal, counts)
        judged = judge.judge(answers) if isinstance(judge, RuleJudge) else judge.judge(prompts, answers, journal, counts)
        provenance = {"model": model, "judge": judge.provenance, **asdict(config.answers.sampling)}
        rows = [_rows(config, provenance, *one) for one in zip(prompts, answers, judged, strict=True)]
        counts |= {"pairs": sum(map(len, rows)), "prompts without a pair": rows.count([])}
        _show(config, counts)
        if not counts["pairs"]:
            raise UserError(f"{config.output}: no pairs: {_why_none(counts)}")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for few in rows for row in few]
        write_whole(config.output / "pairs.jsonl", "".join(lines).encode())
        write_whole(config.output / "summary.json", (json.dumps(counts, indent=2) + "\n").encode())
    print(f"{config.output / 'pairs.jsonl'}: {counts['pairs']:,} pairs")


def _why_none(counts: dict[str, int]) -> str:
    left_out = sum(counts[name] for name in ("failed answers", "answers cut off", "empty answers"))
    useless = counts["failed judgements"] + counts["judgements without a verdict"]
    if 2 * left_out > counts["answers"]:
        return f"{left_out:,} of {counts['answers']:,} answers failed, were cut off or empty: look at what the model says (journal.jsonl)"
    if 2 * useless > counts["judgements"]:
        return f"{useless:,} of {counts['judgements']:,} judgements failed or have no verdict: look at what the judge says (journal.jsonl)"
    remedy = "raise answers.temperature or answers.number, or give prompts that the model answers now well, now badly"
    return f"of no prompt is one answer better than another: {remedy}"


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
                "provenance": {**provenance, "numbers": [chosen, rejected], "scores": scores},
            }
        )
    return rows


def _show(config: PreferencesConfig, counts: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", str(config.output))
    table.columns[-1].justify = "right"
    for name, count in counts.items():
        of = counts.get(COUNTS[name], 0)
        if count:
            table.add_row(name, f"{count:,}{f' ({count / of:.1%})' if of else ''}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    command_line(main)
