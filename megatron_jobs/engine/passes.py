"""Runs the model forward and backward over a global batch, and adds up what the ranks found: by measure and by source.

What is minimised is a loss of `megatron_jobs/losses`, which knows nothing of ranks; what routers do is told beside it (`routing.py`).

Shapes: B micro-batch, L labels (this rank's part of the sequence), M measures, N sources and one more for samples that do not count;
the leading 2 is (cross-entropy, log Z).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.distributed.nn.functional import all_reduce

from megatron_jobs import losses, ranks
from megatron_jobs.config import RunConfig
from megatron_jobs.config.phase import Phase
from megatron_jobs.data.feeder import MicroBatch, weighs
from megatron_jobs.engine import lora
from megatron_jobs.engine.attention import this_part
from megatron_jobs.engine.cross_entropy import cross_entropy_and_log_z
from megatron_jobs.engine.gpt import forward, message_shape, without_fp8
from megatron_jobs.engine.routing import Routed, Routing
from megatron_jobs.engine.state import TrainingState
from megatron_jobs.losses.loss import Labels, Loss
from megatron_jobs.losses.preference import LogProbabilities, PreferenceLoss
from mujina.user_input import UserError


@dataclass(frozen=True)
class Measured:
    """What one pass over a global batch gave, the same on every rank."""

    measures: dict[str, float]  # of the loss, means over the weight of the batch, the run's curve first
    by_source: dict[str, float]  # the first measure, over each source that is in the batch and has a weight
    others_by_source: dict[str, dict[str, float]]  # the other measures of a loss over pairs, likewise
    tokens_by_source: dict[str, int]
    weight_by_source: dict[str, float] | None  # its share of the weight of the batch; None where all tokens count alike
    trained_by_source: dict[str, int] | None  # its tokens that have a weight; None where all tokens count alike
    routed: Routed | None  # None for a dense model

    @property
    def loss(self) -> float:
        return next(iter(self.measures.values()))

    def as_record(self) -> dict[str, Any]:
        """The fields of a line of metrics.jsonl (`monitoring/metrics.py` has the list)."""
        _, *others = self.measures.items()
        fields = {"loss": self.loss, "loss_by_source": self.by_source, "tokens_by_source": self.tokens_by_source, **dict(others)}
        if self.weight_by_source:
            fields |= {"weight_by_source": self.weight_by_source, "trained_by_source": self.trained_by_source}
        fields |= {f"{name}_by_source": values for name, values in self.others_by_source.items()}
        return fields | (self.routed.as_record() if self.routed else {})


class Passes:
    def __init__(self, config: RunConfig, state: TrainingState, sources: Sequence[str]) -> None:
        """`sources` are the names that the numbers in the micro-batches stand for."""
        self.config, self.state, self.sources = config, state, list(sources)
        self.routing = Routing(config, config.moe, state) if config.moe else None
        self.references: dict[str, np.ndarray] = {}  # of pairs, by source: log-probabilities of the two answers [pairs, 2]
        self._forward_backward = get_forward_backward_func()

    def gradients(self, phase: Phase, batches: Sequence[MicroBatch]) -> Measured:
        """Leaves the gradients of the global batch in the state. `batches` are this rank's micro-batches.

        Raises UserError when no token of the global batch has a weight.
        """
        self.state.zero_grad()
        # megatron-core divides what a micro-batch returns by their number, and the sum of the ranks by that of the data-parallel ones.
        shares = len(batches) * parallel_state.get_data_parallel_world_size()
        return self._pass(phase, batches, len(batches), self._weight(phase, batches) / shares)

    def update(self, measured: Measured, learning_rate: float) -> None:
        """One update with the gradients of the last pass; before it, nothing has changed that training goes on from."""
        self.state.update(learning_rate)
        if self.routing and measured.routed:
            self.routing.update(measured.routed)

    def measure(self, phase: Phase, batches: Iterable[MicroBatch], num_micro_batches: int) -> Measured:
        """Forward only: nothing that training goes on from is touched. Samples of the number behind the last source do not count."""
        with torch.no_grad():
            return self._pass(phase, batches, num_micro_batches, divisor=None)

    def log_probabilities(self, phase: Phase, batches: Sequence[MicroBatch]) -> list[tuple[str, int, float, float]]:
        """(source, pair, log-probability of the chosen answer, of the rejected one) of all pairs in all ranks' micro-batches.

        Those of the model, or of the base of its adapter.
        """
        loss, batches = LogProbabilities(), list(batches)
        with torch.no_grad(), contextlib.ExitStack() as turned_off:
            for chunk in self.state.chunks:
                turned_off.enter_context(lora.turned_off(chunk.module))
            self._pass(phase, batches, len(batches), None, loss)
        own = list[tuple[str, int, float, float]]()
        # Those that share the sequences all have the same.
        if parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0:
            for batch, found_BD in zip(batches, loss.found_BD, strict=False):  # none but on the last pipeline stage
                assert batch.pairs is not None
                for source, pairs, found_D in zip(batch.sources.tolist(), batch.pairs.tolist(), found_BD.tolist(), strict=True):
                    if source < len(self.sources):
                        own += [(self.sources[source], pair, *found_D[2 * p : 2 * p + 2]) for p, pair in enumerate(pairs) if pair >= 0]
        return [row for rows in ranks.gathered(own) for row in rows]

    def fp8_shadow(self, phase: Phase, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """The loss of the first of these micro-batches in fp8 and with fp8 turned off, and their relative difference."""
        batches = batches[: self.config.parallel.pipeline]  # the interleaved schedule takes them in groups of so many
        loss_fp8 = self.measure(phase, batches, len(batches)).loss
        with contextlib.ExitStack() as turned_off:
            for chunk in self.state.chunks:
                turned_off.enter_context(without_fp8(chunk.module))
            loss_bf16 = self.measure(phase, batches, len(batches)).loss
        return {"loss_bf16": loss_bf16, "loss_fp8": loss_fp8, "difference": abs(loss_fp8 - loss_bf16) / loss_bf16}

    def _weight(self, phase: Phase, batches: Sequence[MicroBatch]) -> float:
        """Of the global batch; an exchange is needed only where tokens differ in weight."""
        loss = losses.of(phase.loss)
        own = sum(map(loss.weight, batches))
        if not weighs(phase):
            return own * parallel_state.get_data_parallel_world_size()
        total = torch.tensor(own, dtype=torch.float64, device=torch.cuda.current_device())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        if not total:
            raise UserError(
                f"phases.{phase.name}.loss.token_weights ({phase.loss.token_weights}): no token of a whole batch has a weight above 0, and "
                "there is nothing to learn from it: look at the channel with `mujina inspect`, or take another source"
            )
        return float(total)

    def _pass(
        self, phase: Phase, batches: Iterable[MicroBatch], num_micro_batches: int, divisor: float | None, loss: Loss | None = None
    ) -> Measured:
        """`divisor` of the loss of a micro-batch; None: forward only. `loss` is the phase's, unless another one is to be measured."""
        loss = loss or losses.of(phase.loss)
        if self.routing:
            self.routing.begin(phase)
        sums = self._forward_backward(
            forward_step_func=partial(_forward, loss, divisor or 1.0, len(self.sources) + 1, self._references),
            data_iterator=list(itertools.tee(batches, len(self.state.chunks))),  # every chunk of a rank reads every micro-batch
            model=self.state.chunks,
            num_microbatches=num_micro_batches,
            **message_shape(phase, self.config.train.micro_batch_size),
            forward_only=divisor is None,
        )
        own = torch.zeros(3 + len(loss.measures), len(self.sources) + 1, dtype=torch.float64, device=torch.cuda.current_device())
        # Only the last pipeline stage has losses; its tensor-parallel ranks all have the same.
        if sums and parallel_state.get_tensor_model_parallel_rank() == 0:
            own = torch.stack(sums).sum(0)
        total, routed = self._over_all_ranks(own, num_micro_batches)
        tokens, trained, weights, *measures = total[:, :-1].tolist()
        names, by_source = self.sources, zip(self.sources, measures[0], weights, strict=True)
        return Measured(
            measures={name: sum(values) / sum(weights) for name, values in zip(loss.measures, measures, strict=True)},
            by_source={name: value / weight for name, value, weight in by_source if weight},
            others_by_source={
                measure: {name: value / weight for name, value, weight in zip(names, values, weights, strict=True) if weight}
                for measure, values in zip(loss.measures[1:], measures[1:], strict=True)
                if isinstance(loss, PreferenceLoss)
            },
            tokens_by_source={name: int(count) for name, count in zip(names, tokens, strict=True) if count},
            weight_by_source={n: w / sum(weights) for n, w, t in zip(names, weights, tokens, strict=True) if t} if weighs(phase) else None,
            trained_by_source={n: int(count) for n, count, t in zip(names, trained, tokens, strict=True) if t} if weighs(phase) else None,
            routed=routed,
        )

    def _references(self, batch: MicroBatch) -> np.ndarray | None:
        """Of the answers of a micro-batch, float32 [B, D]: NaN where there is none, 0 where nobody knows one yet."""
        if batch.pairs is None:
            return None
        found = np.full((*batch.pairs.shape, 2), np.nan, np.float32)
        for values, source, pairs in zip(found, batch.sources, batch.pairs, strict=True):
            there = pairs >= 0
            known = self.references.get(self.sources[source]) if source < len(self.sources) else None
            values[there] = 0.0 if known is None else known[pairs[there]]
        return found.reshape(len(found), -1)

    def _over_all_ranks(self, own: torch.Tensor, num_micro_batches: int) -> tuple[torch.Tensor, Routed | None]:
        """One exchange for everything, in float64, on the CPU."""
        tally = self.routing.tally(num_micro_batches) if self.routing else own.new_zeros(0)
        total = torch.cat([own.flatten(), tally])
        dist.all_reduce(total)
        total = total.cpu()
        return total[: own.numel()].view(own.shape), self.routing.routed(total[own.numel() :]) if self.routing else None


def fp8_warning(shadow: dict[str, float]) -> str | None:
    """What to tell the user where fp8 changes the loss by more than 1%, or makes it no number at all."""
    if shadow["difference"] <= 0.01:
        return None
    return (
        f"the loss is {shadow['loss_fp8']:.4f} in fp8 and {shadow['loss_bf16']:.4f} in bf16, {shadow['difference']:.1%} apart: "
        "train.precision bf16 is the safe choice"
    )


def _forward(
    loss: Loss,
    divisor: float,
    num_sources: int,
    references: Callable[[MicroBatch], np.ndarray | None],
    batches: Iterator[MicroBatch],
    gpt: torch.nn.Module,
) -> tuple[torch.Tensor, Any]:
    """What megatron-core's schedules call for a micro-batch: the output, and what makes the loss of it and its sums [3 + M, N]."""
    batch = next(batches)
    tokens, sources, documents, weights = map(_on_device, (batch.tokens, batch.sources, batch.documents, batch.weights))
    output = forward(gpt, tokens[:, :-1], tokens[:, 1:], documents, _outputs)

    def of(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nats_BL, log_z_BL = outputs.view(2, len(sources), -1)
        labels = Labels(nats_BL, log_z_BL, None if weights is None else this_part(weights))
        if (found := references(batch)) is not None:
            parts = parallel_state.get_context_parallel_group()
            labels = replace(
                labels,
                documents_BL=this_part(documents),
                references_BD=_on_device(found),
                sum_of_parts=partial(all_reduce, group=parts) if parts.size() > 1 else labels.sum_of_parts,
                num_parts=parts.size(),
            )
        value, sums_KB = loss.sums(labels, divisor)
        tokens_B = sums_KB.new_full((len(sources),), nats_BL.shape[1])
        trained_B = tokens_B if labels.weights_BL is None else (labels.weights_BL > 0).sum(1)
        sums_KB = torch.cat([torch.stack([tokens_B, trained_B.to(sums_KB)]), sums_KB])  # tokens, those with a weight, weight, measures
        # not index_add_, whose order on a GPU is another one each time; not a product, which takes a NaN over to other sources
        is_of_source_NB = sources == torch.arange(num_sources, device=sources.device)[:, None]
        return value, sums_KB[:, None].where(is_of_source_NB, 0.0).sum(2)

    return output, of


def _on_device(values: np.ndarray | None) -> Any:
    return None if values is None else torch.from_numpy(values).to(torch.cuda.current_device(), non_blocking=True)


def _outputs(*, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    """The last stage's output in the place of megatron-core's cross-entropy: [2, B, L]."""
    logits_SBV, _bias = output_layer(hidden_states, weight=output_weight)
    group = parallel_state.get_tensor_model_parallel_group()
    return cross_entropy_and_log_z(logits_SBV, labels.transpose(0, 1), group).transpose(1, 2)
