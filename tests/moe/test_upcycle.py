"""The operators on one layer, against a mixture written out in a few lines of torch."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F

from megatron_jobs.checkpoints.weights import InitialWeights, drawn, shapes
from megatron_jobs.config.model import ModelConfig, MoEConfig
from moe.upcycle import Upcycled, _mean_and_std
from mujina.matrices import Box

MODEL = ModelConfig(
    num_layers=2, hidden_size=24, ffn_hidden_size=96, num_attention_heads=2, num_query_groups=1, vocab_size=10, init_std=0.3
)
DENSE = InitialWeights(MODEL, None, seed=7)
TOKENS = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
WHOLE = Box(0, 96, 0, 24)


@pytest.fixture(autouse=True)
def one_thread():
    """Such small products are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def upcycled(seed: int = 3, **moe) -> Upcycled:
    settings = MoEConfig.model_validate(dict(num_experts=8, top_k=2) | moe)
    return Upcycled(DENSE, InitialWeights(MODEL, settings, seed), MODEL, settings, functools.partial(drawn, seed, std=1.0))


def matrices(source: Upcycled, layer: int = 0) -> dict[str, torch.Tensor]:
    """Those of the layer, without the prefix."""
    prefix = f"layers.{layer}."
    return {
        name.removeprefix(prefix): source.read(name, Box(0, rows, 0, columns))
        for name, (rows, columns) in shapes(MODEL, source.moe)
        if name.startswith(prefix)
    }


def ffn(tokens: torch.Tensor, of: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    return (F.silu(tokens @ of[prefix + "gate"].T) * (tokens @ of[prefix + "up"].T)) @ of[prefix + "down"].T


def mixture(tokens: torch.Tensor, of: dict[str, torch.Tensor], top_k: int) -> torch.Tensor:
    """Top-k, then softmax."""
    best, experts = (tokens @ of["router"].T).topk(top_k)
    outputs = torch.stack([ffn(tokens, of, f"experts.{expert}.") for expert in range(len(of["router"]))], dim=1)
    chosen = outputs.gather(1, experts[:, :, None].expand(-1, -1, tokens.shape[1]))
    routed = (best.softmax(-1)[:, :, None] * chosen).sum(1)
    return routed + (ffn(tokens, of, "shared.") if "shared.gate" in of else 0)


def error(source: Upcycled) -> float:
    """Of the layer's output, relative to the largest value of the dense one."""
    dense = {
        kind: DENSE.read(f"layers.0.{kind}", Box(0, *(96, 0, 24) if kind != "down" else (24, 0, 96))) for kind in ("gate", "up", "down")
    }
    want = ffn(TOKENS, dense)
    return float((mixture(TOKENS, matrices(source), source.moe.top_k) - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("num_experts, top_k", [(2, 2), (3, 2), (8, 2), (8, 5), (64, 6), (64, 64)])
def test_copies_compute_what_the_dense_model_does(num_experts, top_k):
    source = upcycled(num_experts=num_experts, top_k=top_k)
    assert source.keeps_the_function and error(source) < 1e-5


@pytest.mark.parametrize("pieces, num_experts, top_k", [(2, 8, 2), (2, 2, 2), (4, 16, 4), (4, 16, 8), (8, 64, 8), (3, 12, 9)])
def test_granular_experts_with_exact_scaling_do_too_and_with_cube_roots_do_not(pieces, num_experts, top_k):
    sizes = dict(num_experts=num_experts, top_k=top_k, ffn_hidden_size=96 // pieces)
    exact = upcycled(**sizes, upcycling=dict(operator="granular"))
    approximate = upcycled(**sizes, upcycling=dict(operator="granular", scaling="cube_root"))
    errors = [error(exact), error(approximate)]
    print(f"{pieces} pieces: exact {errors[0]:.1e}, cube_root {errors[1]:.2f}")
    assert exact.keeps_the_function and errors[0] < 1e-5
    assert not approximate.keeps_the_function and errors[1] > 0.01


@pytest.mark.parametrize("router", ["normal", "balance_noise"])
def test_granular_experts_need_virtual_groups(router):
    source = upcycled(num_experts=16, top_k=4, ffn_hidden_size=24, upcycling=dict(operator="granular", router=router))
    assert not source.keeps_the_function and error(source) > 0.01


def test_router_rows():
    sizes = dict(num_experts=8, top_k=4, ffn_hidden_size=24, router_init_std=0.05)
    rows = {router: matrices(upcycled(**sizes, upcycling=dict(operator="granular", router=router)))["router"] for router in ROUTERS}
    assert rows["normal"].std().item() == pytest.approx(0.05, rel=0.2) and len(rows["normal"].unique(dim=0)) == 8
    assert rows[None].equal(rows["normal"][[0, 0, 0, 0, 1, 1, 1, 1]]) and rows[None].equal(rows["virtual_groups"])
    noise = rows["balance_noise"] - rows[None]
    assert noise.std().item() == pytest.approx(0.005, rel=0.2) and len(noise.unique(dim=0)) == 8


ROUTERS = (None, "normal", "virtual_groups", "balance_noise")


def test_noise_is_relative_to_the_matrix():
    of = matrices(upcycled(upcycling=dict(operator="noise", noise_std=0.05)))
    for kind in ("gate", "up", "down"):
        dense = DENSE.read(f"layers.0.{kind}", Box(0, *of[f"experts.0.{kind}"].shape[:1], 0, of[f"experts.0.{kind}"].shape[1]))
        changes = [of[f"experts.{expert}.{kind}"] - dense for expert in range(8)]
        assert all(change.std().item() == pytest.approx(0.05 * dense.std().item(), rel=0.05) for change in changes)
        assert abs(torch.corrcoef(torch.stack([changes[0].flatten(), changes[1].flatten()]))[0, 1]) < 0.1
    assert not upcycled(upcycling=dict(operator="noise")).keeps_the_function


def redrawn(of: dict[str, torch.Tensor], expert: int) -> dict[str, set[int]]:
    """The neurons of an expert that are not those of the dense FFN, by matrix."""
    found = {}
    for kind in ("gate", "up", "down"):
        matrix = of[f"experts.{expert}.{kind}"]
        dense = DENSE.read(f"layers.0.{kind}", Box(0, matrix.shape[0], 0, matrix.shape[1]))
        found[kind] = set((matrix != dense).any(dim=0 if kind == "down" else 1).nonzero().flatten().tolist())
    return found


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_drop_draws_one_set_of_neurons_anew_in_each_expert(ratio):
    of = matrices(upcycled(upcycling=dict(operator="drop", drop_ratio=ratio)))
    neurons = [redrawn(of, expert) for expert in range(8)]
    assert all(found["gate"] == found["up"] == found["down"] and len(found["gate"]) == 96 * ratio for found in neurons)
    if ratio < 1:
        assert len({frozenset(found["gate"]) for found in neurons}) == 8
    for kind in ("gate", "up", "down"):
        experts = [of[f"experts.{expert}.{kind}"] for expert in range(8)]
        new = torch.stack([m[:, sorted(n[kind])] if kind == "down" else m[sorted(n[kind])] for m, n in zip(experts, neurons, strict=True)])
        dense = DENSE.read(f"layers.0.{kind}", Box(0, experts[0].shape[0], 0, experts[0].shape[1]))
        assert new.std().item() == pytest.approx(dense.std().item(), rel=0.05)
        assert len(new.flatten().unique()) > 0.99 * new.numel()  # no value of one expert stands in another


def test_drop_takes_mean_and_deviation_of_what_it_replaces():
    class Shifted:
        """Half of the neurons lie around 5."""

        def read(self, name: str, box: Box) -> torch.Tensor:
            return torch.cat([drawn(1, name, (48, 24), 0.1) + 5, drawn(2, name, (48, 24), 0.1)])

    source = upcycled(num_experts=4, upcycling=dict(operator="drop", drop_ratio=0.5))
    source.dense = Shifted()
    for expert in range(4):
        new = source.read(f"layers.0.experts.{expert}.gate", WHOLE)
        changed = (new != Shifted().read("layers.0.gate", WHOLE)).any(dim=1)
        replaced = Shifted().read("layers.0.gate", WHOLE)[changed]
        assert new[changed].mean().item() == pytest.approx(replaced.mean().item(), abs=0.3)
        assert new[changed].std().item() == pytest.approx(replaced.std().item(), rel=0.1)


def test_drop_as_published_touches_more_neurons():
    """gate, up and down each draw half of the neurons: 1 − 1/8 of them are touched."""
    of = matrices(upcycled(upcycling=dict(operator="drop", drop_ratio=0.5, independent=True)))
    found = [redrawn(of, expert) for expert in range(8)]
    assert all(len(neurons) == 48 for expert in found for neurons in expert.values())
    touched = sum(len(expert["gate"] | expert["up"] | expert["down"]) for expert in found) / 8 / 96
    assert touched == pytest.approx(0.875, abs=0.03)


OPERATORS = {
    "copy": dict(),
    "noise": dict(upcycling=dict(operator="noise")),
    "drop": dict(upcycling=dict(operator="drop")),
    "drop, independent": dict(upcycling=dict(operator="drop", independent=True)),
    "granular": dict(ffn_hidden_size=48, upcycling=dict(operator="granular")),
    "granular, balance_noise": dict(ffn_hidden_size=48, upcycling=dict(operator="granular", router="balance_noise")),
    "granular, cube_root": dict(ffn_hidden_size=48, upcycling=dict(operator="granular", scaling="cube_root")),
    "shared": dict(shared_ffn_hidden_size=40, every=2),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_box_does_not_depend_on_who_asks(operator):
    """The boxes of another source, in another order and with another number of threads, are cuts of the whole matrices."""
    whole, boxes = upcycled(**OPERATORS[operator]), upcycled(**OPERATORS[operator])
    for name, (rows, columns) in reversed(list(shapes(MODEL, whole.moe))):
        torch.set_num_threads(1)
        want = whole.read(name, Box(0, rows, 0, columns))
        assert want.shape == (rows, columns) and want.dtype == torch.float32
        torch.set_num_threads(4)
        box = Box(rows // 3, rows - rows // 4, columns // 2, columns)
        assert boxes.read(name, box).equal(want[box.row0 : box.row1, box.column0 : box.column1]), name
    other = upcycled(seed=4, **OPERATORS[operator])
    assert not other.read("layers.0.router", Box(0, 8, 0, 24)).equal(whole.read("layers.0.router", Box(0, 8, 0, 24)))


def test_mean_and_deviation_do_not_depend_on_the_number_of_threads():
    values, found = torch.randn(700, 900, generator=torch.Generator().manual_seed(1)) + 0.3, set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(_mean_and_std(values))
    assert len(found) == 1
    assert found.pop() == pytest.approx((values.double().mean().item(), values.double().std().item()), rel=1e-5)


def test_copies_and_pieces_are_read_without_the_whole_matrix():
    class Asked:
        def read(self, name: str, box: Box) -> torch.Tensor:
            asked.append((name, box))
            return torch.zeros(box.rows, box.columns)

    asked: list[tuple[str, Box]] = []
    source = upcycled(num_experts=8, ffn_hidden_size=48, upcycling=dict(operator="granular"))
    source.dense = Asked()
    source.read("layers.1.experts.5.gate", Box(10, 20, 0, 24))
    source.read("layers.1.experts.5.down", Box(0, 24, 10, 20))
    source.read("layers.1.query", Box(0, 5, 0, 24))
    assert asked == [
        ("layers.1.gate", Box(58, 68, 0, 24)),
        ("layers.1.down", Box(0, 24, 58, 68)),
        ("layers.1.query", Box(0, 5, 0, 24)),
    ]


@pytest.mark.parametrize("moe", [dict(), dict(num_experts=8, top_k=4, ffn_hidden_size=24, upcycling=dict(operator="granular"))])
def test_a_shared_expert_adds_nothing_at_first_and_can_learn(moe):
    source = upcycled(**moe, shared_ffn_hidden_size=40)
    assert source.keeps_the_function and error(source) < 1e-5
    of = matrices(source)
    of["shared.down"].requires_grad_()
    mixture(TOKENS, of, source.moe.top_k).square().mean().backward()
    assert of["shared.down"].grad.abs().min() > 0 and of["shared.gate"].std() > 0


def test_layers_between_mixtures_stay_dense():
    source = upcycled(every=2)
    assert "router" in matrices(source, 0) and matrices(source, 1)["gate"].equal(DENSE.read("layers.1.gate", WHOLE))


@pytest.mark.parametrize(
    "moe, message",
    [
        (
            dict(ffn_hidden_size=48),
            r"moe.ffn_hidden_size \(48\) must be model.ffn_hidden_size \(96\) with moe.upcycling.operator copy: leave",
        ),
        (dict(ffn_hidden_size=48, upcycling=dict(operator="drop")), "with moe.upcycling.operator drop"),
        (dict(ffn_hidden_size=40, upcycling=dict(operator="granular")), r"moe.ffn_hidden_size \(40\) must divide .* \(96\)"),
        (
            dict(num_experts=6, ffn_hidden_size=24, upcycling=dict(operator="granular")),
            r"moe.num_experts \(6\) must be a multiple of 4.* 8",
        ),
        (dict(top_k=2, ffn_hidden_size=24, upcycling=dict(operator="granular")), r"moe.top_k \(2\) must be a multiple of 4.*: write 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(moe, message):
    reason = MoEConfig.model_validate(dict(num_experts=8, top_k=2) | moe).why_not_upcycled(MODEL)
    assert reason and re.search(message, reason)


@pytest.mark.parametrize("moe", [dict(scores="softmax_topk"), dict(scores="sigmoid", top_k=1), dict(capacity_factor=1.25)])
def test_routers_whose_weights_do_not_add_up_to_one_do_not_keep_the_function(moe):
    assert not upcycled(**moe).keeps_the_function
