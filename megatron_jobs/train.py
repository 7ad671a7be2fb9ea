"""The training loop.

    torchrun --nproc-per-node 2 -m megatron_jobs.train CONFIG.yaml [key=value …]      (or `mujina train`)
    srun python -m megatron_jobs.train CONFIG.yaml [key=value …]                      (what the Slurm scripts call)

A run that was interrupted goes on from its newest whole checkpoint when it is started again, with the same losses to the
last bit; a run that is finished says so. After SIGTERM or SIGUSR1 it finishes its step, saves and ends with status 143 (`mujina.exits`).
"""

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from megatron_jobs import config as configuration
from megatron_jobs import failures, ranks, references, stability
from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.checkpoints.saver import Saver
from megatron_jobs.checkpoints.weights import InitialAdapter, InitialWeights
from megatron_jobs.config import RunConfig
from megatron_jobs.config.phase import Phase
from megatron_jobs.conversion.families import tell_hindrance
from megatron_jobs.conversion.start import check_base, check_finite, open_adapter, open_base, open_weights, origin_of, with_adapter
from megatron_jobs.conversion.upcycle import Mixture
from megatron_jobs.data import feeder, phases
from megatron_jobs.data.ledger import Ledger, Origin
from megatron_jobs.data.order import DataOrder, Sample
from megatron_jobs.engine import groups
from megatron_jobs.engine.passes import Passes, fp8_warning
from megatron_jobs.engine.state import TrainingState
from megatron_jobs.monitoring.metrics import Log
from megatron_jobs.monitoring.vitals import Watch
from megatron_jobs.planning import layouts
from megatron_jobs.planning.layers import has_transformer_engine
from megatron_jobs.stability import Guard, Verdict
from mujina.checkpoint_folders import resolved, step_folder
from mujina.exits import STOPPED
from mujina.matrices import TensorSource
from mujina.user_input import UserError, command_line


def train(
    config: RunConfig,
    mark: Callable[[], None] = lambda: None,
    stop_requested: Callable[[], bool] = lambda: False,
    last_step: int | None = None,
) -> None:
    """Trains from where the run folder stands to the end of the last phase. Every process of the run calls this.

    `mark` is called whenever the run has got on; once `stop_requested`, the run is saved after the step and SystemExit(STOPPED) raised.
    With a `last_step` it ends there, as a process ends that nobody asked to save.
    """
    Trainer(config, mark).train(stop_requested, last_step)


class Trainer:
    """A run: what its steps work with, and where it stands (`step`: steps that are done)."""

    def __init__(self, config: RunConfig, mark: Callable[[], None]) -> None:
        binaries = feeder.open_sources(config)
        sources = feeder.facts(binaries)
        self.config = config = phases.resolve(config, sources)
        self.mark = mark
        self.order = DataOrder(config, sources)
        self.feeder = feeder.Feeder(config, self.order, binaries, *groups.data_parallel())
        self.phase_ends = set(itertools.accumulate(phase.num_steps for phase in config.phases))
        self.saver = Saver(config, self.phase_ends)
        self.guard = Guard(config.stability, ranks.from_rank_0(stability.read_rollbacks(config.run) if ranks.rank() == 0 else None))
        start = self._newest()
        self.state = TrainingState(config)
        self.base = self._freeze(start) if config.adapter else None
        self.passes = Passes(config, self.state, self.order.names)
        self.step = self._go_on_from(start)
        self.refers = ""  # the phase whose references are there
        layers = "Transformer Engine" if has_transformer_engine() else "local"
        if ranks.rank() == 0 and (self.guard.rollbacks or (config.run / "rollbacks.json").exists()):
            stability.write_rollbacks(config.run, self.guard.rollbacks)  # the file may have been gone, or torn
        passed_over = [(back["first"], back["last"]) for back in self.guard.rollbacks]
        self.log = Log(config, self.step, groups.device_name(), layers, passed_over) if ranks.rank() == 0 else None
        if self.log and not self.step:
            tell_hindrance(config)
        self.watch = Watch.of_this_process(config.parallel.pipeline)
        self.mark()

    def train(self, stop_requested: Callable[[], bool], last_step: int | None = None) -> None:
        config, state, stopping = self.config, self.state, False
        num_steps = last_step or phases.num_steps(config.phases)
        while self.step < num_steps and not stopping:
            phase, step_in_phase = phases.at(config.phases, self.step)
            if step_in_phase == 0 and phase.optimizer == "reset":
                state.forget_updates()
            if phase.loss.kind == "preference" and self.refers != phase.name:
                self._refer(step_in_phase)
            if not self.guard.passes_over(self.step + 1):
                learning_rate = phases.learning_rate(config.phases, self.step)
                began = time.perf_counter()
                batches, waited = self.feeder.take(self.step)
                measured = self.passes.gradients(phase, batches)
                gradient_norm = state.gradient_norm()
                verdict = self.guard.judge(self.step + 1, phase.name, measured.loss, gradient_norm)
                if verdict.reason:
                    self._record(verdict, loss=measured.loss, gradient_norm=gradient_norm, lr=learning_rate)
                if verdict.action == "stop":
                    self._give_up(verdict, learning_rate)
                if verdict.action == "rollback":
                    self._roll_back(verdict, step_in_phase)
                    continue
                now_and_then = self._looked_at(phase, batches)
                if verdict.action == "update":
                    self.passes.update(measured, learning_rate)
                seconds = time.perf_counter() - began
                vitals = self.watch.vitals(waited, state.gradients_at - began - waited)
                if config.data.validation_tokens and self._is_due(config.train.validation_interval, or_phase_end=True):
                    now_and_then["validation"] = self._validated(phase)
                if self.log:
                    told = {"phase": phase.name, "lr": learning_rate, "grad_norm": gradient_norm, "seconds": seconds}
                    self.log.step(self.step + 1, told | measured.as_record() | now_and_then, vitals)
            stopping = ranks.any_of(stop_requested())
            if self._is_due(config.train.checkpoint_interval, or_phase_end=True) or stopping:
                self._save()
            self.step += 1
            self._tell_of_saves()
            self.mark()
        self.saver.wait()
        self._tell_of_saves()
        if stopping:
            if self.log:
                saved = step_folder(self.saver.folder, self.step)
                self.log.event(self.step, "stopped", reason=f"saved in {saved}; the same command goes on from there")
            self._last_word("stopped")
            raise SystemExit(STOPPED)
        if self.guard.left_out_all(self.step):
            self._last_word("failed")
            raise UserError(self.guard.never_updated(config.run, self.step))
        if self.log:
            self.log.close()
        self._last_word("done")

    def _is_due(self, interval: int | None, or_phase_end: bool = False) -> bool:
        """At the end of the step that is under way."""
        return bool(interval and (self.step + 1) % interval == 0) or (or_phase_end and self.step + 1 in self.phase_ends)

    def _validated(self, phase: Phase) -> dict[str, float]:
        """The mean loss of the held-out samples, by source."""

        def marked() -> Iterator[feeder.MicroBatch]:
            for batch in batches:
                self.mark()
                yield batch

        batches, num_batches = self.feeder.validation(phase)
        if not num_batches:
            return {}
        return self.passes.measure(phase, marked(), num_batches).by_source

    def _refer(self, step_in_phase: int) -> None:
        """Before the first step of a phase of preferences: what its reference makes of its pairs."""

        def say(done: int, of: int) -> None:
            self.mark()
            if self.log:
                self.log.event(self.step, "references", reason=f"{done:,} of {of:,} pairs")

        index, _ = phases.locate(self.config.phases, self.step)
        about = references.identity(self.config, self.order, index, self.origin, self.base, self.guard.rollbacks)
        compute = self.passes.log_probabilities if step_in_phase == 0 or self.base else None
        self.passes.references = references.of_phase(self.config, index, self.order, about, self.feeder, compute, say)
        self.refers = self.config.phases[index].name

    def _looked_at(self, phase: Phase, batches: list[feeder.MicroBatch]) -> dict[str, Any]:
        """What only some steps measure, between the gradients and the update."""
        found: dict[str, Any] = {}
        train = self.config.train
        if self._is_due(train.layer_norms_interval):
            found["layer_norms"] = self.state.layer_norms()
        if self.passes.routing and self._is_due(train.validation_interval, or_phase_end=True):
            found["expert_similarity"] = self.passes.routing.similarity()
        if train.precision == "fp8" and self._is_due(train.fp8_shadow_interval):
            found["fp8_shadow"] = self.passes.fp8_shadow(phase, batches)
            if self.log and (warning := fp8_warning(found["fp8_shadow"])):
                self.log.event(self.step + 1, "fp8", reason=warning)
        return found

    def _save(self) -> None:
        """Saves the run as it stands after the step that is under way."""
        step = self.step + 1
        remembered = {
            "origin": self.origin,
            "base": self.base,
            "interventions": self.guard.to_ledger(),
            "expert_load": self.passes.routing.to_ledger() if self.passes.routing else None,
        }
        self.saver.save(step, self.state.updates, self.state.boxes(), self.order.ledger(step).model_copy(update=remembered))

    def _tell_of_saves(self) -> None:
        saved = self.saver.check()
        if saved and self.log:
            self.log.saved(saved.step, saved.seconds, saved.whole_seconds)

    def _last_word(self, state: Literal["done", "stopped", "failed"]) -> None:
        """Rank 0 tells how the run ends; the others wait, for launchers take a run down when the first of its processes is gone."""
        if self.log:
            self.log.last_word(state)
        ranks.wait_for_all()

    def _newest(self) -> Checkpoint | None:
        """The checkpoint to go on from, the same on every rank. Those that were rolled back are gone afterwards."""
        start = self.saver.newest(self._agrees)
        if start:
            phases.check_resumable(start.config, self.config, start.step)
            self.order.check_continues(start.ledger)
        return start

    def _agrees(self, checkpoint: Checkpoint) -> bool:
        return self.guard.agrees(checkpoint.step, checkpoint.ledger.interventions)

    def _go_on_from(self, start: Checkpoint | None) -> int:
        """Takes everything from `start`, or begins anew; returns the number of steps that are done."""
        ledger = start.ledger if start else Ledger()
        self.guard.from_ledger(ledger.interventions)
        if self.passes.routing:
            self.passes.routing.from_ledger(ledger.expert_load)
        if start:
            self.origin = ledger.origin
            self.state.restore(start)
            return start.step
        weights, origin_of = _initial(self.config)
        self.origin = ranks.from_rank_0(origin_of() if ranks.rank() == 0 else None)
        check_finite(self.config, self.state.start_from(weights))
        return 0

    def _freeze(self, start: Checkpoint | None) -> dict[str, Any]:
        """Gives the state the base of its adapter, which must be that of `start`; returns what identifies it."""
        base = open_base(self.config)
        problem, identity = None, None
        if ranks.rank() == 0:
            try:
                identity = base.identity
                if start:
                    check_base(start, base)
            except UserError as error:
                problem = str(error)
        problem, identity = ranks.from_rank_0((problem, identity))
        if problem:
            raise UserError(problem)
        check_finite(self.config, self.state.freeze(base))
        return identity

    def _roll_back(self, verdict: Verdict, step_in_phase: int) -> None:
        """Back to before the steps that the guard passes over from now on."""
        back_to = self.guard.back_to(self.step + 1, step_in_phase)
        checkpoint = self.saver.before(back_to, self._agrees)
        done = checkpoint.step if checkpoint else 0
        self.guard.go_back(self.step + 1, back_to, done, verdict.reason)
        if self.log:
            # Written down before anything else: killed from here on, the run starts again as if it had just gone back.
            stability.write_rollbacks(self.config.run, self.guard.rollbacks)
        ranks.wait_for_all()
        self.saver.remove_after(done)
        self.step = self._go_on_from(checkpoint)
        self.mark()
        if self.log:
            self.log.rewind(self.step, len(self.guard.rollbacks))
            back = self.guard.rollbacks[-1]
            self.log.event(self.step, "back", reason=f"the data of steps {back['first']} to {back['last']} are passed over")

    def _batch(self) -> list[Sample]:
        """Where the samples of the step under way lie in the data."""
        phase, step_in_phase = phases.at(self.config.phases, self.step)
        return self.order.samples(self.step, range(phase.batch_size(step_in_phase)))

    def _record(self, verdict: Verdict, **values: float) -> None:
        """Writes down a step that stands out, with its samples."""
        if self.log:
            found = {"reason": verdict.reason, "median": verdict.median, "deviation": verdict.deviation}
            self.log.event(self.step + 1, verdict.action, **found, **values, samples=self._batch())

    def _give_up(self, verdict: Verdict, learning_rate: float) -> NoReturn:
        """Ends the run at a step that it cannot go past. Raises UserError with all that helps to find out why."""
        self.saver.wait()
        self._last_word("failed")
        phase, _ = phases.at(self.config.phases, self.step)
        sources = Counter(source for source, _ in self._batch())
        latest = resolved(self.config.run / "checkpoints/latest")
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


def _initial(config: RunConfig) -> tuple[TensorSource, Callable[[], Origin | None]]:
    """The weights that a run begins with, and what tells where they come from (it reads whole files, for their checksums)."""
    if config.moe and config.moe.upcycle_from:
        mixture = Mixture(config, config.moe.upcycle_from, "moe.upcycle_from")
        return mixture, lambda: mixture.ledger.origin
    if config.train.init_from is None:
        return InitialWeights(config.model, config.moe, config.seed), lambda: None
    opened = open_weights(config.train.init_from, config, "train.init_from", config.moe)
    if config.adapter is None:
        return opened, lambda: origin_of(opened)
    if config.adapter.init_from is None:
        return InitialAdapter(config), lambda: origin_of(opened)
    adapter = open_adapter(config, opened)
    return adapter, lambda: with_adapter(origin_of(opened), adapter)


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.micro_batch_size=2")] = None,
) -> None:
    """One process of a training run; `mujina train` starts as many as are needed."""
    settings = configuration.load(config, overrides)
    layouts.check(settings, ranks.world_size())
    with ranks.hold(settings.run), contextlib.ExitStack() as stack:
        first = failures.new_attempt(settings.run) if ranks.rank() == 0 else None
        with failures.before_the_ranks_meet(first):
            stack.enter_context(groups.of_run(settings.parallel, settings.seed))
        attempt = ranks.from_rank_0(first)
        with failures.supervised(attempt, ranks.rank(), ranks.world_size(), settings.train.hang_minutes * 60) as watchdog:
            train(settings, watchdog.mark, failures.stop_on_signal())


if __name__ == "__main__":
    command_line(main)
