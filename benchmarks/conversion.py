"""Conversion against dd and transformers, and upcycling against mergekit's Mixtral builder, on one disk: seconds and peak memory.

    python -m benchmarks.conversion FOLDER TOKENIZER [PYTHON_WITH_MERGEKIT]        (some minutes, 5 GB of memory, 12 GB of disk)

A dense model of 221 million parameters, and its mixture of 4 experts, in float32 on both sides. The ways take turns. Each is a process of
its own, timed from after its imports until its files are on the disk (fsync); before it, its input is put out of the page cache
(POSIX_FADV_DONTNEED). Figures are medians. Nothing compares logits here, as the others do not.
"""

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from benchmarks.checkpoints import dd, forget, timed
from megatron_jobs.checkpoints.checkpoint import Writer, box_key
from megatron_jobs.checkpoints.weights import drawn, shapes
from megatron_jobs.config import RunConfig, from_dict
from megatron_jobs.data.ledger import Ledger
from mujina.matrices import Box
from mujina.tensor_files import Planned
from tokenization.load import load as load_tokenizer

ROUNDS = 3
EXPERTS = 4

CHILD = """
import os, sys, time
from pathlib import Path
{imports}
source, output, config = map(Path, sys.argv[1:])
began = time.perf_counter()
{work}
for path in output.rglob("*"):
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file)
seconds = time.perf_counter() - began
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("measured", seconds, peak / 2**20)
"""
OURS = "import rich.progress, safetensors, transformers, mujina.tensor_files, megatron_jobs.checkpoints.checkpoint, tokenization.load"
WAYS = {  # imports, work
    "convert": (
        f"{OURS}\nfrom transformers import GenerationConfig, LlamaConfig, MixtralConfig\nfrom megatron_jobs.conversion import convert",
        "convert.main(source, output, no_check=True)",
    ),
    "transformers": (
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM",
        'AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True).save_pretrained(output)',
    ),
    "upcycle": (f"{OURS}\nfrom megatron_jobs.conversion import upcycle", "upcycle.main(config, source, output, no_check=True)"),
    "mergekit": (
        "from mergekit.scripts.moe import main",
        'main([str(config), str(output), "--i-understand-this-is-not-useful-without-training"], standalone_mode=False)',
    ),
}


def config(folder: Path, tokenizer: Path, **moe: int) -> RunConfig:
    rate = dict(start=1e-4, end=1e-4)
    phase = dict(name="a", tokens=2**20, sequence_length=1024, global_batch_size=1, sources={"web": 1}, learning_rate=rate)
    size = dict(num_layers=16, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16, num_query_groups=16)
    values = {
        "run": str(folder / "run"),
        "tokenizer": str(tokenizer),
        "model": size | {"vocab_size": load_tokenizer(tokenizer).vocab_size},
        "data": dict(folder="none"),
        "train": dict(micro_batch_size=1, precision="fp32"),
        "phases": [phase],
    }
    return from_dict(values | ({"moe": moe} if moe else {}), "benchmark")


def save(settings: RunConfig, folder: Path) -> Path:
    """A checkpoint of random weights, in two files."""
    writer = Writer(folder, 1)
    writer.clear()
    wanted = dict(shapes(settings.model, None))
    pieces = [
        Planned(box_key("master", name, Box(0, rows, 0, columns)), shape, torch.float32, partial(drawn, 1, name, shape, 0.02))
        for name, shape in wanted.items()
        for rows, columns in [shape]
    ]
    for rank in range(2):
        writer.stream_rank_file(rank, pieces[rank::2], lambda part: None)
    return writer.finish(settings, 0, wanted, Ledger())


def child(python: str, way: str, source: Path, output: Path, its_config: Path) -> tuple[float, float]:
    """Seconds, and GiB at the peak."""
    imports, work = WAYS[way]
    shutil.rmtree(output, ignore_errors=True)
    for file in source.glob("*.safetensors"):
        forget(file)
    command = [python, "-c", CHILD.format(imports=imports, work=work), source, output, its_config]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if ended.returncode:
        sys.exit(f"{way}: {ended.stderr}")
    seconds, peak = ended.stdout.split("measured")[1].split()
    return float(seconds), float(peak)


def copy(source: Path, output: Path) -> float:
    """Seconds of dd for the files of a folder."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    files = sorted(source.glob("*.safetensors"))
    for file in files:
        forget(file)
    return timed(lambda: [dd(f"if={file}", f"of={output / file.name}", "conv=fsync") for file in files])


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def main(folder: Path, tokenizer: Path, mergekit: str | None = None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = save(config(folder, tokenizer), folder / "dense")
    hugging_face = folder / "hf"
    child(sys.executable, "convert", checkpoint, hugging_face, folder)
    mixture, merge = folder / "moe.yaml", folder / "mergekit.yaml"
    mixture.write_text(yaml.safe_dump(config(folder, tokenizer, num_experts=EXPERTS, top_k=2).model_dump(mode="json")))
    experts = [{"source_model": str(hugging_face), "positive_prompts": [""]}] * EXPERTS
    merge.write_text(json.dumps({"base_model": str(hugging_face), "gate_mode": "random", "dtype": "float32", "experts": experts}))
    ways = [
        ("convert", sys.executable, checkpoint, folder),
        ("transformers", sys.executable, hugging_face, folder),
        ("upcycle", sys.executable, checkpoint, mixture),
    ] + ([("mergekit", mergekit, hugging_face, merge)] if mergekit else [])

    seconds: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}
    written: dict[str, int] = {}
    print(f"load before: {os.getloadavg()[0]:.1f}", flush=True)
    for _ in range(ROUNDS):
        for way, python, source, its_config in ways:
            if way == "transformers":  # dd in the middle: after ours, before theirs
                seconds.setdefault("dd", []).append(copy(checkpoint, folder / "dd"))
                written["dd"] = num_bytes(folder / "dd")
                print(f"dd: {seconds['dd'][-1]:.2f} s", flush=True)
            spent, peak = child(python, way, source, folder / way, its_config)
            seconds.setdefault(way, []).append(spent)
            peaks.setdefault(way, []).append(peak)
            written[way] = num_bytes(folder / way)
            print(f"{way}: {spent:.2f} s, {peak:.2f} GiB, load {os.getloadavg()[0]:.1f}", flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    print(f"\n{datetime.date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f};", end=" ")
    print(f"Python {platform.python_version()}, {versions}\n")
    print("| what | s (all rounds) | GB written | GB/s | ours is | peak GiB |\n| --- | --- | --- | --- | --- | --- |")
    median = {way: statistics.median(figures) for way, figures in seconds.items()}
    ours = {"dd": "convert", "transformers": "convert", "mergekit": "upcycle"}
    for way in ("dd", "convert", "transformers", "upcycle", "mergekit"):
        if way in median:
            rounds = ", ".join(f"{spent:.2f}" for spent in seconds[way])
            ratio = f"{median[way] / median[ours[way]]:.2f}×" if way in ours else ""
            peak = f"{max(peaks[way]):.2f}" if way in peaks else ""
            gigabytes = written[way] / 1e9
            print(f"| {way} | {median[way]:.2f} ({rounds}) | {gigabytes:.2f} | {gigabytes / median[way]:.2f} | {ratio} | {peak} |")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
