"""What the routers of a run do: how many tokens each expert gets, the routers' own losses, and how alike the experts are.

Shapes: N layers that are mixtures (none in a dense model), E experts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_jobs.config import RunConfig
from megatron_jobs.config.model import MoEConfig
from megatron_jobs.config.phase import Phase
from megatron_jobs.engine import core
from megatron_jobs.engine.state import TrainingState
from moe import statistics
from moe.router import Router


@dataclass(frozen=True)
class Routed:
    """What the routers did with a global batch, the same on every rank. Losses are those before their coefficient."""

    load_balancing_loss: float | None  # mean over the layers; None where it is not minimised
    router_z_loss: float | None
    load_NE: torch.Tensor  # how often the router chose the expert for a token
    scores_NE: torch.Tensor  # the sum of the router's scores, 1 a token, whether the expert was chosen or not
    dropped: list[float] | None  # share of what was chosen that had no room in its expert, by layer; None without a capacity

    def as_record(self) -> dict[str, Any]:
        """The fields of a line of metrics.jsonl (`monitoring/metrics.py` has the list)."""
        fields = {name: getattr(self, name) for name in ("load_balancing_loss", "router_z_loss", "dropped")}
        return {name: value for name, value in fields.items() if value is not None} | {
            "expert_load": (self.load_NE / self.load_NE.sum(1, keepdim=True)).tolist(),
            "load_entropy": [statistics.evenness(layer) for layer in self.load_NE.tolist()],
            "router_entropy": [statistics.evenness(layer) for layer in self.scores_NE.tolist()],
        }


class Routing:
    """The routers of this rank's layers. `tally` and `routed` enclose the sum over all ranks, which the passes make once for everything."""

    def __init__(self, config: RunConfig, moe: MoEConfig, state: TrainingState) -> None:
        self.moe = self._of_run = moe
        self.layers = moe.layers(config.model)
        self.parameters, self.is_frozen = state.parameters, config.adapter is not None
        self.routers = [module for chunk in state.chunks for module in chunk.modules() if isinstance(module, Router)]
        self.from_ledger(None)

    def to_ledger(self) -> list[list[float]]:
        """The shares of the experts in the last step [layers][experts]. `balancing: global_aux_loss` goes by them."""
        return self._load

    def from_ledger(self, load: list[list[float]] | None) -> None:
        """Goes back to what `to_ledger` returned; None is the start of a run."""
        num_experts = self.moe.num_experts
        self._load = load or [[1 / num_experts] * num_experts for _ in self.layers]
        for router in self.routers:
            router.load_E.copy_(torch.tensor(self._load[self._place(router)]))

    def begin(self, phase: Phase) -> None:
        """From now on the routers are trained as this phase says."""
        self.moe = self._of_run.in_phase(phase.moe)
        for router in self.routers:
            router.minimise(self.moe.load_balancing_loss if self.moe.has_load_balancing_loss else 0.0, self.moe.router_z_loss)

    def update(self, routed: Routed) -> None:
        """What an update changes of the routers that no gradient does: the load that is remembered, and the bias."""
        self.from_ledger((routed.load_NE / routed.load_NE.sum(1, keepdim=True)).tolist())
        for router in [] if self.is_frozen else self.routers:
            router.move_bias(routed.load_NE[self._place(router)], self.moe.bias_update_rate)

    def tally(self, num_micro_batches: int) -> torch.Tensor:
        """Clears and returns what is to be summed over all ranks, float64 [2 + 3NE]."""
        tally_3NE = torch.zeros(3, len(self.layers), self.moe.num_experts, device=torch.cuda.current_device())
        for router in self.routers:
            tally_3NE[:, self._place(router)] = router.tally_3E
            router.tally_3E.zero_()
        # A rank has its share of a micro-batch's load-balancing loss, and a z-loss of its own tokens.
        copies = parallel_state.get_data_parallel_world_size() * num_micro_batches * len(self.layers)
        parts = parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
        tracked, losses = core.router_losses(), tally_3NE.new_zeros(2)
        for place, (name, divisor) in enumerate((("load_balancing_loss", copies), ("z_loss", copies * parts))):
            if name in tracked:
                losses[place] = tracked[name] / divisor
        return torch.cat([losses.double(), tally_3NE.double().flatten()])

    def routed(self, total: torch.Tensor) -> Routed:
        """What the sum of all ranks' tallies says."""
        losses = total[:2].tolist()
        chosen_NE, kept_NE, scores_NE = total[2:].view(3, len(self.layers), self.moe.num_experts)
        return Routed(
            load_balancing_loss=losses[0] if self.moe.has_load_balancing_loss else None,
            router_z_loss=losses[1] if self.moe.router_z_loss else None,
            load_NE=chosen_NE,
            scores_NE=scores_NE,
            dropped=(1 - kept_NE.sum(1) / chosen_NE.sum(1)).tolist() if self.moe.capacity_factor else None,
        )

    def similarity(self) -> list[float]:
        """The mean cosine between the weights of two experts, by layer (`statistics.similarity`). Collective."""

        def matrices() -> Iterator[tuple[int, int, str, torch.Tensor]]:
            for local in self.parameters:
                rows = local.parameter.view(-1, local.columns)
                for part in local.parts:
                    if found := re.fullmatch(r"layers\.(\d+)\.experts\.(\d+)\.(\w+)", part.name):
                        layer, expert, matrix = found.groups()
                        yield self.layers.index(int(layer)), int(expert), matrix, part.of(rows)

        return statistics.similarity(matrices(), len(self.layers), self.moe.num_experts)

    def _place(self, router: Router) -> int:
        return self.layers.index(router.layer_number - 1)
