"""What a step measures, against computations by hand, and the same at every layout."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_jobs.checkpoints import checkpoint
from megatron_jobs.checkpoints.weights import InitialWeights
from megatron_jobs.config import RunConfig
from mujina.matrices import Box
from tests.conftest import MOE, read, tiny
from tests.megatron_jobs.engine.test_parallel import name
from tests.megatron_jobs.test_train import plain_loop, train_here
from tests.ranks import run_ranks

Z_LOSS = 0.1

DENSE = [(1, dict(), None), (2, dict(), None), (2, dict(tensor=2), None), (2, dict(pipeline=2), None)]
DENSE += [(2, dict(context=2), None), (2, dict(pipeline=2, virtual_pipeline=2), None)]
MIXTURE = [(2, dict(expert=2), MOE), (2, dict(tensor=2), MOE), (2, dict(pipeline=2), MOE)]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def one_phase(steps: int, **more: Any) -> list[dict[str, Any]]:
    rate = dict(start=1e-2, end=1e-2, shape="constant")
    mix = {"web": 0.5, "code": 0.3, "chat": 0.2}
    return [dict(name="web", tokens=steps * 8 * 32, sequence_length=32, global_batch_size=8, sources=mix, learning_rate=rate) | more]


@pytest.fixture(scope="module")
def by_hand(prepared, tmp_path_factory):
    """Five steps with z-loss in a plain loop over a Llama of transformers."""
    run = tmp_path_factory.mktemp("plain")
    return run_ranks(1, plain_loop, tiny(prepared, run, phases=one_phase(5, loss=dict(z_loss=Z_LOSS))))[0]


@pytest.mark.parametrize("case", [*DENSE, (4, dict(tensor=2, pipeline=2), None)], ids=name)
def test_losses_by_source_and_z_loss_are_those_computed_by_hand(prepared, tmp_path, by_hand, case):
    world, parallel, _ = case
    run_ranks(world, train_here, tiny(prepared, tmp_path, parallel=parallel, phases=one_phase(5, loss=dict(z_loss=Z_LOSS))))
    got = records(tmp_path)
    assert len(got) == len(by_hand) == 5
    assert {len(step["loss_by_source"]) for step in by_hand} >= {3}
    for step, expected in zip(got, by_hand, strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert step["z_loss"] == pytest.approx(expected["z_loss"], rel=1e-4)
        assert step["loss_by_source"] == pytest.approx(expected["loss_by_source"], rel=1e-4)
        tokens = step["tokens_by_source"]
        assert sum(tokens.values()) == 8 * 32
        assert sum(loss * tokens[source] for source, loss in step["loss_by_source"].items()) == pytest.approx(step["loss"] * 8 * 32)


def test_z_loss_holds_log_z_down(prepared, tmp_path, by_hand):
    """The comparison by hand would see nothing if the coefficient did too little."""
    run_ranks(1, train_here, tiny(prepared, tmp_path, phases=one_phase(5)))
    assert records(tmp_path)[-1]["z_loss"] > 1.02 * by_hand[-1]["z_loss"]


@pytest.mark.parametrize("case", [DENSE[0], DENSE[2]], ids=name)
def test_cross_entropy_and_log_z_of_padded_bf16_logits(case):
    """Value and gradient against torch in float32 from the same rounded logits, with rows that pad the vocabulary.

    In three parts and the rest of one, as large logits are."""
    world, parallel, _ = case
    run_ranks(world, _compare_cross_entropy, parallel)


def _compare_cross_entropy(sizes: dict[str, int]) -> None:
    import torch

    from megatron_jobs.config import ParallelConfig
    from megatron_jobs.engine import cross_entropy, groups
    from megatron_jobs.engine.cross_entropy import cross_entropy_and_log_z

    with groups.of_run(ParallelConfig(**sizes), 1):
        group = groups.parallel_state.get_tensor_model_parallel_group()
        draw = torch.Generator().manual_seed(1)
        whole = (20 * torch.randn(7, 2, 12, generator=draw)).bfloat16()
        whole[..., 5:] = -torch.inf  # two ranks: the second has padding only
        labels = torch.randint(0, 5, (7, 2), generator=draw)
        weights = torch.randn(2, 7, 2, generator=draw)

        width = 12 // group.size()
        cross_entropy.SOFTMAX_AT_ONCE = {"cpu": 2 * 2 * width}
        mine = slice(group.rank() * width, (group.rank() + 1) * width)
        part = whole[..., mine].clone().requires_grad_()
        got = cross_entropy_and_log_z(part, labels, group)
        (got * weights).sum().backward()

        logits = whole[..., :5].float().requires_grad_()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(7, 2)
        expected = torch.stack([losses, logits.logsumexp(-1)])
        (expected * weights).sum().backward()
        gradient = torch.nn.functional.pad(logits.grad, (0, 7))[..., mine]
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part.grad, gradient.bfloat16(), rtol=1e-2, atol=1e-6)


def train_without_validation(config: RunConfig) -> None:
    from megatron_jobs.engine.passes import Passes

    Passes.measure = lambda *_: SimpleNamespace(by_source={})
    train_here(config)


def validating(prepared: Path, run: Path, **sections: Any) -> RunConfig:
    """Validates after steps 4 and 8, and at the ends of the phases, 6 and 10.

    Three blocks of each source make 18 samples of length 32 and 9 of length 64: they do not fill the micro-batches of two ranks.
    """
    train = dict(validation_interval=4) | sections.pop("train", {})
    return tiny(prepared, run, data=dict(validation_tokens=3 * 64), train=train, **sections)


@pytest.fixture(scope="module")
def validated(prepared, tmp_path_factory):
    """One process with micro-batches of one: nothing is padded."""
    run = tmp_path_factory.mktemp("validated")
    run_ranks(1, train_here, validating(prepared, run, train=dict(micro_batch_size=1)))
    return {step["step"]: step["validation"] for step in records(run) if "validation" in step}


@pytest.mark.parametrize("case", DENSE, ids=name)
def test_validation_is_the_same_at_every_layout(prepared, tmp_path, validated, case):
    world, parallel, _ = case
    run_ranks(world, train_here, validating(prepared, tmp_path, parallel=parallel))
    got = {step["step"]: step["validation"] for step in records(tmp_path) if "validation" in step}
    assert list(got) == [4, 6, 8, 10]
    for step, losses in validated.items():
        assert set(losses) == {"web", "code", "chat"} and len(set(losses.values())) == 3
        assert got[step] == pytest.approx(losses, rel=1e-5)


def test_validation_losses_are_those_of_the_held_out_samples(prepared, tmp_path):
    """At a learning rate of almost 0 they are the losses of the initial weights."""
    still = dict(start=1e-30, end=1e-30, shape="constant")
    config = validating(prepared, tmp_path, phases=one_phase(1, learning_rate=still))
    run_ranks(2, train_here, config)
    assert records(tmp_path)[0]["validation"] == pytest.approx(run_ranks(1, _held_out_losses, config)[0], rel=1e-5)


def _held_out_losses(config: RunConfig) -> dict[str, float]:
    import torch

    from megatron_jobs.conversion import agreement
    from megatron_jobs.data import feeder
    from megatron_jobs.data.order import DataOrder
    from megatron_jobs.engine import groups

    binaries = feeder.open_sources(config)
    order = DataOrder(config, feeder.facts(binaries))
    losses = {}
    with groups.alone():
        for source in order.names:
            where = [(source, int(offset)) for offset in order.held_out(source, 32)]
            assert len(where) == 6
            tokens = read(binaries, where, 32)
            logits = agreement.megatron_logits(config.model, None, InitialWeights(config.model, None, config.seed), tokens[:, :-1])
            losses[source] = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    return losses


@pytest.mark.parametrize("case", [(2, dict(), None), MIXTURE[0]], ids=name)
def test_validation_does_not_disturb_training(prepared, tmp_path, case):
    """To the last bit, the counts of the experts and the routers' losses included."""
    world, parallel, moe = case
    for run, function in (("with", train_here), ("without", train_without_validation)):
        run_ranks(world, function, validating(prepared, tmp_path / run, parallel=parallel, moe=moe))
    same = {"loss", "loss_by_source", "z_loss", "grad_norm"} | ({"expert_load", "load_balancing_loss", "router_z_loss"} if moe else set())
    one, other = ([{key: step[key] for key in same} for step in records(tmp_path / run)] for run in ("with", "without"))
    assert len(one) == 10 and one == other


@pytest.mark.parametrize("case", [*DENSE, *MIXTURE, (2, dict(pipeline=2), "tied")], ids=name)
def test_layer_norms_are_those_of_the_weights_and_of_the_first_moments(prepared, tmp_path, case):
    """After one step AdamW's first moment is (1 − beta1) times the clipped gradient."""
    world, parallel, moe = case
    tied, moe = (dict(tie_embeddings=True), None) if moe == "tied" else ({}, moe)
    config = tiny(prepared, tmp_path, model=tied, moe=moe, parallel=parallel, train=dict(layer_norms_interval=1), phases=one_phase(1))
    run_ranks(world, train_here, config)
    record = records(tmp_path)[0]
    norm = record["grad_norm"]
    clipped = (1 - config.optimizer.beta1) * min(1.0, config.optimizer.clip_grad / (norm + 1e-6))
    saved, initial = checkpoint.Checkpoint(tmp_path / "checkpoints/latest"), InitialWeights(config.model, config.moe, config.seed)
    squares: dict[str, list[float]] = {}
    for matrix, (rows, columns) in saved.shapes.items():
        box = Box(0, rows, 0, columns)
        layer = ".".join(matrix.split(".")[:2]) if matrix.startswith("layers.") else matrix
        total = squares.setdefault(layer, [0.0, 0.0])
        total[0] += float((saved.read(matrix, box, "exp_avg") / clipped).double().square().sum())
        total[1] += float(initial.read(matrix, box).double().square().sum())
    got = record["layer_norms"]
    assert list(got) == list(squares)
    for layer, (gradient, weight) in squares.items():
        assert got[layer] == pytest.approx({"gradient": gradient**0.5, "weight": weight**0.5}, rel=1e-4), layer
    assert sum(layer["gradient"] ** 2 for layer in got.values()) == pytest.approx(norm**2, rel=1e-5)


@pytest.fixture(scope="module")
def routed(prepared, tmp_path_factory):
    """The first step of a mixture in one process, and the routers' losses in it computed by hand."""
    run = tmp_path_factory.mktemp("routed")
    by_hand = run_ranks(1, _router_losses, tiny(prepared, run, moe=MOE, phases=one_phase(1)))[0]
    return records(run)[0], by_hand


def _router_losses(config: RunConfig) -> dict[str, float]:
    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    balances, squares = [], []
    original = TopKRouter.forward

    def forward(router: TopKRouter, hidden: torch.Tensor, *rest: Any) -> Any:
        if torch.is_grad_enabled():
            logits = hidden.detach().flatten(0, 1).float() @ router.weight.detach().float().T
            chosen = torch.zeros_like(logits).scatter(1, logits.topk(MOE["top_k"]).indices, 1.0)
            balances.append(float(MOE["num_experts"] * (chosen.mean(0) / MOE["top_k"] * logits.softmax(1).mean(0)).sum()))
            squares.append(float(logits.logsumexp(1).square().mean()))
        return original(router, hidden, *rest)

    TopKRouter.forward = forward
    train_here(config)
    assert len(balances) == 4 * 4  # layers × micro-batches
    return {"load_balancing_loss": sum(balances) / len(balances), "router_z_loss": sum(squares) / len(squares)}


@pytest.mark.parametrize("case", [(1, dict(), MOE), (2, dict(), MOE), *MIXTURE, (4, dict(tensor=2, expert=2), MOE)], ids=name)
def test_the_losses_of_the_routers_are_those_computed_by_hand(prepared, tmp_path, routed, case):
    world, parallel, moe = case
    run_ranks(world, train_here, tiny(prepared, tmp_path, moe=moe, parallel=parallel, phases=one_phase(1)))
    got = records(tmp_path)[0]
    assert {key: got[key] for key in routed[1]} == pytest.approx(routed[1], rel=1e-4)
    assert sum(map(sum, got["expert_load"])) == pytest.approx(4)


def test_a_mixture_without_router_losses_reports_none(prepared, tmp_path):
    moe = MOE | {"load_balancing_loss": 0, "router_z_loss": 0}
    run_ranks(1, train_here, tiny(prepared, tmp_path, moe=moe, phases=one_phase(1)))
    assert "expert_load" in records(tmp_path)[0] and not {"load_balancing_loss", "router_z_loss"} & set(records(tmp_path)[0])


@pytest.mark.parametrize("case", [(1, dict(), None), (2, dict(pipeline=2), None)], ids=name)
def test_fp8_shadow_compares_the_same_micro_batches(prepared, tmp_path, case):
    """fp8 stood for by weights rounded to float8: the shadow sees both losses, and leaves weights and gradients as they were."""
    world, parallel, _ = case
    for rank in run_ranks(world, _shadow, tiny(prepared, tmp_path, parallel=parallel)):
        shadow, rounded, exact = rank
        assert shadow["loss_fp8"] == rounded != exact == shadow["loss_bf16"]
        assert shadow["difference"] == pytest.approx(abs(rounded - exact) / exact)


def _shadow(config: RunConfig) -> tuple[dict[str, float], float, float]:
    import torch

    from megatron_jobs.data import feeder
    from megatron_jobs.data.order import DataOrder
    from megatron_jobs.engine import groups
    from megatron_jobs.engine import passes as module
    from megatron_jobs.engine.passes import Passes
    from megatron_jobs.engine.state import TrainingState

    with groups.of_run(config.parallel, config.seed):
        binaries = feeder.open_sources(config)
        order = DataOrder(config, feeder.facts(binaries))
        state = TrainingState(config)
        state.start_from(InitialWeights(config.model, None, config.seed))
        passes = Passes(config, state, order.names)
        batches = feeder.Feeder(config, order, binaries, 0, 1).read(0)[:2]
        passes.gradients(config.phases[0], batches)
        first = batches[: config.parallel.pipeline]
        parameters = [local.parameter for local in state.parameters]
        gradients = [parameter.main_grad.clone() for parameter in parameters]

        @contextlib.contextmanager
        def weights(values: list[torch.Tensor]) -> Any:
            before = [parameter.detach().clone() for parameter in parameters]
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data.copy_(value)
            yield
            for parameter, value in zip(parameters, before, strict=True):
                parameter.data.copy_(value)

        exact = [parameter.detach().clone() for parameter in parameters]
        exact_loss = passes.measure(config.phases[0], first, len(first)).loss
        module.without_fp8 = lambda gpt: weights(exact)
        with weights([value.to(torch.float8_e4m3fn).to(value.dtype) for value in exact]):
            rounded_loss = passes.measure(config.phases[0], first, len(first)).loss
            shadow = passes.fp8_shadow(config.phases[0], batches)
        assert all(parameter.main_grad.equal(gradient) for parameter, gradient in zip(parameters, gradients, strict=True))
        assert all(parameter.equal(value) for parameter, value in zip(parameters, exact, strict=True))
    return shadow, rounded_loss, exact_loss


def test_fp8_is_warned_of_beyond_one_percent():
    from megatron_jobs.engine.passes import fp8_warning

    assert fp8_warning({"loss_bf16": 2.0, "loss_fp8": 2.019, "difference": 0.0095}) is None
    assert "2.0000 in bf16, 2.5% apart" in fp8_warning({"loss_bf16": 2.0, "loss_fp8": 2.05, "difference": 0.025})
    assert fp8_warning({"loss_bf16": 2.0, "loss_fp8": float("nan"), "difference": float("nan")})
