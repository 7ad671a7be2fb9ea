"""Phases: budgets from amounts and weights, batch ramps, learning rates, what may change, and what `mujina plan` shows of it."""

import math
from datetime import datetime

import pytest
import yaml
from rich.console import Console

from megatron_jobs.config import from_dict
from megatron_jobs.config.model import MoEConfig
from megatron_jobs.data import phases
from megatron_jobs.data.order import DataOrder
from megatron_jobs.planning import layouts, plan
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.data.test_order import phase, run_config, sources


def quotas(config, there):
    resolved = phases.resolve(config, there)
    return [{share.source: share.num_samples for share in row} for row in phases.shares(resolved, there)]


def test_weights_share_what_the_amounts_leave():
    """10 steps of 4 samples of 16 tokens: 5 samples by tokens, half of the 4 blocks of 64 tokens by epochs, the rest 3 to 1."""
    mix = {"a": {"tokens": 80}, "b": {"epochs": 0.5}, "c": 3.0, "d": 1.0}
    there = sources(a=1000, b=257, c=10_000, d=10_000)
    assert quotas(run_config([phase("p", 640, sources=mix)]), there) == [{"a": 5, "b": 8, "c": 20, "d": 7}]


@pytest.mark.parametrize("portion", [1.0, {"tokens": 64}, {"epochs": 1.0}])
def test_a_source_shorter_than_a_block_is_told_as_that(portion):
    """More epochs would not help: not one sample can be made of it."""
    config = run_config([phase("p", None if isinstance(portion, dict) else 640, sources={"a": portion})], max_epochs=1)
    with pytest.raises(UserError, match=r"data.block_length \(64\): source a holds 64 tokens, and not one whole block .*: lower it"):
        quotas(config, sources(a=64))


def test_amounts_alone_make_the_budget():
    mix = {"a": {"tokens": 1000}, "b": {"epochs": 1.0}}
    there = sources(a=2000, b=257)
    config = phases.resolve(run_config([phase("p", None, sources=mix)]), there)
    assert config.phases[0].tokens == 62 * 16 + 256  # whole samples of a, all whole blocks of b
    assert config.phases[0].num_steps == 19  # of 4 samples each: 76 of the 78
    taken = quotas(config, there)[0]
    assert sum(taken.values()) == 76 and taken["a"] in (60, 61) and taken["b"] in (15, 16)
    again = phases.resolve(config, there)
    assert again == config


@pytest.mark.parametrize(
    "tokens, mix, message",
    [
        (640, {"a": {"tokens": 656}}, "the amounts of its sources (656 tokens) must not exceed its tokens (640)"),
        (640, {"a": {"tokens": 640}, "b": 1.0}, "the amounts of its sources (640 tokens) leave nothing of its tokens (640) to b"),
        (640, {"a": {"tokens": 560}}, "the amounts of its sources (560 tokens) fall short of its tokens (640)"),
        (640, {"a": {"epochs": 0.001}, "b": 1.0}, "phases.p.sources.a: its amount is 0 tokens, and must hold at least one sample of 16"),
        (None, {"a": {"epochs": 1.5}}, "phases.p.sources.a: the phases up to this one take"),
        (None, {"a": 1.0, "b": {"epochs": 1}}, "phase p: tokens is missing, and source a has a weight (1)"),
        (None, {"aa": {"epochs": 1}}, "phases.p.sources.aa: no such source in data.folder: did you mean a?"),
        (None, {"a": {"tokens": 17}}, "phase p: tokens (16) must hold at least one step of 64 tokens"),
        (640, {"a": {"tokens": 17, "epochs": 1}}, "a source is taken by weight, tokens or epochs"),
    ],
)
def test_amounts_that_do_not_fit_are_refused(tokens, mix, message):
    with pytest.raises(UserError) as error:
        quotas(run_config([phase("p", tokens, sources=mix)]), sources(a=1001, b=1001))
    assert message in str(error.value)


def ramped(**ramp):
    return phase("p", 16 * 200, sources={"a": 1.0}, batch=8, batch_ramp=dict(start=2, increment=2, tokens=16 * 60) | ramp)


def test_the_batch_grows_in_equal_stretches_of_whole_steps():
    """60 samples in three stretches of 20 (batches of 2, 4 and 6), each up to a whole step; then 8 at a time."""
    (ramp,) = run_config([ramped()]).phases
    assert ramp.stretches == [(2, 10), (4, 5), (6, 4), (8, 17)]
    sizes = [ramp.batch_size(step) for step in range(ramp.num_steps)]
    assert sizes == [2] * 10 + [4] * 5 + [6] * 4 + [8] * 17
    assert [ramp.num_samples(step) for step in range(ramp.num_steps + 1)] == [sum(sizes[:step]) for step in range(len(sizes) + 1)]
    assert phases.consumed_tokens([ramp], 16) == 16 * 46 and phases.consumed_tokens([ramp, ramp], 37) == 16 * (200 + 2)


@pytest.mark.parametrize(
    "ramp, message",
    [
        (dict(start=8), "phase p: batch_ramp must reach global_batch_size (8) from start (8) in whole increments (2)"),
        (dict(increment=4), "phase p: batch_ramp must reach global_batch_size (8) from start (2) in whole increments (4)"),
        (dict(tokens=16 * 196), "phase p: tokens (3,200) must hold at least one step of 128 tokens behind the batch_ramp (3,136 tokens"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(ramp, message):
    with pytest.raises(UserError) as error:
        run_config([ramped(**ramp)])
    assert message in str(error.value)


def test_every_batch_of_a_ramp_is_laid_out_over_the_processes():
    config = run_config([ramped()])
    layouts.check(config, 2)
    with pytest.raises(UserError, match=r"the data-parallel size \(4\) must divide phases.p.batch_ramp.start \(2\)"):
        layouts.check(config, 4)


def rates(steps, **rate):
    config = run_config([phase("p", 64 * steps, sources={"a": 1.0}) | dict(learning_rate=dict(start=1.0, end=0.1) | rate)])
    return [phases.learning_rate(config.phases, step) for step in range(steps)]


def test_the_decay_takes_the_last_steps():
    """Warm-up, stable, decay: the last `decay_steps` lie below the start, the last one at the end."""
    for shape, half in (("linear", 0.55), ("cosine", 0.55), ("1-sqrt", 0.1 + 0.9 * (1 - math.sqrt(0.5))), ("exponential", math.sqrt(0.1))):
        curve = rates(20, shape=shape, warmup_steps=4, decay_steps=6)
        assert curve[:4] == [0.25, 0.5, 0.75, 1.0] and curve[4:14] == [1.0] * 10
        assert curve[13:] == sorted(curve[13:], reverse=True) and curve[14] < 1
        assert curve[16] == pytest.approx(half) and curve[19] == pytest.approx(0.1)
        whole = rates(9, shape=shape)
        assert (whole[0], whole[4], whole[8]) == pytest.approx((1.0, half, 0.1))
        for steps, warmup, decay in ((1, 0, None), (20, 19, None), (20, 0, 1), (20, 19, 1), (20, 14, 6), (20, 0, 20)):
            curve = rates(steps, shape=shape, warmup_steps=warmup, decay_steps=decay)
            assert curve[-1] == pytest.approx(0.1) and (decay is None or max(curve[-decay:]) < 1), (steps, warmup, decay)
    with pytest.raises(UserError, match=r"warmup_steps \(15\) and decay_steps \(6\) must fit into the phase's 20 steps"):
        rates(20, warmup_steps=15, decay_steps=6)


def test_the_past_may_not_change_and_the_future_may():
    """A budget that follows from amounts, a ramp, and the held-out tokens belong to the past as soon as a phase has begun."""
    there = sources(a=5000, b=5000)

    def config(first=None, last=None, validation=100):
        first = dict(sources={"a": {"epochs": 0.5}}, batch=8, batch_ramp=dict(start=2, increment=2, tokens=16 * 60)) | (first or {})
        found = run_config([phase("first", None, **first), phase("last", None, sources=last or {"b": {"epochs": 0.5}})])
        return phases.resolve(found.model_copy(update={"data": found.data.model_copy(update={"validation_tokens": validation})}), there)

    before = config()
    end = before.phases[0].num_steps
    longer = config(last={"a": {"epochs": 0.25}, "b": {"epochs": 0.75}})
    phases.check_resumable(before, longer, end)
    one, other = (DataOrder(c, there) for c in (before, longer))
    assert all(
        one.samples(n, range(before.phases[0].batch_size(n))) == other.samples(n, range(before.phases[0].batch_size(n))) for n in range(end)
    )
    assert one.ledger(end).phases[0] == other.ledger(end).phases[0]
    for changed in (dict(sources={"a": {"epochs": 0.6}}), dict(batch_ramp=dict(start=4, increment=2, tokens=16 * 60))):
        with pytest.raises(UserError, match="phase first has begun and may not change any more"):
            phases.check_resumable(before, config(first=changed), 1)
    with pytest.raises(UserError, match="phase last has begun"):
        phases.check_resumable(before, longer, end + 1)
    trained_otherwise = before.model_copy(update={"moe": MoEConfig(**MOE | dict(load_balancing_loss=0.5, dispatcher="allgather"))})
    before = before.model_copy(update={"moe": MoEConfig(**MOE)})
    phases.check_resumable(before, trained_otherwise, 1)
    for field, moe in (("moe.top_k was 2", MOE | dict(top_k=3)), ("moe.scores was topk_softmax", MOE | dict(scores="sigmoid"))):
        with pytest.raises(UserError, match=f"{field} when this run began"):
            phases.check_resumable(before, before.model_copy(update={"moe": MoEConfig(**moe)}), 1)
    with pytest.raises(UserError, match="data.validation_tokens was 100 when this run began, and is 200 now"):
        phases.check_resumable(before, config(validation=200), 1)


def test_plan_shows_sources_epochs_steps_and_the_end(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    settings = tiny(prepared, tmp_path, data=dict(validation_tokens=100)).model_dump(mode="json", exclude_none=True)
    settings["phases"][0] |= dict(batch_ramp=dict(start=4, increment=4, tokens=256))
    settings["phases"][1] |= dict(sources={"chat": {"epochs": 0.25}, "code": {"tokens": 640}}, admit={})
    del settings["phases"][1]["tokens"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    plan.main(path, tokens_per_day=1e3)
    shown = capsys.readouterr().out
    for text in (
        "4 + 4 … 8 in 256 tokens (2 steps)",
        "0.25 epochs",
        "640 tokens",
        "weight 0.5",
        "128 tokens of each are held out",
        "1,000 tokens a day",
    ):
        assert text in shown, text
    settings["data"]["folder"] = str(tmp_path / "missing")
    path.write_text(yaml.safe_dump(settings))
    plan.main(path, tokens_per_day=1e3)
    shown = " ".join(capsys.readouterr().out.split())  # a long path makes a line break somewhere
    assert "is not there yet: the sources were not checked" in shown and "as its sources have" in shown and "all that is known" in shown


def test_plan_adds_up_the_days():
    config = from_dict(run_config([phase("p", 64 * 30, sources={"a": 1.0}), phase("q", 64 * 10, sources={"a": 1.0})]).model_dump(), "test")
    console = Console(width=100)
    with console.capture() as shown:
        console.print(plan._calendar(config, 64 * 20, datetime(2026, 1, 30, 12)))
    assert "1.50" in shown.get() and "2026-02-01 00:00" in shown.get() and "0.50" in shown.get() and "2026-02-01 12:00" in shown.get()
