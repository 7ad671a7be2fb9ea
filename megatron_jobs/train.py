"""The training loop.

    torchrun --nproc-per-node 2 -m megatron_jobs.train CONFIG.yaml [key=value …]      (what `mujina train` calls)
    srun python -m megatron_jobs.train CONFIG.yaml [key=value …]                      (what the Slurm scripts call)

A run that was interrupted goes on from its newest whole checkpoint when it is started again, with the same losses to the
last bit; a run that is finished says so.
"""

import ctypes
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from megatron.core import parallel_state

from megatron_jobs import checkpoint, data, parallel, phases
from megatron_jobs import config as configuration
from megatron_jobs.checkpoint import Checkpoint
from megatron_jobs.config import Phase, RunConfig
from megatron_jobs.layout import TensorSource
from megatron_jobs.metrics import Log
from megatron_jobs.objective import Batch, Objective
from megatron_jobs.order import DataOrder
from megatron_jobs.state import TrainingState
from megatron_jobs.weights import InitialWeights, shapes
from user_input import UserError, run


def train(config: RunConfig) -> None:
    """Trains from where the run folder stands to the end of the last phase. Every process of the run calls this."""
    binaries = data.open_sources(config)
    order = DataOrder(config, data.facts(binaries))
    start = _newest(config)
    state = TrainingState(config, start or _initial(config))
    if start:
        order.check_continues(start.ledger)
        state.restore(start)
    objective = Objective(config, state, list(binaries))
    first_step = start.step if start else 0
    log = Log(config, first_step) if dist.get_rank() == 0 else None
    phase_ends = {sum(phase.num_steps for phase in config.phases[: n + 1]) for n in range(len(config.phases))}

    for step in range(first_step, phases.num_steps(config.phases)):
        began = time.perf_counter()
        phase = config.phases[phases.locate(config.phases, step)[0]]
        num_micro_batches = phase.global_batch_size // (config.train.micro_batch_size * parallel_state.get_data_parallel_world_size())
        batches = _micro_batches(config, order, binaries, step, num_micro_batches)
        losses = objective.gradients(phase, batches, num_micro_batches)
        gradient_norm = state.gradient_norm()
        if not math.isfinite(losses.mean + gradient_norm):
            raise UserError(
                f"step {step + 1}: the loss is {losses.mean} and the gradient norm {gradient_norm}: lower "
                f"phases.{phase.name}.learning_rate, or look at the data of the step; the last checkpoint is from before it"
            )
        now_and_then = {}
        if _is_due(config.train.layer_norms_interval, step):
            now_and_then["layer_norms"] = state.layer_norms()
        if config.train.precision == "fp8" and _is_due(config.train.fp8_shadow_interval, step):
            shadowed = _micro_batches(config, order, binaries, step, objective.micro_batch_multiple)
            now_and_then["fp8_shadow"] = objective.fp8_shadow(phase, list(shadowed))
        learning_rate = phases.learning_rate(config.phases, step)
        state.update(learning_rate)
        seconds = time.perf_counter() - began
        if config.data.validation_tokens and (_is_due(config.train.validation_interval, step) or step + 1 in phase_ends):
            now_and_then["validation"] = _validate(config, order, binaries, objective, phase)
        if log:
            log.step(step + 1, phase.name, losses, learning_rate, gradient_norm, seconds, now_and_then)
        if (step + 1) % config.train.checkpoint_interval == 0 or step + 1 in phase_ends:
            _save(config, order, state, step + 1, phase_ends)
    if log:
        log.close()


def _is_due(interval: int | None, step: int) -> bool:
    return interval is not None and (step + 1) % interval == 0


def _micro_batches(
    config: RunConfig, order: DataOrder, binaries: dict[str, data.TokenBinary], step: int, micro_batches: int
) -> Iterator[Batch]:
    """This rank's micro-batches of a step."""
    size, length = config.train.micro_batch_size, config.phases[phases.locate(config.phases, step)[0]].sequence_length
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    for number in range(micro_batches):
        first = (number * ranks + rank) * size
        yield _batch(binaries, order.samples(step, range(first, first + size)), length)


def _validate(
    config: RunConfig, order: DataOrder, binaries: dict[str, data.TokenBinary], objective: Objective, phase: Phase
) -> dict[str, float]:
    """The mean loss of each source's held-out samples, at the phase's sequence length."""
    where = [(name, int(offset)) for name in binaries for offset in order.validation(name, phase.sequence_length)]
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    size, multiple = config.train.micro_batch_size, objective.micro_batch_multiple
    num_micro_batches = math.ceil(len(where) / (size * ranks * multiple)) * multiple

    def batches() -> Iterator[Batch]:
        for number in range(num_micro_batches):
            first = (number * ranks + rank) * size
            numbers = range(first, first + size)
            tokens, sources, documents = _batch(binaries, [where[min(n, len(where) - 1)] for n in numbers], phase.sequence_length)
            sources[[n >= len(where) for n in numbers]] = len(binaries)  # repeated to fill the last micro-batches; they do not count
            yield tokens, sources, documents

    return objective.losses(phase, batches(), num_micro_batches).by_source


def _batch(binaries: dict[str, data.TokenBinary], where: list[tuple[str, int]], length: int) -> Batch:
    device = torch.cuda.current_device()
    sources = [list(binaries).index(name) for name, _ in where]
    return torch.from_numpy(data.read(binaries, where, length)).to(device), torch.tensor(sources, device=device), None


def _initial(config: RunConfig) -> TensorSource:
    if config.train.init_from is None:
        return InitialWeights(config.model, config.moe, config.seed)
    found = Checkpoint(config.train.init_from)
    if found.shapes != dict(shapes(config.model, config.moe)):
        raise UserError(
            f"train.init_from ({config.train.init_from}): its model is {found.config.model} with moe {found.config.moe}, which is not "
            "the one of this run: name another checkpoint, or upcycle it first"
        )
    return found


def _newest(config: RunConfig) -> Checkpoint | None:
    """The checkpoint to go on from, the same on every rank."""
    found = checkpoint.newest_whole(config.run / "checkpoints") if dist.get_rank() == 0 else None
    folder = parallel.from_rank_0(found and found.folder)
    if folder is None:
        return None
    start = found or Checkpoint(folder)
    phases.check_resumable(start.config, config, start.step)
    return start


def _save(config: RunConfig, order: DataOrder, state: TrainingState, step: int, phase_ends: set[int]) -> None:
    folder = config.run / "checkpoints"
    writer = checkpoint.Writer(folder, step)
    if dist.get_rank() == 0:
        writer.clear()
    dist.barrier()
    files = dict(parallel.gathered(writer.add_rank_file(dist.get_rank(), state.pieces())))
    if dist.get_rank() == 0:
        tokens = phases.consumed_tokens(config.phases, step)
        writer.finish(config, tokens, dict(shapes(config.model, config.moe)), order.ledger(step), files)
        checkpoint.prune(folder, config.train.keep_checkpoints, phase_ends)
    dist.barrier()


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.micro_batch_size=2")] = None,
) -> None:
    """One process of a training run; `mujina train` starts as many as are needed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A launcher that is killed outright cannot stop its processes; then the kernel does.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    settings = configuration.load(config, overrides)
    settings.check(parallel.world_size())
    with parallel.hold(settings.run), parallel.groups(settings.parallel, settings.seed):
        train(settings)


if __name__ == "__main__":
    run(main)
