"""The routing of each option against a few lines of torch on the same logits."""

import itertools
import math
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

E, K, HIDDEN = 5, 2, 8
BALANCE, Z_LOSS = 0.3, 0.01

CASES: dict[str, dict[str, Any]] = {
    "topk_softmax": dict(),
    "softmax_topk": dict(scores="softmax_topk"),
    "sigmoid": dict(scores="sigmoid"),
    "bias": dict(scores="sigmoid", balancing="bias"),
    "global": dict(balancing="global_aux_loss"),
    "none": dict(balancing="none"),
    "normalized": dict(normalize_logits=True),
    "capacity": dict(capacity_factor=0.7),
    "capacity-sigmoid-bias": dict(scores="sigmoid", balancing="bias", capacity_factor=0.7),
}
MEMORY = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])  # of the router: its bias, or the load of the step before


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into the router [tokens, 1, hidden], and its weights."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(40, 1, HIDDEN, generator=draw), torch.randn(E, HIDDEN, generator=draw)


@pytest.fixture(scope="module")
def routed() -> dict[str, Any]:
    return run_ranks(1, _route)[0]


def _route() -> dict[str, Any]:
    """What the routers of models make of the draw: weights, kept, tally, gradient of the losses."""
    from megatron_jobs.config import ParallelConfig
    from megatron_jobs.config.model import ModelConfig, MoEConfig
    from megatron_jobs.engine import groups
    from megatron_jobs.engine.gpt import build

    shape = ModelConfig(num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=2, vocab_size=9)
    results = {}
    with groups.alone():
        for case, options in CASES.items():
            moe = MoEConfig(num_experts=E, top_k=K, **options)
            gpt = build(shape, moe, ParallelConfig(), torch.float32, 16)
            router = gpt.decoder.layers[0].mlp.router
            router.minimise(BALANCE if moe.has_load_balancing_loss else 0.0, Z_LOSS)
            hidden, weight = drawn()
            router.weight.data.copy_(weight)
            for buffer in (router.expert_bias, router.load_E):
                if buffer is not None:
                    buffer.copy_(MEMORY)
            weights, kept = router(hidden)
            (0 * weights.sum()).backward()  # megatron-core hangs the losses onto the weights
            with torch.no_grad():
                router(hidden)  # a validation is not counted
            results[case] = [value.tolist() for value in (weights, kept, router.tally_3E, router.weight.grad)]
    return results


@pytest.mark.parametrize("case", CASES)
def test_a_router_does_what_torch_does(routed, case):
    options = dict(scores="topk_softmax", balancing="aux_loss", normalize_logits=False, capacity_factor=None) | CASES[case]
    hidden, weight = drawn()
    weight.requires_grad_()
    logits = hidden[:, 0] @ weight.T
    if options["normalize_logits"]:
        logits = (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-5)
    scores = logits.sigmoid() if options["scores"] == "sigmoid" else logits.softmax(1)
    bias = MEMORY if options["balancing"] == "bias" else 0.0
    chosen = torch.zeros_like(logits).scatter(1, (scores + bias).topk(K).indices, 1.0)
    weights = scores * chosen
    if options["scores"] != "softmax_topk":  # what the chosen have adds up to one
        weights = weights / weights.sum(1, keepdim=True)
    kept = chosen
    if options["capacity_factor"]:
        capacity = 12  # 0.7 × 40 tokens × 2 ÷ 5 experts, rounded up
        order = weights.argsort(dim=0, descending=True).argsort(dim=0)
        kept = chosen * (order < capacity)
        assert kept.sum() < chosen.sum() and kept.sum(0).max() == capacity
    shares = scores / scores.sum(1, keepdim=True)
    wanted = torch.zeros_like(logits).scatter(1, scores.topk(K).indices, 1.0).mean(0) / K  # without the bias
    f = MEMORY if options["balancing"] == "global_aux_loss" else wanted
    loss = Z_LOSS * logits.logsumexp(1).square().mean()
    if options["balancing"] in ("aux_loss", "global_aux_loss"):
        loss = loss + BALANCE * E * (f * shares.mean(0)).sum()
    loss.backward()

    got_weights, got_kept, tally, gradient = routed[case]
    close = dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(got_weights), (weights * kept).detach(), **close)
    assert torch.tensor(got_kept).equal(kept.bool())
    torch.testing.assert_close(torch.tensor(tally), torch.stack([chosen.sum(0), kept.sum(0), shares.sum(0)]).detach(), **close)
    torch.testing.assert_close(torch.tensor(gradient), weight.grad, **close)


def test_normalized_logits_that_are_all_equal_have_a_gradient():
    """Those of a token of zeros: they have no deviation to be divided by."""
    gradient = run_ranks(1, _gradient_of_equal_logits)[0]
    assert torch.tensor(gradient).isfinite().all() and any(map(any, gradient))


def _gradient_of_equal_logits() -> list[list[float]]:
    from megatron_jobs.config import ParallelConfig
    from megatron_jobs.config.model import ModelConfig, MoEConfig
    from megatron_jobs.engine import groups
    from megatron_jobs.engine.gpt import build

    shape = ModelConfig(num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=2, vocab_size=9)
    with groups.alone():
        moe = MoEConfig(num_experts=E, top_k=K, normalize_logits=True)
        router = build(shape, moe, ParallelConfig(), torch.float32, 16).decoder.layers[0].mlp.router
        hidden, weight = drawn()
        hidden[0] = 0
        router.weight.data.copy_(weight)
        weights, _ = router(hidden)
        weights.square().sum().backward()
        return router.weight.grad.tolist()


@pytest.mark.parametrize("parallel", [{}, dict(context=2), dict(tensor=2), dict(context=2, tensor=2)], ids=str)
def test_of_equal_tokens_the_first_have_room(parallel):
    """By their place in the sequence, whatever rank holds them: a token of each sequence is the best, all others are equal."""
    kept = [0, 1, 2, 3, 4, 7]
    world = math.prod(parallel.values())
    for sequence, of_ranks in enumerate(zip(*run_ranks(world, _kept_of_equal_tokens, parallel), strict=True)):
        assert sorted(itertools.chain(*of_ranks)) == (kept if sequence == 0 else [7])


def _kept_of_equal_tokens(parallel: dict[str, int]) -> list[list[int]]:
    """The places, in each sequence, of the tokens that an expert keeps on this rank."""
    from megatron.core import parallel_state

    from megatron_jobs.config import ParallelConfig
    from megatron_jobs.config.model import ModelConfig, MoEConfig
    from megatron_jobs.engine import groups
    from megatron_jobs.engine.attention import this_part
    from megatron_jobs.engine.gpt import build

    shape = ModelConfig(num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=2, vocab_size=16)
    layout = ParallelConfig(**parallel)
    with groups.of_run(layout, 1):
        # 7 of the 16 tokens of two sequences have room in the one expert that all want most
        router = (
            build(shape, MoEConfig(num_experts=4, top_k=2, capacity_factor=0.875), layout, torch.float32, 8).decoder.layers[0].mlp.router
        )
        router.weight.data.copy_(torch.tensor([[4.0], [2.0], [0.0], [0.0]]).expand(4, HIDDEN) / HIDDEN)
        hidden = torch.ones(2, 8, HIDDEN)
        hidden[:, 7] = 2.0
        places = this_part(torch.arange(8).expand(2, 8)).chunk(layout.tensor, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
        with torch.no_grad():
            _, kept = router(hidden[0, places[0]][:, None].expand(-1, 2, -1).contiguous())
        return [places[0][kept.view(-1, 2, 4)[:, sequence, 0]].tolist() for sequence in range(2)]
