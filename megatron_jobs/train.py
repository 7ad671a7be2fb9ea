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
from megatron_jobs.config import RunConfig
from megatron_jobs.layout import TensorSource
from megatron_jobs.metrics import Log
from megatron_jobs.objective import Objective
from megatron_jobs.order import DataOrder
from megatron_jobs.state import TrainingState
from megatron_jobs.vitals import Watch
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
    objective = Objective(config, state)
    first_step = start.step if start else 0
    log, watch = Log(config, first_step) if dist.get_rank() == 0 else None, Watch.of_this_process()
    phase_ends = {sum(phase.num_steps for phase in config.phases[: n + 1]) for n in range(len(config.phases))}

    for step in range(first_step, phases.num_steps(config.phases)):
        began = time.perf_counter()
        phase = config.phases[phases.locate(config.phases, step)[0]]
        num_micro_batches = phase.global_batch_size // (config.train.micro_batch_size * parallel_state.get_data_parallel_world_size())
        batches = _Timed(_micro_batches(config, order, binaries, step, num_micro_batches))
        losses = objective.gradients(phase, batches, num_micro_batches)
        gradient_norm = state.gradient_norm()
        if not math.isfinite(losses.mean + gradient_norm):
            raise UserError(
                f"step {step + 1}: the loss is {losses.mean} and the gradient norm {gradient_norm}: lower "
                f"phases.{phase.name}.learning_rate, or look at the data of the step; the last checkpoint is from before it"
            )
        learning_rate = phases.learning_rate(config.phases, step)
        state.update(learning_rate)
        seconds = time.perf_counter() - began
        vitals = watch.vitals(batches.seconds)
        if log:
            log.step(step + 1, phase.name, losses, learning_rate, gradient_norm, seconds, {}, vitals)
        if (step + 1) % config.train.checkpoint_interval == 0 or step + 1 in phase_ends:
            began = time.perf_counter()
            _save(config, order, state, step + 1, phase_ends)
            if log:
                log.saved(step + 1, *[time.perf_counter() - began] * 2)
    if log:
        log.close()


class _Timed:
    """STAND-IN for the data feeder, which tells the seconds that it made the trainer wait."""

    def __init__(self, batches: Iterator[torch.Tensor]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        began = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - began


def _micro_batches(
    config: RunConfig, order: DataOrder, binaries: dict[str, data.TokenBinary], step: int, micro_batches: int
) -> Iterator[torch.Tensor]:
    """This rank's micro-batches of a step, each [micro_batch_size, sequence_length + 1] token ids."""
    size, length = config.train.micro_batch_size, config.phases[phases.locate(config.phases, step)[0]].sequence_length
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    for number in range(micro_batches):
        first = (number * ranks + rank) * size
        batch = data.read(binaries, order.samples(step, range(first, first + size)), length)
        yield torch.from_numpy(batch).to(torch.cuda.current_device())


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
