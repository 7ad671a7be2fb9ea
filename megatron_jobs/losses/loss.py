"""The protocol of a loss: what it measures of a sample, and how that adds up.

A loss is a sum over the labels of a global batch divided by the weight of that batch, whoever computes which part of it: no micro-batch
takes a mean of its own. So it is the same at every layout, micro-batch size and packing, with any weights.

Shapes: B samples, L labels of a sample (of this rank's part of the sequence), D documents that are answers, P = D / 2 pairs, M measures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from megatron_jobs.data.feeder import MicroBatch


@dataclass(frozen=True)
class Labels:
    """What the last pipeline stage knows of the labels of a micro-batch."""

    nats_BL: torch.Tensor  # cross-entropy
    log_z_BL: torch.Tensor  # of the softmax over the vocabulary
    weights_BL: torch.Tensor | None  # None: 1 each
    documents_BL: torch.Tensor | None = None
    references_BD: torch.Tensor | None = None  # of pairs: what the reference gives each answer, log-probabilities; NaN where there is none
    sum_of_parts: Callable[[torch.Tensor], torch.Tensor] = lambda values: values  # over the ranks that share the sequences
    num_parts: int = 1  # these ranks: what each of them adds to the loss is a share


class Loss(Protocol):
    """`measures` are the names under which the run tells what was measured; the first is the one whose curve is the run's."""

    measures: ClassVar[tuple[str, ...]]

    def weight(self, batch: MicroBatch) -> float:
        """Of the whole micro-batch, in the unit that the loss is a mean over (tokens, pairs, …)."""
        ...

    def sums(self, labels: Labels, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What the micro-batch adds to the loss: a sum over `divisor`, with its gradient; and [1 + M, B] in float64, without one:
        the weight of each sample, and the sum of each measure, whose mean over the weights is what is told.
        """
        ...
