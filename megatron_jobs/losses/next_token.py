"""The cross-entropy of each token with the text before it, and the square of log Z as PaLM's z-loss (Chowdhery et al. 2022, section 5)."""

from typing import ClassVar

import torch

from megatron_jobs.data.feeder import MicroBatch
from megatron_jobs.losses.loss import Labels


class NextTokenLoss:
    """Nats a token, a mean over the weights of the tokens."""

    measures: ClassVar[tuple[str, ...]] = ("loss", "z_loss")

    def __init__(self, z_loss: float) -> None:
        """`z_loss` is the coefficient of the mean square of log Z."""
        self._z_loss = z_loss

    def weight(self, batch: MicroBatch) -> float:
        return batch.num_labels if batch.weights is None else float(batch.weights.sum(dtype="float64"))

    def sums(self, labels: Labels, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
        def weighed(values_BL: torch.Tensor) -> torch.Tensor:
            return values_BL if labels.weights_BL is None else values_BL * labels.weights_BL

        nats_BL, squares_BL = weighed(labels.nats_BL), weighed(labels.log_z_BL.square())
        loss = nats_BL.sum() / divisor
        if self._z_loss:
            loss = loss + self._z_loss * (squares_BL.sum() / divisor)
        measured_3BL = torch.stack([weighed(torch.ones_like(nats_BL)), nats_BL, squares_BL])
        return loss, measured_3BL.detach().double().sum(2)
