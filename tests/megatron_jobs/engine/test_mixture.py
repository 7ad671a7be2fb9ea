"""Mixtures by their router options: each follows one process at other layouts, goes on to the last bit, and tells what it does."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.config import RunConfig
from megatron_jobs.planning import layouts
from moe import statistics
from moe.statistics import Alarms
from mujina.matrices import Box
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.engine.test_passes import one_phase, records
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks

# Large coefficients and rates: what they do must show within four steps.
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax_topk": dict(scores="softmax_topk", router_init_std=1.0),
    "sigmoid_bias": dict(scores="sigmoid", balancing="bias", bias_update_rate=0.01),
    "global": dict(balancing="global_aux_loss", load_balancing_loss=0.5),
    "capacity": dict(capacity_factor=0.8),
    "normalized_allgather": dict(normalize_logits=True, dispatcher="allgather", balancing="none"),
    "every_other_layer": dict(every=2, ffn_hidden_size=32, shared_ffn_hidden_size=32),
}
REMEMBERS = ("sigmoid_bias", "global")


def mixture(prepared: Path, run: Path, router: str, **sections: Any) -> RunConfig:
    return tiny(prepared, run, moe=MOE | ROUTERS[router], phases=one_phase(4), train=dict(checkpoint_interval=3), **sections)


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """The folder of a run with a router at a layout, trained when it is first asked for."""
    folders = {}

    def run(router: str, world: int = 1, **parallel: int) -> Path:
        key = (router, world, *parallel.items())
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(router)
            run_ranks(world, train_here, mixture(prepared, folders[key], router, parallel=parallel))
        return folders[key]

    return run


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("parallel", [dict(expert=2), dict(tensor=2)], ids=["expert", "tensor"])
def test_every_router_follows_one_process(trained, router, parallel):
    alone, run = records(trained(router)), records(trained(router, 2, **parallel))
    assert len(alone) == len(run) == 4 and alone[-1]["loss"] < alone[0]["loss"]
    for field in {"loss", "grad_norm", "dropped", "load_balancing_loss", "router_entropy", "expert_similarity"} & set(alone[-1]):
        for got, expected in zip(run, alone, strict=True):
            assert got.get(field, 0) == pytest.approx(expected.get(field, 0), rel=1e-4, abs=1e-5), (field, got["step"])


@pytest.mark.parametrize("router", REMEMBERS)
def test_what_a_router_remembers_is_kept_to_the_last_bit(prepared, tmp_path, trained, router):
    config = mixture(prepared, tmp_path, router, parallel=dict(expert=2))
    for last_step in (3, None):
        run_ranks(2, train_here, config, last_step)
    whole = trained(router, 2, expert=2)
    assert losses(tmp_path) == losses(whole)
    one, other = ([remembered(run, router, layer) for layer in range(4)] for run in (tmp_path, whole))
    assert one == other and any(len(set(of_layer)) > 1 for of_layer in one)


@pytest.mark.parametrize("router", REMEMBERS)
def test_what_a_router_remembers_goes_to_another_layout(prepared, tmp_path, trained, router):
    run_ranks(2, train_here, mixture(prepared, tmp_path, router, parallel=dict(expert=2)), 3)
    run_ranks(2, train_here, mixture(prepared, tmp_path, router, parallel=dict(pipeline=2)))
    assert losses(tmp_path) == pytest.approx(losses(trained(router)), rel=1e-4)
    for layer in range(4):
        assert remembered(tmp_path, router, layer) == pytest.approx(remembered(trained(router), router, layer))


def remembered(run: Path, router: str, layer: int) -> list[float]:
    saved = Checkpoint(run / "checkpoints/latest")
    if router == "global":
        return saved.ledger.expert_load[layer]
    for moment in ("exp_avg", "exp_avg_sq"):  # there, so that what reads checkpoints needs to know of no exception
        assert not saved.read(f"layers.{layer}.router_bias", Box(0, 4, 0, 1), moment).any()
    return saved.read(f"layers.{layer}.router_bias", Box(0, 4, 0, 1)).flatten().tolist()


def test_the_bias_moves_once_a_step_and_against_the_load(trained):
    """DeepSeek-V3: up by the rate where an expert got less than the mean, down where it got more."""
    steps = records(trained("sigmoid_bias"))
    for layer in range(4):
        moves = [[(load < 0.25) - (load > 0.25) for load in step["expert_load"][layer]] for step in steps]
        expected = [0.01 * sum(of_expert) for of_expert in zip(*moves, strict=True)]
        assert remembered(trained("sigmoid_bias"), "sigmoid_bias", layer) == pytest.approx(expected, abs=1e-6)


def test_the_remembered_load_is_that_of_the_last_step(trained):
    load = records(trained("global"))[-1]["expert_load"]
    for layer in range(4):
        assert remembered(trained("global"), "global", layer) == pytest.approx(load[layer], abs=1e-6)


def test_the_similarity_of_experts_is_the_mean_over_all_pairs(trained):
    """Against the cosines of all pairs in the checkpoint before the last step, whose weights the last step computes with."""
    import torch

    run = trained("capacity", 2, expert=2)
    similarities = {step["step"]: step["expert_similarity"] for step in records(run) if "expert_similarity" in step}
    assert list(similarities) == [4]  # the end of the phase
    saved = Checkpoint(run / "checkpoints/step-00000003")
    for layer in range(4):
        names = [[f"layers.{layer}.experts.{expert}.{matrix}" for matrix in ("gate", "up", "down")] for expert in range(4)]
        experts = [torch.cat([whole(saved, name).flatten() for name in of]) for of in names]
        cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(experts, 2)]
        assert similarities[4][layer] == pytest.approx(sum(cosines) / 6, abs=1e-6)


def test_alarms_are_told_once_also_across_a_restart(prepared, tmp_path):
    config = mixture(prepared, tmp_path, "every_other_layer")
    for last_step in (3, None):
        run_ranks(1, train_with_touchy_alarms, config, last_step)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    alarms, expected = Alarms([0, 2], MOE["top_k"], window=2), []
    statistics.DEAD, kept = 0.9, statistics.DEAD
    for step in records(tmp_path):
        expected += [(step["step"], news) for news in alarms.look(step["expert_load"])]
    statistics.DEAD = kept
    assert [(event["step"], event["reason"]) for event in events if event["what"] == "experts"] == expected
    assert {step for step, _ in expected} > {2} and any("layer 2" in news for _, news in expected)


def train_with_touchy_alarms(config: RunConfig, last_step: int | None) -> None:
    statistics.WINDOW, statistics.DEAD = 2, 0.9
    train_here(config, last_step)


def whole(saved: Checkpoint, name: str) -> Any:
    rows, columns = saved.shapes[name]
    return saved.read(name, Box(0, rows, 0, columns))


@pytest.mark.parametrize(
    "moe, message",
    [
        (dict(balancing="bias"), r"balancing \(bias\) needs sigmoid scores, not topk_softmax: write scores: sigmoid"),
        (dict(normalize_logits=True, num_experts=2), r"normalize_logits \(true\) needs num_experts \(2\) of 3 or more"),
    ],
)
def test_options_that_contradict_each_other_are_refused(prepared, tmp_path, moe, message):
    with pytest.raises(UserError, match=message):
        tiny(prepared, tmp_path, moe=MOE | moe)


def test_a_dispatcher_that_cannot_pad_is_refused_with_fp8(prepared, tmp_path):
    config = tiny(prepared, tmp_path, moe=MOE | dict(dispatcher="allgather"), train=dict(precision="fp8"))
    with pytest.raises(UserError, match=r"moe.dispatcher \(allgather\) cannot pad for train.precision \(fp8\)"):
        layouts.check(config, 1)
