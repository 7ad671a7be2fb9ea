"""What a step minimises, and what is measured of it: the loss of the next token, by source, over a global batch.

Another objective is another function in the place of `next_token_loss`, and other micro-batches.

Shapes: B micro-batch, L sequence length (this rank's part of it), N sources and one more for samples that do not count;
the leading 2 is (cross-entropy, log Z).
"""

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_jobs.config import Phase, RunConfig
from megatron_jobs.data.feeder import MicroBatch
from megatron_jobs.engine.cross_entropy import cross_entropy_and_log_z
from megatron_jobs.engine.gpt import forward, message_shape, without_fp8
from megatron_jobs.engine.state import TrainingState
from moe import statistics
from moe.router import Router


@dataclass(frozen=True)
class Losses:
    """What one pass over a global batch gave, the same on every rank. Auxiliary losses are those before their coefficient."""

    mean: float  # cross-entropy, nats a token
    by_source: dict[str, float]  # the same over the tokens of each source that is in the batch
    tokens_by_source: dict[str, int]
    z_loss: float  # mean over the tokens of the square of log Z
    load_balancing_loss: float | None  # mean over the layers; None where it is not minimised
    router_z_loss: float | None
    # For each layer that is a mixture [layers, experts], empty for a dense model:
    expert_load: torch.Tensor  # how often the router chose the expert for a token
    router_scores: torch.Tensor  # the sum of the router's scores, 1 a token, whether the expert was chosen or not
    dropped: list[float] | None  # share of what was chosen that had no room in its expert [layers]; None without a capacity


class Objective:
    """Runs the model forward and backward and adds up what the ranks found."""

    def __init__(self, config: RunConfig, state: TrainingState, sources: Sequence[str]) -> None:
        """`sources` are the names that the indices in the micro-batches stand for."""
        self.config, self.state, self.sources = config, state, list(sources)
        self._mixture = _Mixture(config, state)
        self._forward_backward = get_forward_backward_func()

    def gradients(self, phase: Phase, batches: Sequence[MicroBatch]) -> Losses:
        """Leaves the gradients of the global batch in the state. `batches` are this rank's micro-batches."""
        self.state.zero_grad()
        losses = self._pass(phase, batches, len(batches), forward_only=False)
        self.recall((losses.expert_load / losses.expert_load.sum(1, keepdim=True)).tolist())
        return losses

    def memory(self) -> list[list[float]]:
        """What a checkpoint keeps of it, as plain values: the shares of the experts in the last step [layers][experts]."""
        return self._mixture.load

    def recall(self, memory: list[list[float]] | None) -> None:
        """Goes back to what `memory` returned; None is the start of a run. `balancing: global_aux_loss` goes by it."""
        self._mixture.set_load(memory)

    def losses(self, phase: Phase, batches: Iterable[MicroBatch], num_micro_batches: int) -> Losses:
        """Forward only: nothing that training goes on from is touched. Samples of the index behind the last source do not count."""
        with torch.no_grad():
            return self._pass(phase, batches, num_micro_batches, forward_only=True)

    def fp8_shadow(self, phase: Phase, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """The loss of the first of these micro-batches in fp8 and with fp8 turned off, and their relative difference."""
        batches = batches[: self.config.parallel.pipeline]  # the interleaved schedule takes them in groups of so many
        loss_fp8 = self.losses(phase, batches, len(batches)).mean
        with contextlib.ExitStack() as turned_off:
            for chunk in self.state.chunks:
                turned_off.enter_context(without_fp8(chunk.module))
            loss_bf16 = self.losses(phase, batches, len(batches)).mean
        return {"loss_bf16": loss_bf16, "loss_fp8": loss_fp8, "difference": abs(loss_fp8 - loss_bf16) / loss_bf16}

    def expert_similarity(self) -> list[float]:
        """The mean cosine between the weights of two experts, for each layer that is a mixture. Collective."""
        return self._mixture.similarity()

    def _pass(self, phase: Phase, batches: Iterable[MicroBatch], num_micro_batches: int, forward_only: bool) -> Losses:
        sums = self._forward_backward(
            forward_step_func=partial(_forward, len(self.sources) + 1, phase.loss.z_loss),
            data_iterator=list(itertools.tee(batches, len(self.state.chunks))),  # every chunk of a rank reads every micro-batch
            model=self.state.chunks,
            num_microbatches=num_micro_batches,
            **message_shape(phase, self.config.train.micro_batch_size),
            forward_only=forward_only,
        )
        return self._over_all_ranks(sums, num_micro_batches)

    def _over_all_ranks(self, sums: list[torch.Tensor], num_micro_batches: int) -> Losses:
        """One exchange for everything, in float64."""
        tally, router_losses = self._mixture.take(num_micro_batches)
        own = torch.zeros(3, len(self.sources) + 1, dtype=torch.float64, device=tally.device)
        # Only the last pipeline stage has losses; its tensor-parallel ranks all have the same.
        if sums and parallel_state.get_tensor_model_parallel_rank() == 0:
            own = torch.stack(sums).sum(0)
        total = torch.cat([own.flatten(), router_losses.double(), tally.double().flatten()])
        dist.all_reduce(total)
        total = total.cpu()
        tokens, nats, squares = total[: own.numel()].view(own.shape)[:, :-1].tolist()
        router_losses = total[own.numel() : own.numel() + 2].tolist()
        chosen, kept, scores = total[own.numel() + 2 :].view_as(tally)
        moe = self.config.moe
        return Losses(
            mean=sum(nats) / sum(tokens),
            by_source={name: n / t for name, n, t in zip(self.sources, nats, tokens, strict=True) if t},
            tokens_by_source={name: int(t) for name, t in zip(self.sources, tokens, strict=True) if t},
            z_loss=sum(squares) / sum(tokens),
            load_balancing_loss=router_losses[0] if moe and moe.has_load_balancing_loss else None,
            router_z_loss=router_losses[1] if moe and moe.router_z_loss else None,
            expert_load=chosen,
            router_scores=scores,
            dropped=(1 - kept.sum(1) / chosen.sum(1)).tolist() if moe and moe.capacity_factor else None,
        )


def fp8_warning(shadow: dict[str, float]) -> str | None:
    """What to tell the user where fp8 changes the loss by more than 1%, or makes it no number at all."""
    if shadow["difference"] <= 0.01:
        return None
    return (
        f"the loss is {shadow['loss_fp8']:.4f} in fp8 and {shadow['loss_bf16']:.4f} in bf16, {shadow['difference']:.1%} apart: "
        "train.precision bf16 is the safe choice"
    )


def next_token_loss(
    outputs_2BL: torch.Tensor, sources_B: torch.Tensor, num_sources: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What this micro-batch adds to the gradient, and its sums by source [3, N] in float64: tokens, cross-entropy, squares of log Z."""
    cross_entropy_BL, log_z_BL = outputs_2BL
    loss = cross_entropy_BL.mean()
    if z_loss:
        loss = loss + z_loss * log_z_BL.square().mean()
    values_3BL = torch.stack([torch.ones_like(log_z_BL), cross_entropy_BL, log_z_BL.square()]).detach().double()
    # not index_add_, whose order on a GPU is another one each time; not a product, which takes a NaN over to other sources
    is_of_source_NB = sources_B == torch.arange(num_sources, device=sources_B.device)[:, None]
    return loss, values_3BL.sum(2)[:, None].where(is_of_source_NB, 0.0).sum(2)


def _forward(num_sources: int, z_loss: float, batches: Iterator[MicroBatch], gpt: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    tokens, sources, documents = (_on_device(values) for values in (batch.tokens, batch.sources, batch.documents))
    output = forward(gpt, tokens[:, :-1], tokens[:, 1:], documents, _outputs)

    def loss(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, sums = next_token_loss(outputs.view(2, len(sources), -1), sources, num_sources, z_loss)
        return mean / parallel_state.get_context_parallel_world_size(), sums  # by which megatron-core multiplies it

    return output, loss


def _on_device(values: np.ndarray | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values).to(torch.cuda.current_device(), non_blocking=True)


def _outputs(*, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    """The last stage's output in the place of megatron-core's cross-entropy: [2, B, L]."""
    logits_SBV, _bias = output_layer(hidden_states, weight=output_weight)
    group = parallel_state.get_tensor_model_parallel_group()
    return cross_entropy_and_log_z(logits_SBV, labels.transpose(0, 1), group).transpose(1, 2)


class _Mixture:
    """What the routers of this rank's layers do: how many tokens each expert gets, and the routers' losses; and how alike experts are."""

    def __init__(self, config: RunConfig, state: TrainingState) -> None:
        moe = config.moe
        self.layers = moe.layers(config.model) if moe else []
        self.num_experts = moe.num_experts if moe else 0
        self.parameters = state.parameters
        self.routers = [module for chunk in state.chunks for module in chunk.modules() if isinstance(module, Router)]
        self.set_load(None)

    def set_load(self, load: list[list[float]] | None) -> None:
        self.load = load or [[1 / self.num_experts] * self.num_experts for _ in self.layers]
        for router in self.routers:
            router.load_E.copy_(torch.tensor(self.load[self.layers.index(router.layer_number - 1)]))

    def take(self, num_micro_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Clears and returns what, summed over all ranks, is the tally [3, layers, experts], and (load balancing, z-loss) a layer."""
        tally = torch.zeros(3, len(self.layers), self.num_experts, device=torch.cuda.current_device())
        for router in self.routers:
            tally[:, self.layers.index(router.layer_number - 1)] = router.tally_3E
            router.tally_3E.zero_()
        tracked = get_moe_metrics_tracker()
        # A rank has its share of a micro-batch's load-balancing loss, and a z-loss of its own tokens.
        copies = parallel_state.get_data_parallel_world_size() * num_micro_batches * len(self.layers)
        parts = parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
        losses = tally.new_zeros(2)
        for place, (name, divisor) in enumerate((("load_balancing_loss", copies), ("z_loss", copies * parts))):
            if name in tracked.metrics:
                losses[place] = tracked.metrics[name].values.sum() / divisor
        tracked.clear()
        return tally, losses

    def similarity(self) -> list[float]:
        """See `statistics.similarity`."""

        def matrices() -> Iterator[tuple[int, int, str, torch.Tensor]]:
            for local in self.parameters:
                rows = local.parameter.view(-1, local.columns)
                for part in local.parts:
                    if found := re.fullmatch(r"layers\.(\d+)\.experts\.(\d+)\.(\w+)", part.name):
                        layer, expert, matrix = found.groups()
                        yield self.layers.index(int(layer)), int(expert), matrix, part.of(rows)

        return statistics.similarity(matrices(), len(self.layers), self.num_experts)
