"""Training with real processes: one of them follows a plain loop, restarts, and keeps its optimizer's state (test_parallel.py: several)."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.config import RunConfig
from mujina.matrices import Box
from tests.conftest import read, tiny
from tests.ranks import run_ranks


def train_here(config: RunConfig, last_step: int | None = None) -> None:
    from megatron_jobs import train
    from megatron_jobs.engine import groups

    with groups.of_run(config.parallel, config.seed):
        train.train(config, last_step=last_step)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    """The run folder of one process."""
    run = tmp_path_factory.mktemp("alone")
    run_ranks(1, train_here, tiny(prepared, run))
    return run


def test_one_process_follows_transformers(prepared, tmp_path, alone):
    """The same weights, batches and AdamW in a plain loop over a Llama of transformers: model, loss, decay, clipping and learning rate."""
    expected = run_ranks(1, plain_loop, tiny(prepared, tmp_path))[0]
    assert losses(alone) == pytest.approx([step["loss"] for step in expected], rel=1e-4)


def plain_model(config: RunConfig) -> tuple[Any, Any, Iterator[tuple[Any, list[tuple[str, int]]]]]:
    """A Llama of transformers with the run's first weights, AdamW for it, and (token ids, places) of each step, its learning rate set."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from megatron_jobs.checkpoints.weights import InitialWeights
    from megatron_jobs.conversion import convert
    from megatron_jobs.data import feeder, phases
    from megatron_jobs.data.ledger import Ledger
    from megatron_jobs.data.order import DataOrder

    source = InitialWeights(config.model, config.moe, config.seed)
    binaries = feeder.open_sources(config)
    order = DataOrder(config, feeder.facts(binaries))
    config.run.mkdir(parents=True, exist_ok=True)
    exported = convert.Exported(SimpleNamespace(config=config, ledger=Ledger(), shapes=source.shapes, read=source.read))
    convert.write_companions(exported, config.run)
    save_file({tensor.name: tensor.read().view(*tensor.shape) for tensor in exported.tensors()}, config.run / "model.safetensors")
    llama = AutoModelForCausalLM.from_pretrained(config.run, dtype=torch.float32, local_files_only=True)
    matrices, norms = ([p for p in llama.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [dict(params=matrices, weight_decay=config.optimizer.weight_decay), dict(params=norms, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, betas=(config.optimizer.beta1, config.optimizer.beta2), eps=config.optimizer.epsilon)

    def steps() -> Iterator[tuple[Any, list[tuple[str, int]]]]:
        for step in range(phases.num_steps(config.phases)):
            for group in adamw.param_groups:
                group["lr"] = phases.learning_rate(config.phases, step)
            phase, _ = phases.at(config.phases, step)
            where = order.samples(step, range(phase.global_batch_size))
            yield read(binaries, where, phase.sequence_length), where

    return llama, adamw, steps()


def plain_loop(config: RunConfig) -> list[dict[str, Any]]:
    """What `metrics.jsonl` should hold of each step's losses."""
    import torch

    llama, adamw, steps = plain_model(config)
    result = []
    for tokens, where in steps:
        logits = llama(tokens[:, :-1]).logits
        of_samples = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
        z_loss = logits.logsumexp(-1).square().mean()
        adamw.zero_grad()
        (of_samples.mean() + config.phases[0].loss.z_loss * z_loss).backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), config.optimizer.clip_grad)
        adamw.step()
        by_source: dict[str, list[float]] = {}
        for loss, (source, _) in zip(of_samples.detach().tolist(), where, strict=True):
            by_source.setdefault(source, []).append(loss)
        means = {name: sum(values) / len(values) for name, values in by_source.items()}
        result.append({"loss": float(of_samples.detach().mean()), "loss_by_source": means, "z_loss": float(z_loss.detach())})
    return result


def test_the_optimizer_state_is_kept_across_the_phase_switch(alone):
    """AdamW's second moment after the 4 steps of the second phase still holds 0.95⁴ of what it was before them."""
    before, after = (Checkpoint(alone / "checkpoints" / step) for step in ("step-00000006", "step-00000010"))
    rows, columns = before.shapes["layers.0.up"]
    box = Box(0, rows, 0, columns)
    assert (after.read("layers.0.up", box, "exp_avg_sq") >= 0.95**4 * before.read("layers.0.up", box, "exp_avg_sq") * 0.999).all()


def test_bf16_trains_and_restarts(prepared, tmp_path):
    config = tiny(prepared, tmp_path, train=dict(precision="bf16"))
    run_ranks(2, train_here, config, 3)
    run_ranks(2, train_here, config)
    whole = tiny(prepared, tmp_path / "whole", train=dict(precision="bf16"))
    run_ranks(2, train_here, whole)
    assert losses(tmp_path) == losses(tmp_path / "whole")
