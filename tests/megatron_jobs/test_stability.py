"""Spikes and NaN: the verdicts, and what becomes of a run in which a fault is put in at given steps."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_jobs.checkpoints.checkpoint import STATES, Checkpoint, prune, write_weights
from megatron_jobs.checkpoints.saver import Saver
from megatron_jobs.checkpoints.weights import InitialWeights
from megatron_jobs.config import RunConfig, StabilityConfig
from megatron_jobs.data.ledger import Ledger
from megatron_jobs.stability import Guard, read_rollbacks, write_rollbacks
from mujina.matrices import Box
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_launch import saved
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks

LOOSE = dict(window=16, deviations=20.0, pass_over=2)  # four steps of history, and nothing but what is put in stands out

ROLLBACK = dict(on_spike="rollback", pass_over=3)


def guard(**values: Any) -> Guard:
    return Guard(StabilityConfig(**values), [])


def fill(here: Guard, values: list[float]) -> None:
    for step, value in enumerate(values, start=1):
        assert here.judge(step, "web", value, 1.0).reason is None


def test_a_spike_is_told_by_median_and_mad():
    """Of 1, 2, … 9 the median is 5 and the scaled median absolute deviation 2 · 1.4826."""
    values = [float(n) for n in (5, 4, 6, 3, 7, 2, 8, 1, 9)]
    for value, is_spike in ((5 + 3 * 2 * 1.4826 + 0.01, True), (5 + 3 * 2 * 1.4826 - 0.01, False), (-100.0, False)):
        here = guard(window=9, deviations=3.0, on_spike="skip")
        here.judge(1, "web", 5.0, 1.0)
        here.losses.extend(values)
        here.gradient_norms.extend([1.0] * 9)
        assert (here.judge(10, "web", value, 1.0).action == "skip") == is_spike


def test_a_flat_curve_has_no_spikes_below_the_floor():
    here = guard(window=16)
    fill(here, [2.0] * 8)
    assert here.judge(9, "web", 2.1, 1.0).reason is None  # 5% above; the floor makes 6 deviations of 6%
    assert "the loss is 2.2" in here.judge(10, "web", 2.2, 1.0).reason
    assert "gradient norm" in here.judge(11, "web", 2.0, 1.2).reason


def test_without_history_nothing_is_a_spike_and_a_phase_begins_without():
    here = guard(window=16)
    fill(here, [2.0] * 3)
    assert here.judge(4, "web", 50.0, 1.0).reason is None
    fill(here, [2.0] * 8)
    assert here.judge(9, "chat", 50.0, 1.0).reason is None
    assert guard().judge(1, "web", math.nan, 1.0).action == "rollback"


def test_what_is_skipped_does_not_enter_the_window_and_what_is_logged_does():
    for policy, entries in (("skip", 8), ("log", 9)):
        here = guard(window=16, on_spike=policy)
        fill(here, [2.0] * 8)
        assert here.judge(9, "web", 50.0, 1.0).reason
        assert len(here.losses) == entries


def test_memory_goes_through_json():
    """A guard that was restored judges on as the one that was not; a rollback that came later is not forgotten."""
    here = guard(window=4, on_spike="skip")
    fill(here, [2.0, 2.1, 1.9, 2.0])
    here.judge(5, "web", 50.0, 1.0)
    memory = json.loads(json.dumps(here.to_ledger()))
    again = guard(window=4, on_spike="skip")
    again.from_ledger(memory)
    for loss in (2.05, 9.0, 2.0, math.nan):
        assert again.judge(6, "web", loss, 1.0) == here.judge(6, "web", loss, 1.0)
    again.go_back(6, back_to=0, done=0, reason="NaN")
    again.from_ledger(memory)
    assert [back["first"] for back in again.rollbacks] == [1]
    assert not again.agrees(5, memory) and again.agrees(5, again.to_ledger()) and again.agrees(0, None)


@pytest.mark.parametrize(
    ("step", "step_in_phase", "done", "back_to", "first"),
    [
        (100, 99, 90, 92, 93),  # the usual: the eight steps to 100
        (100, 99, 96, 92, 97),  # no checkpoint is so old
        (5, 4, 0, 0, 1),
        (62, 1, 60, 60, 61),  # not back into the phase before
    ],
)
def test_what_a_rollback_passes_over(step, step_in_phase, done, back_to, first):
    here = guard(pass_over=8)
    assert here.back_to(step, step_in_phase) == back_to
    here.go_back(step, back_to, done, "NaN")
    assert here.rollbacks == [{"first": first, "last": step, "reason": "NaN"}]


@pytest.mark.parametrize(("pass_over", "interval", "needed"), [(1, 10, 1), (8, 500, 2), (11, 10, 2), (12, 10, 3), (25, 10, 4)])
def test_the_checkpoints_that_a_rollback_can_need_are_kept(tmp_path, pass_over, interval, needed):
    """After any number of steps, however few are kept for other reasons, one is there that is old enough."""
    stability = StabilityConfig(pass_over=pass_over)
    assert stability.checkpoints_needed(interval) == needed
    for step in range(interval, 20 * interval, interval):
        (tmp_path / f"step-{step:08d}").mkdir()
        prune(tmp_path, 1, lambda step: False, back_to=step + 1 - pass_over)
        there = sorted(int(path.name[5:]) for path in tmp_path.glob("step-*"))
        assert len(there) <= needed
        for spike in range(step + 1, step + interval + 1):
            if spike - pass_over >= interval:
                assert there[0] <= spike - pass_over


def test_checkpoints_before_a_phase_are_not_kept_for_its_rollbacks(prepared, tmp_path):
    """The same step as the guard goes back to when the next step is not finite."""
    config = tiny(prepared, tmp_path)  # phases of six and four steps
    here, saver = guard(pass_over=config.stability.pass_over), Saver(config, {6, 10})
    for done, step_in_phase in ((0, 0), (3, 3), (5, 5), (6, 0), (8, 2)):
        assert saver.back_to(done) == here.back_to(done + 1, step_in_phase)
    assert Saver(tiny(prepared, tmp_path, stability=dict(on_not_finite="skip")), {6, 10}).back_to(8) == 8


@pytest.mark.parametrize("left", [None, b"", bytes(9), b'[{"first": 4}]'])
def test_rollbacks_whose_file_is_gone_or_torn(prepared, tmp_path, left, capsys):
    """What the newest checkpoint knows may be less: one that was rolled back, and could not be removed, is newer."""
    config = tiny(prepared, tmp_path)
    for step in (3, 6):
        saved(config, step)
    here = Guard(config.stability, [])
    here.go_back(8, back_to=3, done=3, reason="NaN")
    path = tmp_path / "checkpoints/step-00000003/ledger.json"
    path.write_text(Ledger.from_json(path.read_text(), "").model_copy(update={"interventions": here.to_ledger()}).to_json())
    if left is not None:
        (tmp_path / "rollbacks.json").write_bytes(left)
    assert read_rollbacks(tmp_path) == here.rollbacks
    assert ("those hold that the checkpoints know" in capsys.readouterr().out) == (left is not None)
    write_rollbacks(tmp_path, [])
    assert read_rollbacks(tmp_path) == []


class Killed(BaseException):
    """Stands for the end of the process at this moment: nothing is written any more."""


def train_with_faults(config: RunConfig, faults: dict[int, str], killed_at: str | None = None) -> None:
    """Trains with a fault at given steps (from 1) and writes each step that went forward to RUN/forwarded.

    loss   is reported ten times as large      norm   all gradients of the last rank are 1,000 times as large
    nan    one parameter's gradient on the last rank is NaN
    """
    import dataclasses

    import torch.distributed as dist

    from megatron_jobs.engine.passes import Passes
    from megatron_jobs.train import Trainer

    now = {"step": 0}
    originals = passes_over, gradients, go_on_from, remove_after = (
        Guard.passes_over,
        Passes.gradients,
        Trainer._go_on_from,
        Saver.remove_after,
    )

    def at(moment: str) -> None:
        if moment == killed_at:
            raise Killed

    def with_step(self: Guard, step: int) -> bool:
        at(f"step {step}")
        now["step"] = step
        return passes_over(self, step)

    def with_fault(self: Passes, *arguments: Any) -> Any:
        result = gradients(self, *arguments)
        fault = faults.get(now["step"])
        if dist.get_rank() == 0:
            with (config.run / "forwarded").open("a") as file:
                file.write(f"{now['step']}\n")
        if fault == "loss":
            return dataclasses.replace(result, measures=result.measures | {"loss": result.loss * 10})
        if fault and dist.get_rank() == dist.get_world_size() - 1:
            for local in self.state.parameters if fault == "norm" else self.state.parameters[:1]:
                local.parameter.main_grad.mul_(1000 if fault == "norm" else math.nan)
        return result

    def remove(self: Saver, step: int) -> None:
        at("rollback written down")
        remove_after(self, step)

    def go_on_again(self: Trainer, *arguments: Any) -> int:
        if now["step"]:
            at("later checkpoints gone")
        return go_on_from(self, *arguments)

    Guard.passes_over, Passes.gradients, Trainer._go_on_from, Saver.remove_after = with_step, with_fault, go_on_again, remove
    try:
        train_here(config)
    except Killed:
        pass
    finally:
        Guard.passes_over, Passes.gradients, Trainer._go_on_from, Saver.remove_after = originals


def several(runs: list[tuple[RunConfig, dict[int, str]]]) -> None:
    for config, faults in runs:
        train_with_faults(config, faults)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> list[dict[str, Any]]:
    """What the guard found."""
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["what"] in ("update", "skip", "rollback", "stop")]


def newest(run: Path) -> Checkpoint:
    return Checkpoint(run / "checkpoints/latest")


def assert_same(one: Path, other: Path) -> None:
    """The last checkpoints: every value and the ledger."""
    a, b = newest(one), newest(other)
    assert (a.step, a.updates) == (b.step, b.updates) and a.ledger == b.ledger
    assert_same_values(a, b)


def assert_same_values(a: Checkpoint, b: Checkpoint) -> None:
    for matrix, (rows, columns) in a.shapes.items():
        for state in STATES:
            assert a.read(matrix, Box(0, rows, 0, columns), state).equal(b.read(matrix, Box(0, rows, 0, columns), state)), (matrix, state)


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
    """Run folders, by policy and kind of fault: one process, ten steps in phases of six and four, a checkpoint every three."""
    folder = tmp_path_factory.mktemp("faults")
    cases = {
        "none": ({}, {}),
        "log loss": ({6: "loss"}, dict(on_spike="log")),
        "skip loss": ({6: "loss"}, dict(on_spike="skip")),
        "skip norm": ({5: "norm"}, dict(on_spike="skip")),
        "skip nan": ({2: "nan", 7: "nan"}, dict(on_not_finite="skip")),
        "rollback loss": ({6: "loss"}, dict(on_spike="rollback")),
        "rollback nan": ({7: "nan"}, dict()),  # the first of a phase: only that one, and not back into the phase before
        "rollback to the start": ({3: "nan"}, dict(pass_over=3)),
        "rollback as far as can be": ({5: "nan"}, dict(pass_over=4)),  # the first checkpoint is that of step 3
    }
    configs = {name: tiny(prepared, folder / name.replace(" ", "-"), stability=LOOSE | values) for name, (_, values) in cases.items()}
    run_ranks(1, several, [(configs[name], faults) for name, (faults, _) in cases.items()])
    return {name: config.run for name, config in configs.items()}


def test_a_logged_spike_changes_nothing(runs):
    expected = losses(runs["none"])
    assert losses(runs["log loss"]) == [*expected[:5], expected[5] * 10, *expected[6:]]
    (event,) = events(runs["log loss"])
    assert event["step"] == 6 and event["what"] == "update" and event["loss"] == expected[5] * 10
    assert event["median"] == pytest.approx(sorted(expected[:5])[2]) and len(event["samples"]) == 8


@pytest.mark.parametrize(("name", "skipped"), [("skip loss", [6]), ("skip norm", [5]), ("skip nan", [2, 7])])
def test_a_skipped_step_makes_no_update(runs, name, skipped):
    run, first = runs[name], skipped[0]
    assert steps(run) == list(range(1, 11))
    expected = losses(runs["none"])
    assert losses(run)[: first - 1] == expected[: first - 1] and losses(run)[first] != expected[first]
    end = newest(run)
    about = end.ledger.interventions
    assert [skip["step"] for skip in about["skipped"]] == skipped and end.updates == 10 - len(skipped)
    assert [(event["step"], event["what"]) for event in events(run)] == [(step, "skip") for step in skipped]
    assert not about["rollbacks"]


@pytest.mark.parametrize(
    ("name", "first", "last", "back_at"),
    [
        ("rollback loss", 5, 6, 3),
        ("rollback nan", 7, 7, 6),
        ("rollback to the start", 1, 3, 0),
        ("rollback as far as can be", 4, 5, 3),
    ],
)
def test_a_rollback_is_a_run_that_never_saw_the_data(prepared, tmp_path, runs, name, first, last, back_at):
    """It equals, to the last bit, a run that knows from the beginning which steps to pass over."""
    run = runs[name]
    (event,) = events(run)
    assert (event["step"], event["what"]) == (last, "rollback")
    forwarded = [int(line) for line in (run / "forwarded").read_text().split()]
    assert forwarded == [*range(1, last + 1), *range(back_at + 1, first), *range(last + 1, 11)]
    assert steps(run) == [n for n in range(1, 11) if not first <= n <= last]
    end = newest(run)
    about = end.ledger.interventions
    assert [(back["first"], back["last"]) for back in about["rollbacks"]] == [(first, last)]
    assert end.updates == 10 - (last - first + 1)

    told = tiny(prepared, tmp_path / "told", stability=LOOSE | dict(on_spike="rollback"))
    told.run.mkdir()
    write_rollbacks(told.run, about["rollbacks"])
    run_ranks(1, train_with_faults, told, {})
    assert losses(told.run) == losses(run)
    assert_same(told.run, run)


@pytest.mark.parametrize("moe", [None, dict(scores="sigmoid", balancing="bias"), dict(balancing="global_aux_loss")], ids=str)
def test_a_skipped_step_changes_nothing(prepared, tmp_path, moe):
    """Weights, moments, and what a router remembers."""
    train = dict(checkpoint_interval=1, keep_checkpoints=10)
    config = tiny(prepared, tmp_path, train=train, moe=moe and MOE | moe, stability=dict(on_not_finite="skip"))
    run_ranks(2, train_with_faults, config, {4: "nan"}, "step 6")
    earlier, before, after = (Checkpoint(tmp_path / f"checkpoints/step-0000000{step}") for step in (2, 3, 4))
    assert_same_values(before, after)
    assert (before.updates, after.updates) == (3, 3)
    assert before.ledger.expert_load == after.ledger.expert_load and (not moe or earlier.ledger.expert_load != before.ledger.expert_load)


@pytest.mark.parametrize("parallel", [dict(), dict(pipeline=2)], ids=["data2", "pipeline2"])
def test_killed_around_a_rollback(prepared, tmp_path, parallel):
    """The first rollback leaves a checkpoint behind that is newer than where it goes back to (4 with back at 2).

    Ended just before the spike, with the rollback written down, with the later checkpoints gone, among the passed-over steps and
    behind them; each time started again. Losses, ledger and every value are those of the run that was not disturbed."""
    whole, parts = (
        tiny(prepared, tmp_path / run, parallel=parallel, train=dict(checkpoint_interval=2), stability=LOOSE | ROLLBACK)
        for run in ("whole", "parts")
    )
    faults = {6: "norm", 8: "nan"}
    run_ranks(2, train_with_faults, whole, faults)
    for moment in ("step 6", "rollback written down", "step 6", "later checkpoints gone", "step 9", None):
        run_ranks(2, train_with_faults, parts, faults, moment)
    assert losses(parts.run) == losses(whole.run)
    assert steps(parts.run) == steps(whole.run) == [1, 2, 3, 9, 10]
    assert_same(parts.run, whole.run)


def test_a_run_without_an_update_is_not_done(prepared, tmp_path):
    with pytest.raises(AssertionError) as raised:
        run_ranks(1, train_with_faults, tiny(prepared, tmp_path, stability=LOOSE | dict(pass_over=4)), {3: "nan", 6: "nan", 10: "nan"})
    for text in ["UserError", "all 10 steps are done, and none has updated the weights", "steps 1 to 3 were passed over", "steps 7 to 10"]:
        assert text in str(raised.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_that_are_not_finite_are_refused_by_name(prepared, tmp_path, world_size):
    whole = tiny(prepared, tmp_path / "whole")
    weights = InitialWeights(whole.model, None, 1)
    broken = {"layers.1.up": 3, "output": 2}

    def with_nan(name: str, box: Box) -> torch.Tensor:
        values = weights.read(name, box).clone()
        values.view(-1)[: broken.get(name, 0)] = math.nan
        return values

    source = SimpleNamespace(read=with_nan)
    found = write_weights(tmp_path / "start", whole, source, weights.shapes, Ledger(), "writing")
    with pytest.raises(AssertionError) as raised:
        run_ranks(world_size, train_here, tiny(prepared, tmp_path / "run", train=dict(init_from=str(found))))
    told = f"UserError: train.init_from ({found}): 5 values of the weights to start from are NaN or Inf, in layers.1.up (3), output (2)"
    assert told in str(raised.value) and not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("stability", "faults", "says"),
    [
        (dict(max_rollbacks=1), {4: "nan", 8: "nan"}, ["step 8 of phase chat", "steps 4 to 4 were passed over", "4 of chat"]),
        (dict(on_not_finite="skip", max_skips=2), {4: "nan", 5: "nan", 6: "nan"}, ["step 6 of phase web", "step 4 was skipped", "of code"]),
    ],
    ids=["rollbacks", "skips"],
)
def test_a_run_that_does_not_recover_ends_with_a_diagnosis(prepared, tmp_path, stability, faults, says):
    with pytest.raises(AssertionError) as raised:
        run_ranks(1, train_with_faults, tiny(prepared, tmp_path, stability=LOOSE | stability), faults)
    for text in ["UserError", "the loss is", "learning rate", "last checkpoint: /", *says]:
        assert text in str(raised.value)
    assert events(tmp_path)[-1]["what"] == "stop"
