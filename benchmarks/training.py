"""Training on a CPU, one process: Mujina's loop against a plain loop over transformers' Llama and torch's AdamW.

    ./quickstart.sh; python -m benchmarks.training [--rounds 5]        (about five minutes; the table of a run is in RESULTS.md)

Both sides train the same weights on the same batches in float32 with the same fused AdamW, clipping and learning rate; the losses are
compared. Every measurement is a process of its own, the two sides take turns, the first STEPS_NOT_COUNTED steps of each are left out.
Loop overhead is what Mujina's steps take outside forward and backward, the gradient norm and the update.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_jobs.config import RunConfig, load

ROOT = Path(__file__).parents[1]
STEPS_NOT_COUNTED = 3
STEPS = 8
MODEL = ["num_layers=8", "hidden_size=512", "ffn_hidden_size=1408", "num_attention_heads=8", "num_query_groups=4"]


def config_in(folder: str) -> RunConfig:
    phase = {
        "name": "web",
        "tokens": (STEPS_NOT_COUNTED + STEPS) * 2048,
        "sequence_length": 512,
        "global_batch_size": 4,
        "sources": {"web_ja": 0.5, "web_en": 0.5},
        "learning_rate": {"start": 1e-3, "end": 1e-4, "shape": "linear"},
    }
    overrides = [f"model.{value}" for value in MODEL]
    overrides += [f"run={folder}/run", "train.micro_batch_size=4", "train.checkpoint_interval=1000000", f"phases={json.dumps([phase])}"]
    return load(ROOT / "examples/quickstart/dense.yaml", overrides)


def ours(folder: str) -> dict[str, Any]:
    import torch

    from megatron_jobs import parallel, train
    from megatron_jobs.objective import Objective
    from megatron_jobs.state import TrainingState

    inside: list[float] = []
    Objective.gradients = _timed(Objective.gradients, inside)
    TrainingState.gradient_norm = _timed(TrainingState.gradient_norm, inside)
    TrainingState.update = _timed(TrainingState.update, inside)
    ends: list[float] = []
    update = TrainingState.update
    TrainingState.update = lambda *arguments: (update(*arguments), ends.append(time.perf_counter()))[0]
    config = config_in(folder)
    with parallel.groups(config.parallel, config.seed):
        train.train(config)
    first = STEPS_NOT_COUNTED
    seconds = ends[-1] - ends[first - 1]
    losses = [json.loads(line)["loss"] for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    overhead = 1 - sum(inside[3 * first :]) / seconds
    return {"tokens_per_second": 2048 * STEPS / seconds, "losses": losses, "overhead": overhead, "threads": torch.get_num_threads()}


def transformers(folder: str) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_jobs import data, phases
    from megatron_jobs.hugging_face import LLAMA, hugging_face_name
    from megatron_jobs.order import DataOrder
    from megatron_jobs.weights import Box, InitialWeights

    config = config_in(folder)
    model = config.model
    weights = InitialWeights(model, None, config.seed)
    binaries = data.open_sources(config)
    order = DataOrder(config, data.facts(binaries))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": float(model.rope_theta)},
            attn_implementation="sdpa",
        )
    )
    tensors = {}
    for name, (rows, columns) in weights.shapes.items():
        box = Box(0, model.vocab_size if name in ("embedding", "output") else rows, 0, columns)
        tensors[hugging_face_name(name, LLAMA)] = weights.read(name, box)
    llama.load_state_dict({name: tensor.flatten() if "norm" in name else tensor for name, tensor in tensors.items()})
    matrices, norms = ([p for p in llama.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [dict(params=matrices, weight_decay=config.optimizer.weight_decay), dict(params=norms, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, betas=(config.optimizer.beta1, config.optimizer.beta2), eps=config.optimizer.epsilon, fused=True)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    losses, ends = [], []
    for step in range(STEPS_NOT_COUNTED + STEPS):
        tokens = torch.from_numpy(data.read(binaries, order.samples(step, range(4)), 512))
        logits = llama(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), config.optimizer.clip_grad)
        for group in adamw.param_groups:
            group["lr"] = phases.learning_rate(config.phases, step)
        adamw.step()
        losses.append(float(loss.detach()))
        ends.append(time.perf_counter())
    return {"tokens_per_second": 2048 * STEPS / (ends[-1] - ends[STEPS_NOT_COUNTED - 1]), "losses": losses}


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - began)
        return result

    return timed


def main(
    rounds: Annotated[int, typer.Option(help="processes of each side")] = 5, side: Annotated[str, typer.Option(hidden=True)] = ""
) -> None:
    """Measures both sides in turn and prints the table."""
    if side:
        with tempfile.TemporaryDirectory() as folder:
            result = {"ours": ours, "transformers": transformers}[side](folder)
        print(json.dumps(result))
        return
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for name, measured in results.items():
            command = [sys.executable, "-m", "benchmarks.training", "--side", name]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
            measured.append(json.loads(output.splitlines()[-1]))
            print(f"{name}: {measured[-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    difference = max(abs(a - b) / b for a, b in zip(*(results[name][0]["losses"] for name in results), strict=True))
    speed = {name: statistics.median(one["tokens_per_second"] for one in measured) for name, measured in results.items()}
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(*results.values(), strict=True)]
    overhead = statistics.median(one["overhead"] for one in results["ours"])
    print(f"torch {version('torch')}, transformers {version('transformers')}, megatron-core {version('megatron-core')}; {rounds} rounds")
    print(f"losses differ by {difference:.1e} at most (relative)\n")
    print("| what | tokens/s | ours is | loop overhead |\n| --- | --- | --- | --- |")
    print(f"| ours | {speed['ours']:,.0f} | {statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f}) | {overhead:.1%} |")
    print(f"| transformers and AdamW | {speed['transformers']:,.0f} |  |  |")


if __name__ == "__main__":
    typer.run(main)
