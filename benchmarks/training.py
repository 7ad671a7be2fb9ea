"""Training on a CPU, one process: Mujina's loop against a plain loop over transformers' Llama and torch's AdamW.

    ./quickstart.sh; python -m benchmarks.training [--steps 40]        (about five minutes; the table of a run is in RESULTS.md)

Both sides train the same weights on the same batches in float32 with the same fused AdamW, clipping and learning rate; the losses are
compared. Each side is a process of its own that stands still while the other makes a step, so that both see the same hours of the
machine; the first STEPS_NOT_COUNTED steps of each are left out. Loop overhead is what Mujina's steps take outside forward and backward,
the gradient norm and the update.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.turns import Turns, play
from megatron_jobs.config import RunConfig, load

ROOT = Path(__file__).parents[1]
STEPS_NOT_COUNTED = 3
MODEL = ["num_layers=8", "hidden_size=512", "ffn_hidden_size=1408", "num_attention_heads=8", "num_query_groups=4"]


def config_in(folder: str, steps: int) -> RunConfig:
    phase = {
        "name": "web",
        "tokens": steps * 2048,
        "sequence_length": 512,
        "global_batch_size": 4,
        "sources": {"web_ja": 0.5, "web_en": 0.5},
        "learning_rate": {"start": 1e-3, "end": 1e-4, "shape": "linear"},
    }
    overrides = [f"model.{value}" for value in MODEL]
    overrides += [f"run={folder}/run", "train.micro_batch_size=4", "train.checkpoint_interval=1000000", f"phases={json.dumps([phase])}"]
    return load(ROOT / "examples/quickstart/dense.yaml", overrides)


def ours(folder: str, steps: int) -> dict[str, Any]:
    from megatron_jobs import train
    from megatron_jobs.engine import groups
    from megatron_jobs.engine.passes import Passes
    from megatron_jobs.engine.state import TrainingState

    inside: list[float] = []
    Passes.gradients = _timed(Passes.gradients, inside)
    TrainingState.gradient_norm = _timed(TrainingState.gradient_norm, inside)
    TrainingState.update = update = _timed(TrainingState.update, inside)
    config = config_in(folder, steps)
    turns = Turns()
    TrainingState.update = lambda *arguments: (update(*arguments), turns.step_is_done())[0]
    with groups.of_run(config.parallel, config.seed):
        train.train(config)
    losses = [json.loads(line)["loss"] for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    counted = STEPS_NOT_COUNTED
    return {"losses": losses, "overhead": 1 - sum(inside[3 * counted :]) / sum(turns.seconds[counted:])}


def transformers(folder: str, steps: int) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_jobs.checkpoints.weights import InitialWeights
    from megatron_jobs.conversion.families import LLAMA, hugging_face_name
    from megatron_jobs.data import feeder, phases
    from megatron_jobs.data.order import DataOrder
    from mujina.matrices import Box

    config = config_in(folder, steps)
    model = config.model
    weights = InitialWeights(model, None, config.seed)
    binaries = feeder.open_sources(config)
    order = DataOrder(config, feeder.facts(binaries))
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
    losses, turns = [], Turns()
    for step in range(steps):
        tokens = torch.from_numpy(feeder.micro_batch(order, binaries, order.samples(step, range(4)), config.phases[0]).tokens)
        logits = llama(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), config.optimizer.clip_grad)
        for group in adamw.param_groups:
            group["lr"] = phases.learning_rate(config.phases, step)
        adamw.step()
        losses.append(float(loss.detach()))
        turns.step_is_done()
    return {"losses": losses}


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - began)
        return result

    return timed


def main(steps: Annotated[int, typer.Option(help="steps of each side")] = 40, side: Annotated[str, typer.Option(hidden=True)] = "") -> None:
    """Measures both sides in turn and prints the table."""
    if side:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            result = {"ours": ours, "transformers": transformers}[side](folder, steps)
        print(json.dumps(result))
        return
    command = [sys.executable, "-m", "benchmarks.training", "--steps", str(steps), "--side"]
    taken, results = play({name: [*command, name] for name in ("ours", "transformers")}, cwd=ROOT)
    seconds = {name: [second for _, second in of_side] for name, of_side in taken.items()}
    losses = [results[name]["losses"] for name in seconds]
    difference = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    counted = {name: taken[STEPS_NOT_COUNTED:] for name, taken in seconds.items()}
    speed = {name: 2048 / statistics.median(taken) for name, taken in counted.items()}
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*counted.values(), strict=True)])
    print(f"torch {version('torch')}, transformers {version('transformers')}, megatron-core {version('megatron-core')}; {steps} steps")
    print(f"losses differ by {difference:.1e} at most (relative)\n")
    print("| what | tokens/s | ours is | loop overhead |\n| --- | --- | --- | --- |")
    print(f"| ours | {speed['ours']:,.0f} | {middle:.2f}× (quartiles {low:.2f}–{high:.2f}) | {results['ours']['overhead']:.1%} |")
    print(f"| transformers and AdamW | {speed['transformers']:,.0f} |  |  |")


if __name__ == "__main__":
    typer.run(main)
