"""Layers of the reference models on one GPU, in bf16: milliseconds, TFLOP/s, MFU and memory.

    python -m benchmarks.gpu [--json gpu.json] [--profile profile.txt]        (about two minutes; tables are in RESULTS.md)

Runs the trainer's own layers: Transformer Engine's where it is installed, else torch's fused attention and grouped experts. Needs torch,
Triton and Mujina's requirements. Two measurements of each shape:

    layers    forward and backward of the decoder layers alone, one sequence of 4,096 tokens, gradients added up in float32
    step      a whole step of the trainer's passes: embedding, layers, output layer, loss, 8 micro-batches, gradient norm, AdamW

TFLOP/s are those of the model (`megatron_jobs.planning.flops`): causal attention counts half, recomputation and padding do not.
"""

import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from megatron_jobs import ranks
from megatron_jobs.checkpoints.weights import InitialWeights
from megatron_jobs.config import RunConfig, load
from megatron_jobs.data.feeder import MicroBatch
from megatron_jobs.engine import groups
from megatron_jobs.engine.passes import Passes
from megatron_jobs.engine.state import TrainingState
from megatron_jobs.planning import flops
from megatron_jobs.planning.layers import has_transformer_engine
from mujina.user_input import command_line

CONFIGS = Path(__file__).parents[1] / "megatron_jobs/configs"
SHAPES = {"8B": ("tanuki_8b.yaml", 4), "8x8B": ("tanuki_8x8b.yaml", 2)}  # layers that fit with gradients and optimizer in 80 GB
LENGTH = 4096
NUM_MICRO_BATCHES = 8
REPEATS, ROUNDS = 10, 5


def measure(config: RunConfig, profile: Path | None) -> list[dict[str, Any]]:
    """A row for the layers and one for the step."""
    state = TrainingState(config)
    state.start_from(InitialWeights(config.model, config.moe, config.seed))
    passes = Passes(config, state, ["random"])
    phase = config.phases[0]
    whole = flops.per_token(config.model, config.moe, phase.sequence_length)
    output = 6 * config.model.padded_vocab_size * config.model.hidden_size
    gpt = state.chunks[0].module
    device = next(gpt.parameters()).device
    rotary = gpt.rotary_pos_emb(phase.sequence_length)
    hidden = torch.randn(phase.sequence_length, 1, config.model.hidden_size, dtype=gpt.config.params_dtype, device=device)
    gradient = torch.randn_like(hidden)
    tokens = np.random.default_rng(1).integers(config.model.vocab_size, size=(NUM_MICRO_BATCHES, 1, phase.sequence_length + 1))
    batches = [MicroBatch(tokens_1L, np.zeros(1, np.int64), None) for tokens_1L in tokens]

    def layers() -> None:
        gpt.decoder(hidden.requires_grad_(), attention_mask=None, rotary_pos_emb=rotary).backward(gradient)

    def step() -> None:
        passes.gradients(phase, batches)
        state.gradient_norm()
        state.update(1e-5)

    rows = [
        # The step first: megatron-core's schedule sets the scale that the routers' losses have in every backward pass.
        _row("step", step, phase.sequence_length * NUM_MICRO_BATCHES, whole),
        _row("layers", layers, phase.sequence_length, whole - output),
    ]
    if profile:
        with torch.profiler.profile() as profiler, profile.open("a") as file:
            step()
            file.write(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=40))
    return rows


def _row(what: str, function: Callable[[], None], tokens: int, operations_per_token: int) -> dict[str, Any]:
    for _ in range(3):
        function()
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(REPEATS):
            function()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - began) / REPEATS)
    seconds = statistics.median(rounds)
    rate = tokens * operations_per_token / seconds
    peak = flops.peak(groups.device_name(), "bf16")
    return {
        "what": what,
        "milliseconds": seconds * 1e3,
        "tokens_per_second": tokens / seconds,
        "tflops": rate / 1e12,
        "mfu": peak and rate / peak,
        "memory_gib": ranks.memory_gib(),
    }


def shape(name: str, overrides: list[str] | None = None) -> RunConfig:
    """The reference configuration with few layers, one phase and no parallelism."""
    file, num_layers = SHAPES[name]
    phase = {
        "name": "benchmark",
        "tokens": LENGTH * NUM_MICRO_BATCHES,
        "sequence_length": LENGTH,
        "global_batch_size": NUM_MICRO_BATCHES,
        "sources": {"random": 1.0},
        "learning_rate": {"start": 1e-5, "end": 1e-5, "shape": "constant"},
    }
    alone = [f"model.num_layers={num_layers}", "parallel={pipeline: 1, expert: 1}", f"phases={json.dumps([phase])}"]
    return load(CONFIGS / file, alone + (overrides or []))


def versions() -> dict[str, str | None]:
    found = {}
    for package in ("torch", "triton", "megatron-core", "transformer-engine-torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the figures here")] = None,
    profile: Annotated[Path | None, typer.Option(help="also write the kernels of a step here, the longest first")] = None,
) -> None:
    """Prints a table of the shapes; needs a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no GPU is here, so nothing was measured")
    rows = []
    with groups.alone():
        for name in SHAPES:
            rows += [{"shape": name} | row for row in measure(shape(name), profile)]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    kernels = "Transformer Engine" if has_transformer_engine() else "torch"
    print(f"{groups.device_name()}; {kernels} kernels; " + ", ".join(f"{name} {value}" for name, value in versions().items() if value))
    print("\n| shape | what | ms | tokens/s | TFLOP/s | MFU | memory GiB |\n| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        print(
            f"| {row['shape']} | {row['what']} | {row['milliseconds']:.1f} | {row['tokens_per_second']:,.0f} | {row['tflops']:.0f} | {mfu} "
            f"| {row['memory_gib']:.1f} |"
        )
    if json_file:
        about = {"device": groups.device_name(), "kernels": kernels, "versions": versions()}
        json_file.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    command_line(main)
