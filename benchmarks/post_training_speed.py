"""How fast post-training is on a CPU: ours against TRL's trainer, SFT against pretraining, DPO against SFT.

    python -m benchmarks.post_training_speed [--quick] [--json FILE]

A Llama of 33 million parameters in float32, 4,096 places a step. The dialogues have real lengths, log-normal with a median of 100 tokens
and σ 0.9, cut at 1,024 (those of 4,096 by four). Every side is a process of its own that stands still while another makes its step. The
first STEPS_NOT_COUNTED steps of each are left out; rates are medians, and a ratio is the median of those of the turns.

    SFT, ours               packs of 1,024
    SFT, TRL padded         8 dialogues at a time, three times a step, as SFTTrainer shuffles and pads them
    SFT, TRL packed         SFTTrainer's packing (bfd, without padding; sdpa), 1,024 at a time, four times a step
    pretraining, ours       the same shape, next tokens of a stream
    DPO, ours               pairs in packs; a turn of its references is as many pairs as a step's, and counts as part of a step

Tokens are those of dialogues, prompts included, and no padding. TRL without recomputed activations, which is not its default.
"""

import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.post_training import ROOT, WORDS, environment_of_peers, versions, write_sources
from benchmarks.turns import Turns, play

LENGTH, BATCH, STEPS_NOT_COUNTED = 1024, 4, 2
MODEL = dict(num_layers=8, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, num_query_groups=4, vocab_size=8000)
QUICK = dict(num_layers=2, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, num_query_groups=2, vocab_size=1000)
LOSSES = {"SFT, ours": "answers", "pretraining, ours": "next_token", "DPO, ours": "preference"}
TRL = {
    "SFT, TRL padded": dict(per_device_train_batch_size=8, gradient_accumulation_steps=3, max_length=LENGTH),
    "SFT, TRL packed": dict(per_device_train_batch_size=1, gradient_accumulation_steps=BATCH, max_length=LENGTH, packing=True),
}
# What is beside what, and what was asked for.
RATIOS = [
    ("SFT, ours", "SFT, TRL padded", 3.0),
    ("SFT, ours", "SFT, TRL packed", 1.2),
    ("SFT, ours", "pretraining, ours", 0.95),
    ("DPO, ours", "SFT, ours", 0.85),
]


def make_inputs(folder: Path, steps: int) -> None:
    """Token binaries of dialogues and of pairs, for so many steps."""
    draw = random.Random(1)

    def text(tokens: float) -> str:
        return " ".join(draw.choices(WORDS, k=max(1, round(tokens / 1.2))))  # tokens a word

    def size(at_most: float) -> float:
        return min(at_most, draw.lognormvariate(math.log(100), 0.9))

    def said(role: str, tokens: float) -> dict[str, str]:
        return {"role": role, "content": text(tokens)}

    chat, pairs, places = [], [], 0.0
    while places < (steps + 1) * BATCH * LENGTH:
        tokens = size(900)
        places += tokens
        chat.append({"messages": [said("user", 0.3 * tokens), said("assistant", 0.7 * tokens)]})
    places = 0.0
    while places < (steps + 1) * BATCH * LENGTH:
        asked, answers = size(130), (size(300), size(300))
        places += 2 * asked + sum(answers)
        chosen, rejected = map(text, answers)
        pairs.append({"messages": [said("user", asked)], "chosen": f"{chosen} {len(pairs)}", "rejected": rejected})
    write_sources(folder, chat, pairs)


def configured(folder: Path, name: str, quick: bool, steps: int) -> Any:
    from megatron_jobs.config import from_dict

    kind = LOSSES[name]
    phase: dict[str, Any] = dict(
        name="all",
        sequence_length=LENGTH,
        global_batch_size=BATCH,
        tokens=steps * BATCH * LENGTH if kind == "next_token" else None,
        sources={"pairs": {"epochs": 1}} if kind == "preference" else {"chat": 1.0 if kind == "next_token" else {"epochs": 1}},
        learning_rate=dict(start=1e-4, end=1e-4, shape="constant"),
        loss={"kind": kind} | ({} if kind == "next_token" else {"too_long": "drop"}),
    )
    values = {
        "run": str(folder / kind),
        "tokenizer": str(folder / "tokenizer"),
        "model": QUICK if quick else MODEL,
        "data": dict(folder=str(folder / "data"), block_length=LENGTH, max_epochs=2),
        "train": dict(micro_batch_size=1, precision="fp32", checkpoint_interval=1_000_000),
        "phases": [phase],
    }
    return from_dict(values, "the benchmark")


def ours(folder: Path, name: str, quick: bool, steps: int) -> dict[str, Any]:
    from megatron_jobs import references, train
    from megatron_jobs.check import check
    from megatron_jobs.data import phases
    from megatron_jobs.engine import groups
    from megatron_jobs.engine.passes import Passes
    from megatron_jobs.engine.state import TrainingState

    config = configured(folder, name, quick, steps)
    resolved, order = check(config, 1)
    assert phases.num_steps(resolved.phases) >= steps
    lengths = {source: facts.dialogues.lengths for source, facts in order.sources.items()}
    is_stream = LOSSES[name] == "next_token"

    def tokens(step: int) -> int:
        if is_stream:
            return LENGTH * BATCH
        return sum(int(lengths[source][list(numbers)].sum()) for source, numbers in order.samples(step, range(BATCH)))

    references.AT_ONCE = BATCH  # a turn is as much as a step
    turns = Turns()

    def with_turn(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            result = function(*arguments)
            turns.step_is_done(what)
            return result

        return timed

    Passes.log_probabilities = with_turn(Passes.log_probabilities, "references")
    TrainingState.update = with_turn(TrainingState.update, "step")
    with groups.of_run(config.parallel, config.seed):
        train.train(config, last_step=steps)
    return {"tokens": [tokens(step) for step in range(steps)], "peak_bytes": turns.peak_bytes}


def trl(folder: Path, name: str, quick: bool, steps: int) -> None:
    """Writes the job of one of TRL's sides."""
    from megatron_jobs.check import check
    from megatron_jobs.data import feeder

    config, _ = check(configured(folder, "SFT, ours", quick, steps), 1)
    binary = feeder.open_sources(config)["chat"]
    rows = []
    for document in range(len(binary.lengths)):
        start, end = binary.bounds(document)
        ids, said = binary.read(start, end - start).tolist(), binary.read_channel("weights", start, end - start)
        rows.append({"input_ids": ids, "labels": [token if weight else -100 for token, weight in zip(ids, said, strict=True)]})
    job = {"model": config.model.model_dump(), "rows": rows, "max_steps": steps, "options": TRL[name]}
    (folder / f"{name}.json").write_text(json.dumps(job))


def measure(folder: Path, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each side's tokens a second and peak memory; and the ratios."""
    steps = STEPS_NOT_COUNTED + (3 if quick else 20)
    with contextlib.redirect_stdout(sys.stderr):
        make_inputs(folder, steps)
        for name in TRL:
            trl(folder, name, quick, steps)
    mine = [sys.executable, "-W", "ignore", "-m", "benchmarks.post_training_speed", "--steps", str(steps), *(["--quick"] if quick else [])]
    commands = {name: [*mine, "--folder", str(folder), "--side", name] for name in LOSSES}
    theirs = [sys.executable, "-W", "ignore", "-m", "benchmarks.trl_side", "--in-turns"]
    commands |= {name: [*theirs, str(folder / f"{name}.json")] for name in TRL}
    taken, found = play(commands, cwd=ROOT, env=environment_of_peers(), stderr=subprocess.DEVNULL)
    rates: dict[str, list[float]] = {}
    for name, turns in taken.items():
        seconds = [second for what, second in turns if what == "step"]
        of_references = [second for what, second in turns if what == "references"]
        extra = statistics.median(of_references) if of_references else 0.0
        pairs = list(zip(found[name]["tokens"], seconds, strict=True))[STEPS_NOT_COUNTED:]
        rates[name] = [tokens / (second + extra) for tokens, second in pairs]
        if of_references:
            rates[f"{name}, two epochs"] = [tokens / (second + extra / 2) for tokens, second in pairs]
            rates[f"{name}, without references"] = [tokens / second for tokens, second in pairs]
    table = [
        {"what": name, "tokens_per_second": statistics.median(values), "peak_mib": found.get(name, {}).get("peak_bytes", 0) / 2**20}
        for name, values in rates.items()
    ]
    ratios = []
    for one, other, asked in RATIOS:
        low, middle, high = statistics.quantiles([a / b for a, b in zip(rates[one], rates[other], strict=True)])
        ratios.append({"what": one, "beside": other, "to_reach": asked, "found": middle, "quartiles": [low, high]})
    peaks = {name: found[name]["peak_bytes"] for name in LOSSES}
    ratios.append({"what": "DPO, peak memory", "beside": "SFT, ours", "to_reach": 1.05, "found": peaks["DPO, ours"] / peaks["SFT, ours"]})
    return table, ratios


def main(
    quick: Annotated[bool, typer.Option("--quick", help="a smaller model and few steps: to see that it works")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the figures here")] = None,
    side: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
    steps: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Measures all sides in turn and prints the tables."""
    if side:
        with contextlib.redirect_stdout(sys.stderr):
            result = ours(folder, side, quick, steps)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as name:
        table, ratios = measure(Path(name), quick)
    print(f"\n{versions()}; {len(os.sched_getaffinity(0))} cores\n\n| what | tokens/s | peak MiB |\n| --- | --- | --- |")
    for each in table:
        print(f"| {each['what']} | {each['tokens_per_second']:,.0f} | {each['peak_mib']:,.0f} |")
    print("\n| what | beside | to reach | found | quartiles |\n| --- | --- | --- | --- | --- |")
    for each in ratios:
        spread = " to ".join(f"{value:.2f}" for value in each.get("quartiles", []))
        print(f"| {each['what']} | {each['beside']} | {each['to_reach']} | {each['found']:.2f} | {spread} |")
    if json_file:
        json_file.write_text(json.dumps({"sides": table, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    typer.run(main)
