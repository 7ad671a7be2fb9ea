"""What is watched of the mixtures of a run: how even the load is, which experts are dead, and whether the copies grow apart.

`Alarms` and `evenness` need no process group. Shapes: N layers that are mixtures, E experts.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

WINDOW = 64  # steps over which the alarms take the mean of the load
DEAD = 0.1  # of an even share: an expert with less is dead
TAKEN = 0.9  # of all tokens: an expert with more takes nearly all


def evenness(shares: Sequence[float]) -> float:
    """The entropy of shares (they need not sum to 1) over that of equal ones: 1 is even, 0 is all in one place."""
    total = sum(shares)
    entropy = -sum(share / total * math.log(share / total) for share in shares if share > 0)
    return entropy / math.log(len(shares)) if len(shares) > 1 else 1.0


class Alarms:
    """Tells when an expert dies or the routing of a layer collapses, and when that is over. Each is told once."""

    def __init__(self, layers: Sequence[int], top_k: int, window: int) -> None:
        """`layers` are the numbers of the layers that are mixtures; `window` is in steps."""
        self.layers, self.top_k, self.window = layers, top_k, window
        self._loads: deque[list[list[float]]] = deque(maxlen=window)
        self._sounding: dict[str, str] = {}  # what is wrong, by its place

    def look(self, load_NE: list[list[float]]) -> list[str]:
        """What is new after a step, whose routed tokens went to the experts in these shares (they sum to 1 over a layer)."""
        self._loads.append(load_NE)
        if len(self._loads) < self.window:
            return []
        before, self._sounding = self._sounding, {}
        for number, *loads in zip(self.layers, *self._loads, strict=True):
            means = [sum(shares) / len(loads) for shares in zip(*loads, strict=True)]
            self._sounding |= {f"layer {number}{place}": wrong for place, wrong in self._wrong(means).items()}
        began = [f"{place}: {wrong}" for place, wrong in self._sounding.items() if place not in before]
        return began + [f"{place}: is well again" for place in before if place not in self._sounding]

    def _wrong(self, means_E: list[float]) -> dict[str, str]:
        num_experts = len(means_E)
        if num_experts == self.top_k:  # every token goes to all
            return {}
        over = f"over the last {self._loads.maxlen} steps"
        wrong = {
            f" expert {expert}": f"is dead: {share:.2%} of the routed tokens {over}, an even share is {1 / num_experts:.2%}"
            for expert, share in enumerate(means_E)
            if share < DEAD / num_experts
        }
        # The entropy as a number of experts: as many as take part where these share evenly.
        taking_part = num_experts ** evenness(means_E)
        busiest = max(means_E) * self.top_k  # of all tokens
        if taking_part < self.top_k + (num_experts - self.top_k) / 4 or busiest > TAKEN:
            wrong[""] = (
                f"has collapsed: {over} its load is that of {taking_part:.1f} of {num_experts} experts, "
                f"and expert {means_E.index(max(means_E))} gets {busiest:.0%} of the tokens"
            )
        return wrong


def similarity(matrices: Iterable[tuple[int, int, str, torch.Tensor]], num_layers: int, num_experts: int) -> list[float]:
    """The mean cosine between the weights of two experts of a layer, over all pairs, for each of `num_layers` mixtures.

    `matrices` are this rank's parts of the experts: (layer, counted among the mixtures; expert; which matrix; its values). Collective.
    Of unit vectors u, one for each expert, the mean over the pairs is (|Σ u|² − E) / (E (E − 1)): a sum that the ranks can share, so that
    none of them ever holds more than its own experts and one matrix.
    """
    matrices = list(matrices)
    expert_group = parallel_state.get_expert_model_parallel_group()
    is_first_copy = parallel_state.get_expert_data_parallel_rank() == 0
    squares_NE = torch.zeros(num_layers, num_experts, dtype=torch.float64, device=torch.cuda.current_device())
    if is_first_copy:
        for layer, expert, _, values in matrices:
            squares_NE[layer, expert] += torch.linalg.vector_norm(values.detach(), dtype=torch.float64).square()
    dist.all_reduce(squares_NE)
    norms = squares_NE.sqrt().tolist()

    by_matrix: dict[tuple[int, str], list[tuple[int, torch.Tensor]]] = {}
    for layer, expert, matrix, values in matrices:
        by_matrix.setdefault((layer, matrix), []).append((expert, values.detach()))
    squares_N = squares_NE.new_zeros(num_layers)
    for (layer, _), experts in by_matrix.items():
        total = torch.zeros_like(experts[0][1], dtype=torch.float32)
        for expert, values in experts:
            total.add_(values, alpha=1 / norms[layer][expert])
        dist.all_reduce(total, group=expert_group)
        if is_first_copy and expert_group.rank() == 0:
            squares_N[layer] += torch.linalg.vector_norm(total, dtype=torch.float64).square()
    dist.all_reduce(squares_N)
    return ((squares_N - num_experts) / (num_experts * (num_experts - 1))).tolist()
