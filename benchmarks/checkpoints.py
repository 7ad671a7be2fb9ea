"""Saving and loading a checkpoint of one process, against what dd reaches on the same disk: gigabytes per second.

    python -m benchmarks.checkpoints FOLDER        (some minutes, 6 GB of memory, 5 GB of disk)

A state of 187 million parameters with its moments, about 2.2 GB. Both ways of each pair take turns, a file is always a new one, and each
figure is a median. Writing ends with fsync on both sides; before any reading the file is put out of the page cache
(POSIX_FADV_DONTNEED), save where it says otherwise.
"""

import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.checkpoints.saver import Saver
from megatron_jobs.config import RunConfig, from_dict
from megatron_jobs.engine import groups
from megatron_jobs.engine.state import TrainingState

ROUNDS = 5


def config(folder: Path, asynchronous: bool) -> RunConfig:
    rate = dict(start=1e-4, end=1e-4)
    phase = dict(name="a", tokens=2**20, sequence_length=1024, global_batch_size=1, sources={"web": 1}, learning_rate=rate)
    size = dict(num_layers=12, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16, num_query_groups=16, vocab_size=16_000)
    values = {
        "run": str(folder / "run"),
        "tokenizer": "none",
        "model": size,
        "data": dict(folder="none"),
        "train": dict(micro_batch_size=1, precision="fp32", keep_checkpoints=1, asynchronous_save=asynchronous),
        "phases": [phase],
    }
    return from_dict(values, "benchmark")


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    before = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - before


def dd(*arguments: str) -> None:
    subprocess.run(["dd", "bs=8M", "status=none", *arguments], check=True)


def forget(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure(folder: Path) -> tuple[float, dict[str, list[float]]]:
    """The gigabytes of the checkpoint, and the seconds of every round."""
    settings = {name: config(folder, name == "beside") for name in ("waiting", "beside")}
    state = TrainingState(settings["beside"])
    for _, _, _, _, values in state._boxes():
        values.uniform_()
    savers = {name: Saver(settings[name], set()) for name in settings}
    seconds: dict[str, list[float]] = {}

    def note(name: str, function: Callable[..., Any], *arguments: Any) -> None:
        seconds.setdefault(name, []).append(timed(function, *arguments))
        print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)

    zeros = folder / "zeros"
    for step in range(1, ROUNDS + 2):
        for name, saver in savers.items():
            shutil.rmtree(saver.folder, ignore_errors=True)
            os.sync()
            pieces = state.boxes()
            if name == "waiting":
                note("save", saver.save, step, 0, step, pieces, {})
            else:
                before = time.perf_counter()
                note("stop", saver.save, step, 0, step, pieces, {})
                saver.wait()
                seconds.setdefault("beside", []).append(time.perf_counter() - before)
        file = savers["beside"].folder / "latest/rank-00000.safetensors"
        os.sync()
        note("dd write", dd, "if=/dev/zero", f"of={zeros}", f"count={file.stat().st_size // 2**23}", "conv=fsync")
        zeros.unlink()

        forget(file)
        note("dd read", dd, f"if={file}", "of=/dev/null")
        forget(file)
        note("verify", Checkpoint(file.parent).verify)
        note("load after verify", load, state, file.parent)
        forget(file)
        note("load", load, state, file.parent)
        forget(file)
        note("dd read", dd, f"if={file}", "of=/dev/null")  # again: the disk below may have become faster or slower meanwhile
    # the first round allocates memory
    return file.stat().st_size / 1e9, {name: figures[len(figures) // (ROUNDS + 1) :] for name, figures in seconds.items()}


def load(state: TrainingState, folder: Path) -> None:
    state.restore(Checkpoint(folder))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with groups.alone():
        torch.set_num_threads(1)  # copies in memory gain little by a second one, and OpenMP's threads wait spinning where others have work
        gigabytes, seconds = measure(folder)
    median = {name: statistics.median(figures) for name, figures in seconds.items()}
    print(f"\n{datetime.date.today()}, {gigabytes:.2f} GB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f};", end=" ")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core")) + "\n")
    print("| what | s | GB/s | of dd |\n| --- | --- | --- | --- |")
    for what, name, other in (
        ("dd, write and fsync", "dd write", "dd write"),
        ("save, written, checked, renamed", "save", "dd write"),
        ("save beside training, to its end", "beside", "dd write"),
        ("… of which training stands still", "stop", None),
        ("dd, read", "dd read", "dd read"),
        ("read into model and optimizer, not verified", "load", "dd read"),
        ("verify", "verify", "dd read"),
        ("read into model and optimizer, after verify", "load after verify", None),
    ):
        ratio = f"{median[other] / median[name]:.0%}" if other else ""
        print(f"| {what} | {median[name]:.2f} | {gigabytes / median[name]:.2f} | {ratio} |")
    both = median["verify"] + median["load after verify"]
    print(f"| a start: verify, then load | {both:.2f} | {gigabytes / both:.2f} | {median['dd read'] / both:.0%} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
