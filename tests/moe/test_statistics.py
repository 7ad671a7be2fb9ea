"""What is watched of the experts, by hand."""

import math
from itertools import combinations

import pytest
import torch

from moe.statistics import Alarms, evenness
from tests.ranks import run_ranks

EVEN = [0.25] * 4


def test_evenness():
    assert evenness(EVEN) == pytest.approx(1) and evenness([3.0, 3.0]) == pytest.approx(1)
    assert evenness([0, 7, 0]) == 0
    assert evenness([0.5, 0.25, 0.25, 0]) == pytest.approx(1.5 * math.log(2) / math.log(4))


def test_an_alarm_is_told_when_it_begins_and_when_it_ends():
    alarms = Alarms([0, 2], top_k=2, window=2)
    dying, dead = [0.3, 0.35, 0.31, 0.04], [0.3, 0.35, 0.35, 0.0]
    assert alarms.look([EVEN, dead]) == []  # no window yet
    assert alarms.look([EVEN, EVEN]) == []
    assert alarms.look([EVEN, dying]) == []
    assert alarms.look([EVEN, dead]) == [
        "layer 2 expert 3: is dead: 2.00% of the routed tokens over the last 2 steps, an even share is 25.00%"
    ]
    assert alarms.look([EVEN, dead]) == []
    assert alarms.look([EVEN, EVEN]) == ["layer 2 expert 3: is well again"]
    assert alarms.look([EVEN, EVEN]) == []


@pytest.mark.parametrize(
    "load, top_k, is_collapse",
    [
        ([0.49, 0.49, 0.01, 0.01], 2, True),
        ([0.48, 0.18, 0.17, 0.17], 2, True),  # one expert is with nearly every token, although the others share evenly
        ([0.4, 0.3, 0.2, 0.1], 2, False),
        ([0.7, 0.1, 0.1, 0.1], 1, False),
        ([0.95, 0.02, 0.02, 0.01], 1, True),
        ([0.25] * 4, 4, False),  # every token goes to all
    ],
)
def test_collapse(load, top_k, is_collapse):
    news = Alarms([5], top_k, window=1).look([load])
    assert any(line.startswith("layer 5: has collapsed: over the last 1 steps") for line in news) == is_collapse


LAYOUTS = [dict(), dict(expert=2), dict(expert_tensor=2), dict(expert=2, expert_tensor=2), dict(pipeline=2, expert=2)]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_similarity_is_the_mean_over_all_pairs(sizes):
    experts = _experts()
    expected = []
    for layer in range(2):
        whole = [torch.cat([matrix.flatten() for matrix in experts[layer][expert].values()]) for expert in range(4)]
        expected.append(sum(float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(whole, 2)) / 6)
    assert expected[0] > 0.5 > abs(expected[1])
    for got in run_ranks(4, _similarity, sizes):
        assert got == pytest.approx(expected, abs=1e-6)


def _experts() -> list[list[dict[str, torch.Tensor]]]:
    """[layer][expert]{matrix}: in the first layer they are alike."""
    draw = torch.Generator().manual_seed(1)
    common = {"up": torch.randn(6, 4, generator=draw), "down": torch.randn(4, 6, generator=draw)}
    noise = {name: torch.randn(2, 4, *matrix.shape, generator=draw) for name, matrix in common.items()}

    def expert(layer: int, number: int) -> dict[str, torch.Tensor]:
        return {name: (1 - layer) * matrix + noise[name][layer, number] * (number + 1) / 4 for name, matrix in common.items()}

    return [[expert(layer, number) for number in range(4)] for layer in range(2)]


def _similarity(sizes: dict[str, int]) -> list[float]:
    """Each rank of four gives what it would hold: its experts, cut by the expert-tensor ranks, of its pipeline stage's layers."""
    from megatron.core import parallel_state

    from megatron_jobs.config import ParallelConfig
    from megatron_jobs.engine import groups
    from moe import statistics

    layout = ParallelConfig(**sizes)
    with groups.of_run(layout, 1):
        first = 4 // layout.expert * parallel_state.get_expert_model_parallel_rank()
        cut = parallel_state.get_expert_tensor_parallel_rank()
        layers = range(2) if layout.pipeline == 1 else [parallel_state.get_pipeline_model_parallel_rank()]
        mine = [
            (layer, expert, name, matrix.chunk(layout.expert_tensor, dim=int(name == "down"))[cut])
            for layer in layers
            for expert in range(first, first + 4 // layout.expert)
            for name, matrix in _experts()[layer][expert].items()
        ]
        return statistics.similarity(mine, 2, 4)
