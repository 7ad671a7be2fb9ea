"""The training loop.

    torchrun --nproc-per-node 2 -m megatron_jobs.train CONFIG.yaml [key=value …]      (or `mujina train`)
    srun python -m megatron_jobs.train CONFIG.yaml [key=value …]                      (what the Slurm scripts call)

A run that was interrupted goes on from its newest whole checkpoint when it is started again, with the same losses to the
last bit; a run that is finished says so. After SIGTERM or SIGUSR1 it finishes its step, saves and ends with status 143 (`mujina.exits`).
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch.distributed as dist
import typer
from megatron.core import parallel_state

from megatron_jobs import config as configuration
from megatron_jobs import failures, stability
from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.checkpoints.saver import Saver
from megatron_jobs.checkpoints.weights import InitialWeights, shapes
from megatron_jobs.config import Phase, RunConfig
from megatron_jobs.conversion.hugging_face import HuggingFaceFolder
from megatron_jobs.conversion.upcycle import Mixture
from megatron_jobs.data import feeder, phases
from megatron_jobs.data.order import DataOrder
from megatron_jobs.engine import groups
from megatron_jobs.engine.passes import Objective, fp8_warning
from megatron_jobs.engine.placement import TensorSource
from megatron_jobs.engine.state import TrainingState
from megatron_jobs.monitoring.metrics import Log
from megatron_jobs.monitoring.vitals import Watch
from megatron_jobs.stability import Guard, Verdict
from mujina.exits import STOPPED
from mujina.user_input import UserError, run


def train(config: RunConfig, mark: Callable[[], None] = lambda: None, stop_requested: Callable[[], bool] = lambda: False) -> None:
    """Trains from where the run folder stands to the end of the last phase. Every process of the run calls this.

    `mark` is called whenever the run has got on; once `stop_requested`, the run is saved after the step and SystemExit(STOPPED) raised.
    """
    Trainer(config, mark).train(stop_requested)


class Trainer:
    """A run: what its steps work with, and where it stands (`step`: steps that are done)."""

    def __init__(self, config: RunConfig, mark: Callable[[], None]) -> None:
        binaries = feeder.open_sources(config)
        sources = feeder.facts(binaries)
        self.config = config = phases.resolve(config, sources)
        self.mark = mark
        self.order = DataOrder(config, sources)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self.feeder = feeder.Feeder(config, self.order, binaries, rank, ranks)
        self.phase_ends = set(itertools.accumulate(phase.num_steps for phase in config.phases))
        self.saver = Saver(config, self.phase_ends)
        self.guard = Guard(config.stability, groups.from_rank_0(stability.read_rollbacks(config.run)))
        start = self._newest()
        self.state = TrainingState(config)
        self.objective = Objective(config, self.state, self.order.names)
        self.step = self._go_on_from(start)
        self.log = Log(config, self.step) if dist.get_rank() == 0 else None
        self.watch = Watch.of_this_process(config.parallel.pipeline)
        self.mark()

    def train(self, stop_requested: Callable[[], bool]) -> None:
        config, state = self.config, self.state
        stopping = False
        while self.step < phases.num_steps(config.phases) and not stopping:
            if not self.guard.passes_over(self.step + 1):
                phase = config.phases[phases.locate(config.phases, self.step)[0]]
                learning_rate = phases.learning_rate(config.phases, self.step)
                began = time.perf_counter()
                batches, waited = self.feeder.take(self.step)
                losses = self.objective.gradients(phase, batches)
                gradient_norm = state.gradient_norm()
                verdict = self.guard.judge(self.step + 1, phase.name, losses.mean, gradient_norm)
                if verdict.reason:
                    self._stands_out(verdict, phase, losses.mean, gradient_norm, learning_rate)
                if verdict.action == "rollback":
                    self._roll_back()
                    continue
                now_and_then = self._looked_at(phase, batches)
                if verdict.action == "update":
                    state.update(learning_rate)
                seconds = time.perf_counter() - began
                vitals = self.watch.vitals(waited, state.gradients_at - began - waited, stop_requested())
                stopping = vitals.stop_requested
                if config.data.validation_tokens and self._is_due(config.train.validation_interval, or_phase_end=True):
                    now_and_then["validation"] = self.objective.losses(phase, *self.feeder.validation(phase)).by_source
                if self.log:
                    self.log.step(self.step + 1, phase.name, losses, learning_rate, gradient_norm, seconds, now_and_then, vitals)
            if self._is_due(config.train.checkpoint_interval, or_phase_end=True) or stopping:
                self._save()
            self.step += 1
            self._tell_of_saves()
            self.mark()
        self.saver.wait()
        self._tell_of_saves()
        if self.log and not stopping:
            self.log.close()
        self._last_word("stopped" if stopping else "done")
        if stopping:
            raise SystemExit(STOPPED)

    def _is_due(self, interval: int | None, or_phase_end: bool = False) -> bool:
        """At the end of the step that is under way."""
        return bool(interval and (self.step + 1) % interval == 0) or (or_phase_end and self.step + 1 in self.phase_ends)

    def _looked_at(self, phase: Phase, batches: list[feeder.MicroBatch]) -> dict[str, Any]:
        """What only some steps measure, between the gradients and the update."""
        found: dict[str, Any] = {}
        train = self.config.train
        if self._is_due(train.layer_norms_interval):
            found["layer_norms"] = self.state.layer_norms()
        if self.config.moe and self._is_due(train.validation_interval, or_phase_end=True):
            found["expert_similarity"] = self.objective.expert_similarity()
        if train.precision == "fp8" and self._is_due(train.fp8_shadow_interval):
            found["fp8_shadow"] = self.objective.fp8_shadow(phase, batches)
            if self.log and (warning := fp8_warning(found["fp8_shadow"])):
                self.log.event(self.step + 1, "fp8", reason=warning)
        return found

    def _save(self) -> None:
        """Saves the run as it stands after the step that is under way."""
        step = self.step + 1
        ledger = self.order.ledger(step) | {"interventions": self.guard.memory(), "expert_load": self.objective.memory()} | self.origin
        tokens = phases.consumed_tokens(self.config.phases, step)
        self.saver.save(step, tokens, self.state.updates, self.state.pieces(), ledger)

    def _tell_of_saves(self) -> None:
        saved = self.saver.check()
        if saved and self.log:
            self.log.saved(saved.step, saved.seconds, saved.whole_seconds)

    def _last_word(self, state: Literal["done", "stopped", "failed"]) -> None:
        """Rank 0 tells how the run ends; the others wait, for launchers take a run down when the first of its processes is gone."""
        if self.log:
            self.log.last_word(state)
        dist.barrier()

    def _newest(self) -> Checkpoint | None:
        """The checkpoint to go on from, the same on every rank. Those that were rolled back are gone afterwards."""
        start = self.saver.newest(lambda candidate: self.guard.agrees(candidate.step, candidate.ledger.get("interventions")))
        if start:
            phases.check_resumable(start.config, self.config, start.step)
            self.order.check_continues(start.ledger)
        return start

    def _go_on_from(self, start: Checkpoint | None) -> int:
        """Takes everything from `start`, or begins anew; returns the number of steps that are done."""
        self.guard.recall(start.ledger.get("interventions") if start else None)
        self.objective.recall(start.ledger.get("expert_load") if start else None)
        if start is None:
            initial = _initial(self.config)
            self.state.start_from(initial)
            self.origin = groups.from_rank_0(_origin(getattr(initial, "ledger", {})) if dist.get_rank() == 0 else None)
            return 0
        self.origin = _origin(start.ledger)
        self.state.restore(start)
        return start.step

    def _roll_back(self) -> None:
        """Back to before the steps that the guard passes over from now on."""
        if self.log:
            # Written down before anything else: killed from here on, the run starts again as if it had just gone back.
            stability.write_rollbacks(self.config.run, self.guard.rollbacks)
        dist.barrier()
        self.step = self._go_on_from(self._newest())
        self.mark()
        if self.log:
            self.log.rewind(self.step)
            back = self.guard.rollbacks[-1]
            self.log.event(self.step, "back", reason=f"the data of steps {back['first']} to {back['last']} are passed over")

    def _stands_out(self, verdict: Verdict, phase: Phase, loss: float, gradient_norm: float, learning_rate: float) -> None:
        """Records a step with its samples' places in the data: (source, token offset). Raises UserError where the run must stop."""
        in_phase = phases.locate(self.config.phases, self.step)[1]
        samples = self.order.samples(self.step, range(phase.batch_size(in_phase)))
        if self.log:
            self.log.event(
                self.step + 1,
                verdict.action,
                reason=verdict.reason,
                loss=loss,
                gradient_norm=gradient_norm,
                median=verdict.median,
                deviation=verdict.deviation,
                lr=learning_rate,
                samples=samples,
            )
        if verdict.action != "stop":
            return
        self.saver.wait()
        self._last_word("failed")
        sources = Counter(source for source, _ in samples)
        latest = self.config.run / "checkpoints/latest"
        raise UserError(
            "\n".join(
                [
                    f"step {self.step + 1} of phase {phase.name}: {verdict.reason}",
                    *(f"  before it: {line}" for line in self.guard.history()),
                    f"  learning rate {learning_rate:.3g}; its batch: {', '.join(f'{count} of {name}' for name, count in sources.items())}",
                    f"  last checkpoint: {latest.resolve() if latest.exists() else 'none'}; the samples are in "
                    f"{self.config.run / 'events.jsonl'}",
                    f"  try: a lower phases.{phase.name}.learning_rate, another train.precision, or look at these samples with `mujina "
                    "inspect`; if the data is bad for longer, raise stability.pass_over; if the step was harmless, raise "
                    "stability.deviations",
                ]
            )
        )


def _initial(config: RunConfig) -> TensorSource:
    if config.moe and config.moe.upcycle_from:
        return Mixture(config, config.moe.upcycle_from)
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


def _origin(ledger: dict[str, Any]) -> dict[str, Any]:
    """What the ledger of every checkpoint of a run repeats."""
    return {key: value for key, value in ledger.items() if key == "upcycled_from"}


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.micro_batch_size=2")] = None,
) -> None:
    """One process of a training run; `mujina train` starts as many as are needed."""
    settings = configuration.load(config, overrides)
    settings.check(groups.world_size())
    with groups.hold(settings.run), groups.of_run(settings.parallel, settings.seed):
        attempt = groups.from_rank_0(failures.new_attempt(settings.run) if groups.rank() == 0 else None)
        with failures.supervised(attempt, groups.rank(), groups.world_size(), settings.train.hang_minutes * 60) as watchdog:
            train(settings, watchdog.mark, failures.stop_on_signal())


if __name__ == "__main__":
    run(main)
