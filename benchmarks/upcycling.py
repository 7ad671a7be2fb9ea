"""What upcycling is worth: a dense model continued as it is, and as mixtures of experts made of it in several ways, on the same tokens.

    ./quickstart.sh; python -m benchmarks.upcycling [--seeds 3]       (about an hour on two cores; goes on where it was stopped)

One dense model is trained first; every variant then starts from it with its own draws and its own order of the data per seed. All see
the same number of tokens with the same learning rates. Losses are of blocks that are held out of training, the mean over the sources.
The table goes into RESULTS.md, the curves into docs/upcycling.svg. Each run has one core; speeds are of short runs that take turns.
"""

import itertools
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from evaluation.report.charts import Line, Points, limits, line_chart
from megatron_jobs.checkpoints.weights import shapes
from megatron_jobs.config import RunConfig, from_dict
from megatron_jobs.planning import flops

ROOT = Path(__file__).parents[1]
DATA = ROOT / "runs/quickstart"
RUNS = ROOT / "runs/upcycling"
SOURCES = ("web_ja", "web_en", "code")
ROUNDS = 2
CORES: queue.Queue[int] = queue.Queue()
for core in os.sched_getaffinity(0):
    CORES.put(core)
COLOURS = ("#68655f", "#2a6fd6", "#d4521a", "#2c8a4b")
MIXTURE = dict(num_experts=8, top_k=2)
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "copy": MIXTURE | dict(upcycling=dict(operator="copy")),
    "drop 0.5": MIXTURE | dict(upcycling=dict(operator="drop", drop_ratio=0.5)),
    "granular": dict(num_experts=32, top_k=8, ffn_hidden_size=128, upcycling=dict(operator="granular")),
}


def config_of(name: str, seed: int, moe: dict[str, Any] | None, start: Path | None, steps: int = 150) -> RunConfig:
    run = RUNS / f"{name.replace(' ', '-')}-{seed}"
    values: dict[str, Any] = {
        "run": str(run),
        "seed": seed,
        "tokenizer": str(DATA / "tokenizer"),
        "model": dict(
            num_layers=4, hidden_size=192, ffn_hidden_size=512, num_attention_heads=6, num_query_groups=2, vocab_size=8000,
            tie_embeddings=True,
        ),
        "data": dict(folder=str(DATA / "data"), block_length=2048, validation_tokens=16_384),
        "train": dict(micro_batch_size=16, precision="fp32", checkpoint_interval=1000, validation_interval=10),
        "phases": [
            dict(
                name="web",
                tokens=steps * 4096,
                sequence_length=256,
                global_batch_size=16,
                sources={source: 1.0 for source in SOURCES},
                learning_rate=dict(start=2e-3, end=2e-4, shape="cosine", warmup_steps=10),
            )
        ],
    }  # fmt: skip
    if start and moe is None:
        values["train"]["init_from"] = str(start)
    elif start:
        values["moe"] = moe | {"upcycle_from": str(start)}
    return from_dict(values, name)


def train(config: RunConfig) -> list[dict[str, Any]]:
    """The lines of the run's metrics; trains first, where that was not done."""
    config.run.mkdir(parents=True, exist_ok=True)
    (config.run / "start.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    core = CORES.get()
    command = ["taskset", "-c", str(core), sys.executable, "-m", "megatron_jobs.launch", str(config.run / "start.yaml")]
    subprocess.run(command, cwd=ROOT, check=True)
    CORES.put(core)
    return [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]


def curve(lines: list[dict[str, Any]]) -> Points:
    """(tokens, loss on what is held out)"""
    return [(line["tokens"], statistics.mean(line["validation"].values())) for line in lines if "validation" in line]


def speed(name: str, moe: dict[str, Any] | None, start: Path) -> float:
    """Tokens a second: the median over the last eight of ten steps."""
    shutil.rmtree(RUNS / f"speed-of-{name.replace(' ', '-')}-1", ignore_errors=True)
    lines = train(config_of(f"speed of {name}", 1, moe, start, steps=10))
    return statistics.median(line["tokens_per_second"] for line in lines[2:])


def row(name: str, config: RunConfig, finals: list[float], dense: list[float], speeds: list[float]) -> str:
    parameters = sum(rows * columns for _, (rows, columns) in shapes(config.model, config.moe))
    operations = flops.per_token(config.model, config.moe, config.phases[0].sequence_length)
    gains = [loss - of_dense for loss, of_dense in zip(finals, dense, strict=True)]
    against = "" if name == "dense" else f"{statistics.mean(gains):+.3f} ({', '.join(f'{gain:+.3f}' for gain in gains)})"
    return (
        f"| {name} | {statistics.mean(finals):.3f} ({', '.join(f'{loss:.3f}' for loss in finals)}) | {against} | "
        f"{parameters / 1e6:.1f} M | {operations / 1e6:.1f} | {statistics.median(speeds):,.0f} |"
    )


def draw(curves: dict[str, list[Points]]) -> str:
    """An SVG that stands alone, a line for each seed: on the left the losses, on the right how far they are from the dense run's."""
    colours = dict(zip(curves, COLOURS, strict=True))
    losses = [Line(name, colours[name], (), points) for name, seeds in curves.items() for points in seeds]
    gains = [
        Line(name, colours[name], (), [(x, y - of_dense) for (x, y), (_, of_dense) in zip(points, dense, strict=True)])
        for name, seeds in curves.items()
        for points, dense in zip(seeds, curves["dense"], strict=True)
    ]
    end = max(x for line in losses for x, _ in line.raw)
    charts = [
        line_chart("validation loss, nats a token; three seeds each", losses, (0, end), limits(losses), size=(480, 340)),
        line_chart("the same, minus that of dense with the same seed", gains, (0, end), limits(gains), size=(480, 340)),
    ]
    style = "text{font:12px system-ui,sans-serif;fill:#68655f}.grid{stroke:#e7e5e0}.axis{stroke:#a9a59d}.raw{fill:none;stroke-width:1.4}"
    legend = "".join(
        f'<rect x="{60 + 110 * n}" y="352" width="11" height="11" fill="{colour}"/><text x="{76 + 110 * n}" y="362">{name}</text>'
        for n, (name, colour) in enumerate(colours.items())
    )
    placed = [chart.replace("<svg ", f'<svg x="{500 * n}" y="4" width="480" height="340" ', 1) for n, chart in enumerate(charts)]
    whole = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 990 376" width="990" height="376">'
    return f'{whole}<style>{style}</style><rect width="990" height="376" fill="#ffffff"/>{"".join(placed)}{legend}</svg>\n'


def main(seeds: Annotated[int, typer.Option(help="runs of each variant")] = 3) -> None:
    """Trains whatever is not there yet, prints the table and draws the curves."""
    base = config_of("base", 1, None, None, steps=200)
    before = curve(train(base))[-1][1]
    start = base.run / "checkpoints/latest"
    configs = {name: [config_of(name, seed, moe, start) for seed in range(11, 11 + seeds)] for name, moe in VARIANTS.items()}
    with ThreadPoolExecutor(CORES.qsize()) as pool:
        list(pool.map(train, itertools.chain(*configs.values())))
    runs = {name: [train(config) for config in of_seeds] for name, of_seeds in configs.items()}
    rounds = [{name: speed(name, moe, start) for name, moe in VARIANTS.items()} for _ in range(ROUNDS)]
    curves = {name: [curve(lines) for lines in of_seeds] for name, of_seeds in runs.items()}
    finals = {name: [points[-1][1] for points in of_seeds] for name, of_seeds in curves.items()}
    rows = [row(name, configs[name][0], finals[name], finals["dense"], [turn[name] for turn in rounds]) for name in VARIANTS]
    print(f"\nvalidation loss of the dense model that all start from: {before:.3f}\n")
    print("| continued as | validation loss (each seed) | minus dense | parameters | MFLOP a token | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs/upcycling.svg").write_text(draw(curves), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
