"""The training loop.

    torchrun --nproc-per-node 2 -m megatron_jobs.train CONFIG.yaml [key=value …]      (or `mujina train`)
    srun python -m megatron_jobs.train CONFIG.yaml [key=value …]                      (what the Slurm scripts call)

A run that was interrupted goes on from its newest whole checkpoint when it is started again, with the same losses to the
last bit; a run that is finished says so. After SIGTERM it finishes its step, saves and ends with status 143.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from megatron.core import parallel_state

from megatron_jobs import checkpoint, data, failures, parallel, phases, stability
from megatron_jobs import config as configuration
from megatron_jobs.checkpoint import Checkpoint
from megatron_jobs.config import RunConfig
from megatron_jobs.hugging_face import HuggingFaceFolder
from megatron_jobs.layout import TensorSource
from megatron_jobs.metrics import Log
from megatron_jobs.objective import Objective
from megatron_jobs.order import DataOrder
from megatron_jobs.stability import Guard, Verdict
from megatron_jobs.state import TrainingState
from megatron_jobs.weights import InitialWeights, shapes
from user_input import UserError, run

STOPPED = 143  # the exit status after SIGTERM, as if it had ended the process at once


def train(config: RunConfig, mark: Callable[[], None] = lambda: None, stop_requested: Callable[[], bool] = lambda: False) -> None:
    """Trains from where the run folder stands to the end of the last phase. Every process of the run calls this.

    `mark` is called whenever the run has got on; once `stop_requested`, the run is saved after the step and SystemExit(STOPPED) raised.
    """
    binaries = data.open_sources(config)
    order = DataOrder(config, data.facts(binaries))
    guard = Guard(config.stability, parallel.from_rank_0(stability.read_rollbacks(config.run)))
    start = _newest(config, guard)
    if start:
        order.check_continues(start.ledger)
    state = TrainingState(config, start or _initial(config))
    objective = Objective(config, state)
    step = _go_on_from(start, state, guard)
    log = Log(config, step) if dist.get_rank() == 0 else None
    phase_ends = {sum(phase.num_steps for phase in config.phases[: n + 1]) for n in range(len(config.phases))}
    mark()

    while step < phases.num_steps(config.phases):
        began = time.perf_counter()
        if not guard.passes_over(step + 1):
            phase = config.phases[phases.locate(config.phases, step)[0]]
            num_micro_batches = phase.global_batch_size // (config.train.micro_batch_size * parallel_state.get_data_parallel_world_size())
            batches = _micro_batches(config, order, binaries, step, num_micro_batches)
            losses = objective.gradients(phase, batches, num_micro_batches)
            gradient_norm = state.gradient_norm()
            learning_rate = phases.learning_rate(config.phases, step)
            verdict = guard.judge(step + 1, phase.name, losses.mean, gradient_norm)
            if log and verdict.reason:
                _record(config, order, step, verdict, losses.mean, gradient_norm, learning_rate)
            if verdict.action == "stop":
                raise UserError(_diagnosis(config, order, guard, step, verdict, learning_rate))
            if verdict.action == "rollback":
                step = _roll_back(config, guard, state, log)
                mark()
                continue
            if verdict.action == "update":
                state.update(learning_rate)
            if log:
                log.step(step + 1, phase.name, losses, learning_rate, gradient_norm, time.perf_counter() - began)
        step += 1
        mark()
        stopping = parallel.from_rank_0(stop_requested())
        if step % config.train.checkpoint_interval == 0 or step in phase_ends or stopping:
            _save(config, order, guard, state, step, phase_ends)
            mark()
        if stopping:
            raise SystemExit(STOPPED)
    if log:
        log.close()


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
    if (config.train.init_from / "config.json").exists():
        folder = HuggingFaceFolder(config.train.init_from)
        folder.check(config)
        return folder
    found = Checkpoint(config.train.init_from)
    if found.shapes != dict(shapes(config.model, config.moe)):
        raise UserError(
            f"train.init_from ({config.train.init_from}): its model is {found.config.model} with moe {found.config.moe}, which is not "
            "the one of this run: name another checkpoint, or upcycle it first"
        )
    return found


def _newest(config: RunConfig, guard: Guard) -> Checkpoint | None:
    """The checkpoint to go on from, the same on every rank. Those that were rolled back are gone afterwards."""

    def keeps(candidate: Checkpoint) -> bool:
        return guard.agrees(candidate.step, candidate.ledger.get("interventions"))

    found = checkpoint.newest_whole(config.run / "checkpoints", keeps) if dist.get_rank() == 0 else None
    folder = parallel.from_rank_0(found and found.folder)
    if folder is None:
        return None
    start = found or Checkpoint(folder)
    phases.check_resumable(start.config, config, start.step)
    return start


def _go_on_from(start: Checkpoint | None, state: TrainingState, guard: Guard) -> int:
    """What is not weights comes back from `start`; returns the number of steps that are done."""
    guard.recall(start.ledger.get("interventions") if start else None)
    if start is None:
        return 0
    state.restore(start)
    return start.step


def _roll_back(config: RunConfig, guard: Guard, state: TrainingState, log: Log | None) -> int:
    """Back to before the steps that the guard passes over from now on; returns the number of steps that are done."""
    if log:
        # Written down before anything else: killed from here on, the run starts again as if it had just gone back.
        stability.write_rollbacks(config.run, guard.rollbacks)
    dist.barrier()
    start = _newest(config, guard)
    state.start_from(start or _initial(config))
    step = _go_on_from(start, state, guard)
    if log:
        log.go_back(step)
        back = guard.rollbacks[-1]
        print(f"{config.run}: back at step {step}; the data of steps {back['first']} to {back['last']} are passed over", flush=True)
    return step


def _record(
    config: RunConfig, order: DataOrder, step: int, verdict: Verdict, loss: float, gradient_norm: float, learning_rate: float
) -> None:
    """A step that stands out, on the console and in events.jsonl, with its samples' places in the data: (source, token offset)."""
    print(f"step {step + 1}: {verdict.reason}: {verdict.action}", flush=True)
    stability.record_event(
        config.run,
        step + 1,
        verdict.action,
        reason=verdict.reason,
        loss=loss,
        gradient_norm=gradient_norm,
        median=verdict.median,
        deviation=verdict.deviation,
        lr=learning_rate,
        samples=_samples(config, order, step),
    )


def _diagnosis(config: RunConfig, order: DataOrder, guard: Guard, step: int, verdict: Verdict, learning_rate: float) -> str:
    phase = config.phases[phases.locate(config.phases, step)[0]]
    sources = Counter(source for source, _ in _samples(config, order, step))
    latest = config.run / "checkpoints/latest"
    return "\n".join(
        [
            f"step {step + 1} of phase {phase.name}: {verdict.reason}",
            *(f"  before it: {line}" for line in guard.history()),
            f"  learning rate {learning_rate:.3g}; its batch: {', '.join(f'{count} of {source}' for source, count in sources.items())}",
            f"  last checkpoint: {latest.resolve() if latest.exists() else 'none'}; the samples are in {config.run / 'events.jsonl'}",
            f"  try: a lower phases.{phase.name}.learning_rate, another train.precision, or look at these samples with `mujina inspect`; "
            "if the data is bad for longer, raise stability.pass_over; if the step was harmless, raise stability.deviations",
        ]
    )


def _samples(config: RunConfig, order: DataOrder, step: int) -> list[tuple[str, int]]:
    return order.samples(step, range(config.phases[phases.locate(config.phases, step)[0]].global_batch_size))


def _save(config: RunConfig, order: DataOrder, guard: Guard, state: TrainingState, step: int, phase_ends: set[int]) -> None:
    folder = config.run / "checkpoints"
    writer = checkpoint.Writer(folder, step)
    if dist.get_rank() == 0:
        writer.clear()
    dist.barrier()
    files = dict(parallel.gathered(writer.add_rank_file(dist.get_rank(), state.pieces())))
    if dist.get_rank() == 0:
        tokens = phases.consumed_tokens(config.phases, step)
        ledger = order.ledger(step) | {"interventions": guard.memory(step)}
        writer.finish(config, tokens, dict(shapes(config.model, config.moe)), ledger, files)
        checkpoint.prune(folder, config.train.keep_checkpoints, phase_ends)
    dist.barrier()


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.micro_batch_size=2")] = None,
) -> None:
    """One process of a training run; `mujina train` starts as many as are needed."""
    settings = configuration.load(config, overrides)
    settings.check(parallel.world_size())
    with parallel.hold(settings.run), parallel.groups(settings.parallel, settings.seed):
        attempt = parallel.from_rank_0(failures.new_attempt(settings.run) if parallel.rank() == 0 else None)
        with failures.supervised(attempt, parallel.rank(), parallel.world_size(), settings.train.hang_minutes * 60) as watchdog:
            train(settings, watchdog.mark, failures.stop_on_sigterm())


if __name__ == "__main__":
    run(main)
