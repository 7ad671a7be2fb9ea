"""Random training runs: a configuration and what happens on its way, as pure functions of a seed; and how they are carried out.

A case is drawn blindly and offered to what `mujina train` asks before it starts ranks, until something is accepted. What is accepted runs
to its end: stopped, killed, gone on at other layouts, with a gradient that is not a number. It is compared with one process that is left
alone but for that gradient.
"""

import json
import math
import os
import random
import signal
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_jobs.check import check
from megatron_jobs.config import RunConfig, from_dict
from megatron_jobs.data import phases
from megatron_jobs.launch import held_port
from mujina.user_input import UserError
from tests.ranks import run_ranks, start_ranks

MOST_DRAWS = 3000  # of one seed, until something is accepted
PATIENCE = 300  # seconds in which each start of ranks must end, however busy the machine is


class Stage(NamedTuple):
    """One start of the run."""

    world: int
    parallel: dict[str, int]
    micro_batch_size: int
    last_step: int | None  # it ends there without a save
    killed: tuple[int, int, str] | None  # rank and step (from 1) of a SIGKILL, and within what: gradients, save


class Case(NamedTuple):
    seed: int
    values: dict[str, Any]  # of the configuration, but for parallel and train.micro_batch_size
    stages: list[Stage]
    alone: int  # the micro-batch size of the one process
    nan_at: int | None  # the step (from 1) whose gradients are not finite
    num_refused: int

    def config(self, run: Path, stage: Stage | None = None) -> RunConfig:
        """Of a stage, or of the one process."""
        return _config(self.values, run, stage.parallel if stage else {}, stage.micro_batch_size if stage else self.alone)

    def __str__(self) -> str:
        """To be run again by hand: the file of the configuration, and what happens."""
        told = [f"seed {self.seed}; gradients not finite at step {self.nan_at}; alone with micro-batches of {self.alone}"]
        told += map(str, self.stages)
        first = self.values | {"parallel": self.stages[0].parallel}
        first["train"] = first["train"] | {"micro_batch_size": self.stages[0].micro_batch_size}
        return "\n".join([*told, yaml.safe_dump(first, sort_keys=False)])


def _config(values: dict[str, Any], run: Path, parallel: dict[str, int], micro_batch_size: int) -> RunConfig:
    train = values["train"] | {"micro_batch_size": micro_batch_size}
    return from_dict(values | {"run": str(run), "parallel": parallel, "train": train}, "drawn")


def draw(seed: int, prepared: Path, data: Path, vocab_size: int) -> Case:
    """The run of a seed. `data` holds the binaries of `prepared` with a channel `weights`."""
    chance = random.Random(f"run {seed}")
    for num_refused in range(MOST_DRAWS):
        values: dict[str, Any] = {
            "seed": chance.randrange(1000),
            "run": "run",
            "tokenizer": str(prepared / "tokenizer"),
            "model": _model(chance, vocab_size),
            "moe": _moe(chance) if chance.random() < 0.6 else None,
            "data": {"folder": str(data), "block_length": chance.choice([64, 128]), "validation_tokens": chance.choice([0, 0, 100])},
            "train": _train(chance),
            "stability": {"on_not_finite": chance.choice(["skip", "rollback"]), "pass_over": chance.choice([1, 2, 3])},
        }
        values["phases"] = [_phase(chance, name, values["moe"] is not None) for name in ("first", "second")[: chance.choice([1, 2, 2])]]
        world, parallel, size = _layout(chance, values["moe"] is not None)
        try:
            config = accepted(_config(values, Path("run"), parallel, size), world)
        except UserError:
            continue
        num_steps = phases.num_steps(config.phases)
        if not 3 <= num_steps <= 10:
            continue
        # A micro-batch's balancing loss and capacity are the only things that the size of micro-batches changes.
        moe = config.moe
        is_by_micro_batch = moe and (moe.balancing == "aux_loss" or moe.capacity_factor)
        first = Stage(world, parallel, size, None, None)
        alone = size if is_by_micro_batch else chance.choice([size, 1, 4])
        nan_at = chance.randrange(2, num_steps) if chance.random() < 0.3 else None  # an update follows
        stops = [step for step in range(1, num_steps) if step != nan_at]  # a rollback may leave no update before it
        stages = _stages(chance, values, first, num_steps, chance.choice(stops), bool(is_by_micro_batch))
        case = Case(seed, values, stages, alone, nan_at, num_refused)
        try:
            accepted(case.config(Path("run")), 1)
        except UserError:
            case = case._replace(alone=size)
        return case
    raise AssertionError(f"seed {seed}: nothing was accepted")


def accepted(config: RunConfig, world: int) -> RunConfig:
    """What `mujina train` goes through before it starts ranks. Raises UserError."""
    settings, _ = check(config, world)
    return settings


def _model(chance: random.Random, vocab_size: int) -> dict[str, Any]:
    groups = chance.choice([1, 2, 2, 3, 4, 4])
    return {
        "num_layers": chance.choice([2, 2, 4, 4, 3]),
        "hidden_size": chance.choice([32, 32, 48]),
        "ffn_hidden_size": chance.choice([64, 64, 48, 40]),
        "num_attention_heads": groups * chance.choice([1, 2]),
        "num_query_groups": groups,
        "head_size": chance.choice([8, 8, 16]),
        "vocab_size": vocab_size + chance.choice([0, 0, 64]),
        "init_std": 0.1,
        "rope_scaling": chance.choice([None, None, None, {"factor": 4.0, "original_length": 16}]),
        "tie_embeddings": chance.random() < 0.3,
        "qkv_bias": chance.random() < 0.3,
        "qk_norm": chance.random() < 0.3,
    }


def _moe(chance: random.Random) -> dict[str, Any]:
    """Large coefficients and rates: what they do must show within a few steps."""
    return {
        "num_experts": chance.choice([2, 3, 4, 4, 6, 8]),
        "top_k": chance.choice([1, 2, 2, 3]),
        "ffn_hidden_size": chance.choice([None, 32, 24]),
        "shared_ffn_hidden_size": chance.choice([0, 0, 32, 20]),
        "every": chance.choice([1, 1, 2]),
        "scores": chance.choice(["topk_softmax", "softmax_topk", "sigmoid"]),
        "normalize_logits": chance.random() < 0.2,
        "balancing": chance.choice(["aux_loss", "global_aux_loss", "bias", "none"]),
        "load_balancing_loss": chance.choice([0.0, 0.02, 0.5]),
        "bias_update_rate": chance.choice([0.0, 1e-3, 1e-2]),
        "router_z_loss": chance.choice([0.0, 1e-5, 1e-2]),
        "router_init_std": chance.choice([0.01, 0.3, 1.0]),
        "capacity_factor": chance.choice([None, None, 0.5, 0.8, 1.0, 1.25, 2.0]),
        "dispatcher": chance.choice(["alltoall", "allgather"]),
    }


def _train(chance: random.Random) -> dict[str, Any]:
    return {
        "precision": "fp32",
        "recompute": chance.choice(["none", "none", "attention", "layers"]),
        "checkpoint_interval": chance.choice([1, 2, 3]),
        "keep_checkpoints": chance.choice([1, 2]),
        "asynchronous_save": chance.random() < 0.7,
        "validation_interval": chance.choice([2, 500]),
        "layer_norms_interval": chance.choice([None, 2]),
    }


def _phase(chance: random.Random, name: str, has_experts: bool) -> dict[str, Any]:
    length, size, steps = chance.choice([16, 32, 32, 64]), chance.choice([4, 8, 8, 12]), chance.choice([2, 3, 4])
    phase: dict[str, Any] = {"name": name, "sequence_length": length, "global_batch_size": size}
    tokens = steps * size * length
    if chance.random() < 0.25:
        start, increment = chance.choice([(2, 2), (4, 4), (4, 2), (6, 6)])
        phase["batch_ramp"] = {"start": start, "increment": increment, "tokens": chance.choice([1, 2, 3]) * start * length}
        tokens += 4 * start * length
    sources = chance.sample(["web", "code", "chat"], chance.choice([1, 2, 3]))
    phase["sources"] = {
        source: {"weight": chance.choice([0.2, 0.5, 1.0]), "loss_weight": chance.choice([1.0, 1.0, 1.0, 0.25])} for source in sources
    }
    if chance.random() < 0.2:  # one by an amount
        phase["sources"][sources[0]] = {"tokens": tokens if len(sources) == 1 else 2 * length}
    phase["tokens"] = tokens
    shape = chance.choice(["constant", "linear", "cosine", "1-sqrt", "exponential"])
    phase["learning_rate"] = {"start": chance.choice([1e-2, 3e-3]), "end": 1e-3, "shape": shape, "warmup_steps": chance.choice([0, 1, 2])}
    phase["loss"] = {"z_loss": chance.choice([0.0, 0.0, 1e-2]), "token_weights": chance.choice([None, None, "weights"])}
    phase["optimizer"] = chance.choice(["keep", "keep", "reset"])
    phase["separate_documents"] = chance.random() < 0.4
    if has_experts and chance.random() < 0.3:
        phase["moe"] = {chance.choice(["load_balancing_loss", "router_z_loss", "bias_update_rate"]): chance.choice([0.0, 0.01])}
    return phase


def _layout(chance: random.Random, has_experts: bool) -> tuple[int, dict[str, int], int]:
    """(processes, parallel, micro-batch size); most of them cannot be."""
    world = chance.choice([2, 2, 4])
    sizes = {"tensor": chance.choice([1, 1, 2]), "pipeline": chance.choice([1, 2]), "context": chance.choice([1, 1, 2])}
    sizes["virtual_pipeline"] = chance.choice([1, 2, 2]) if sizes["pipeline"] > 1 else 1
    if has_experts:
        sizes |= {"expert": chance.choice([1, 2, 2, 3, 4]), "expert_tensor": chance.choice([1, 1, 2])}
    return world, {name: size for name, size in sizes.items() if size > 1}, chance.choice([1, 2, 2, 3, 4])


def _stages(chance: random.Random, values: dict[str, Any], first: Stage, num_steps: int, stop: int, keeps_micro_batch: bool) -> list[Stage]:
    """The starts of the run: undisturbed, killed and started again, stopped and gone on at another layout, or both."""
    how = chance.choice(["undisturbed", "killed", "moved", "moved", "killed and moved"])
    stages = []
    if "killed" in how:
        killed = (chance.randrange(first.world), chance.randrange(1, num_steps + 1), chance.choice(["gradients", "save"]))
        stages.append(first._replace(killed=killed))
    if "moved" in how:
        stages.append(first._replace(last_step=stop))
        for _ in range(100):
            world, parallel, size = _layout(chance, values["moe"] is not None)
            size = first.micro_batch_size if keeps_micro_batch else size
            try:
                accepted(_config(values, Path("run"), parallel, size), world)
            except UserError:
                continue
            return [*stages, Stage(world, parallel, size, None, None)]
    return [*stages, first]


def train_so(config: RunConfig, nan_at: int | None, last_step: int | None, killed: tuple[int, int, str] | None, is_wide: bool) -> None:
    """One rank of a start."""
    if is_wide:
        compute_in_float64()
    train_with_faults(config, nan_at, last_step, killed)


def train_alone(runs: list[tuple[RunConfig, int | None]], is_wide: bool) -> None:
    """The runs of one process, one after the other: (configuration, step whose gradients are not finite)."""
    import torch

    from megatron_jobs.engine import groups

    groups.prepare_device()
    torch.set_num_threads(1)  # of what is so small, several make only rounding
    if is_wide:
        compute_in_float64()
    for config, nan_at in runs:
        train_with_faults(config, nan_at, None, None)


def train_with_faults(config: RunConfig, nan_at: int | None, last_step: int | None, killed: tuple[int, int, str] | None) -> None:
    import torch.distributed as dist

    from megatron_jobs.engine import groups
    from megatron_jobs.train import Trainer

    with groups.of_run(config.parallel, config.seed):
        trainer = Trainer(config, lambda: None)
        gradients, save = trainer.passes.gradients, trainer.saver.save
        replica, num_replicas = groups.data_parallel()

        def dies(within: str) -> None:
            if killed == (dist.get_rank(), trainer.step + 1, within):
                os.kill(os.getpid(), signal.SIGKILL)

        def with_faults(*arguments: Any) -> Any:
            if trainer.step + 1 == nan_at and replica == num_replicas - 1:
                configs = [chunk.module.config for chunk in trainer.state.chunks]
                scales = [config.grad_scale_func for config in configs]
                for config in configs:
                    config.grad_scale_func = lambda loss: loss * math.nan
                measured = gradients(*arguments)
                for config, scale in zip(configs, scales, strict=True):
                    config.grad_scale_func = scale
            else:
                measured = gradients(*arguments)
            dies("gradients")
            return measured

        def killed_within(*arguments: Any) -> None:
            save(*arguments)
            dies("save")

        trainer.passes.gradients, trainer.saver.save = with_faults, killed_within  # type: ignore[method-assign]
        trainer.train(lambda: False, last_step)


def compute_in_float64() -> None:
    """From here on, what this process would compute in float32 it computes in float64.

    Checkpoints stay float32, and a run goes on from what it has saved, so that one that is stopped there is like one that is not.
    """
    import torch

    from megatron_jobs.checkpoints import checkpoint
    from megatron_jobs.engine import groups

    groups.prepare_device()  # it puts its own in the place of what is replaced here
    from megatron_jobs.engine import core, cpu_speed, state
    from megatron_jobs.engine.state import TrainingState

    narrow, boxes, type_name = torch.float32, TrainingState.boxes, torch.Tensor.type
    seen = types.ModuleType("torch")
    seen.__dict__.update(torch.__dict__, empty=lambda *shape: torch.empty(*shape, dtype=narrow))
    checkpoint.torch = cpu_speed.torch = seen  # type: ignore[attr-defined]  # files, and products that know float32 alone

    def rounded(self: TrainingState) -> dict[str, torch.Tensor]:
        for _, _, _, _, values in self._boxes():
            values.copy_(values.to(narrow))
        core.write_back(self.optimizer, self.chunks)
        return {key: values.to(narrow) for key, values in boxes(self).items()}

    def grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """torch's knows no float64."""
        parts = a.tensor_split(offs[:-1].tolist())
        return torch.cat([part @ matrix for part, matrix in zip(parts, b, strict=True)])

    TrainingState.boxes = rounded  # type: ignore[method-assign]
    torch.nn.functional.grouped_mm = grouped_mm
    kinds = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    state.OptimizerConfig = partial(state.OptimizerConfig, **dict.fromkeys(kinds, torch.float64))  # type: ignore[attr-defined, misc]
    torch.Tensor.type = lambda self, *to, **how: _as_float(type_name(self, *to, **how))  # type: ignore[method-assign]
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)


def _as_float(named: Any) -> Any:
    """megatron-core sorts parameters by the names of their types."""
    return named.replace("Double", "Float") if isinstance(named, str) else named


def start(config: RunConfig, stage: Stage, nan_at: int | None, is_wide: bool) -> None:
    """Carries out a stage. Raises AssertionError when a rank ends in another way than the stage says."""
    if stage.killed is None:
        run_ranks(stage.world, train_so, config, nan_at, stage.last_step, None, is_wide)
        return
    with held_port() as port:
        ranks = start_ranks(stage.world, port, train_so, config, nan_at, None, stage.killed, is_wide)
        ranks[stage.killed[0]].join(PATIENCE)
        ended = ranks[stage.killed[0]].exitcode
        for process in ranks:
            process.kill()
            process.join()
    assert ended in (-signal.SIGKILL, 0), f"rank {stage.killed[0]} ended with {ended}, not by the signal"


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# What the one process and all others must have in common.
NUMBERS = "loss grad_norm z_loss load_balancing_loss router_z_loss loss_by_source weight_by_source validation dropped".split()


def difference(run: Path, alone: Path) -> float:
    """The largest relative one of any number of any step; infinite where steps or fields are not the same."""
    found, expected = records(run), records(alone)
    if [step["step"] for step in found] != [step["step"] for step in expected]:
        return math.inf
    largest = 0.0
    for one, other in zip(found, expected, strict=True):
        for name in NUMBERS:
            a, b = list(_numbers(one.get(name))), list(_numbers(other.get(name)))
            if len(a) != len(b):
                return math.inf
            for x, y in zip(a, b, strict=True):
                if math.isnan(x) != math.isnan(y):
                    return math.inf
                if not math.isnan(x) and x != y:
                    largest = max(largest, abs(x - y) / max(abs(y), 1e-3))
    return largest


def _numbers(value: Any) -> Iterator[float]:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [] if value is None else [value]:
        yield float(part)
