"""What a step minimises: the mean loss of the next token, forward and backward over the micro-batches of a global batch.

Shapes: B micro-batch, L sequence length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from megatron_jobs.config import Phase, RunConfig
from megatron_jobs.state import TrainingState


@dataclass(frozen=True)
class Losses:
    """What one pass over a global batch gave, the same on every rank."""

    mean: float  # nats a token
    by_source: dict[str, float]
    tokens_by_source: dict[str, int]
    z_loss: float
    load_balancing_loss: float | None
    router_z_loss: float | None
    expert_load: torch.Tensor  # tokens routed to each expert [layers, experts], empty for a dense model


class Objective:
    """Runs the model forward and backward and adds up what the ranks found."""

    def __init__(self, config: RunConfig, state: TrainingState) -> None:
        self.config, self.state = config, state
        self._expert_load = _ExpertLoad(config, state)
        self._forward_backward = get_forward_backward_func()

    def gradients(self, phase: Phase, batches: Iterator[torch.Tensor], num_micro_batches: int) -> Losses:
        """Leaves the gradients of the global batch in the state. `batches` are this rank's micro-batches, each [B, L + 1] token ids."""
        self.state.zero_grad()
        losses = self._forward_backward(
            forward_step_func=_forward,
            data_iterator=batches,
            model=self.state.chunks,
            num_microbatches=num_micro_batches,
            seq_length=phase.sequence_length,
            micro_batch_size=self.config.train.micro_batch_size,
        )
        return _over_all_ranks(losses, self._expert_load.take())


def _forward(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)
    output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return output, _mean_loss


def _mean_loss(token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = token_losses.float().mean()
    return loss, loss.detach().clone()  # megatron-core divides the first one in place


def _over_all_ranks(losses: list[torch.Tensor], load: torch.Tensor) -> Losses:
    # Only the last pipeline stage has losses; its tensor-parallel ranks all have the same.
    share = 1 / (parallel_state.get_data_parallel_world_size() * parallel_state.get_tensor_model_parallel_world_size())
    mean = torch.stack(losses).mean() * share if losses else torch.zeros((), device=load.device)
    total = torch.cat([mean.double().view(1), load.double().flatten()])
    dist.all_reduce(total)
    return Losses(float(total[0]), {}, {}, 0.0, None, None, total[1:].view_as(load).cpu())  # STAND-IN for the objective's helper


class _ExpertLoad:
    """Counts the tokens that each expert gets. `take` returns and clears the counts of this rank's layers."""

    def __init__(self, config: RunConfig, state: TrainingState) -> None:
        size = (config.model.num_layers, config.moe.num_experts) if config.moe else (0, 0)
        self.counts = torch.zeros(size, device=torch.cuda.current_device())
        for chunk in state.chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.counts[router.layer_number - 1] += outputs[1].sum(0)

    def take(self) -> torch.Tensor:
        get_moe_metrics_tracker().clear()  # megatron-core adds to its own records until someone reads them
        counts = self.counts.clone()
        self.counts.zero_()
        return counts
