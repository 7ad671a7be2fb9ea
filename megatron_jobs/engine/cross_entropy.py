"""Cross-entropy and log Z of the output's softmax in one pass, with the vocabulary cut over the tensor-parallel ranks.

Shapes: S sequence, B micro-batch, V this rank's part of the vocabulary; the leading 2 is (cross-entropy, log Z).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_jobs.config import SOFTMAX_AT_ONCE


def cross_entropy_and_log_z(logits_SBV: torch.Tensor, labels_SB: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Nats of each token and log Z of its distribution, float32 of shape [2, S, B]; labels count over the whole vocabulary.

    Keeps no softmax: the backward pass takes it from the logits and from log Z, and overwrites them. Logits of −inf stay out of Z.
    """
    return _CrossEntropyAndLogZ.apply(logits_SBV, labels_SB, group)


class _CrossEntropyAndLogZ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_SBV: torch.Tensor, labels_SB: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        width = logits_SBV.shape[-1]
        places_SB = labels_SB - group.rank() * width
        is_here_SB = (places_SB >= 0) & (places_SB < width)
        places_SB1 = places_SB.clamp(0, width - 1)[..., None]

        highest_SB = logits_SBV.amax(-1).float()
        dist.all_reduce(highest_SB, dist.ReduceOp.MAX, group)
        label_SB = (logits_SBV.gather(-1, places_SB1)[..., 0] - highest_SB).where(is_here_SB, 0.0)
        both_2SB = torch.stack([label_SB, _sum_of_exp(logits_SBV, highest_SB)])
        dist.all_reduce(both_2SB, group=group)
        label_SB, log_sum_SB = both_2SB[0], both_2SB[1].log()

        log_z_SB = log_sum_SB + highest_SB
        ctx.save_for_backward(logits_SBV, log_z_SB, places_SB1, is_here_SB)
        return torch.stack([log_sum_SB - label_SB, log_z_SB])

    @staticmethod
    def backward(ctx: Any, gradient_2SB: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # d log Z / d logits = softmax, and cross-entropy = log Z − the label's logit
        logits_SBV, log_z_SB, places_SB1, is_here_SB = ctx.saved_tensors
        of_labels_SB1 = -(gradient_2SB[0] * is_here_SB)[..., None]
        for part in _parts(logits_SBV):  # the gradient takes the place of the logits, which nobody reads again
            values = _exp_of_difference(logits_SBV[part], log_z_SB[part]).mul_(gradient_2SB[:, part].sum(0)[..., None])
            logits_SBV[part] = values.scatter_add_(-1, places_SB1[part], of_labels_SB1[part])
        return logits_SBV, None, None


def _sum_of_exp(logits_SBV: torch.Tensor, offset_SB: torch.Tensor) -> torch.Tensor:
    return torch.cat([_exp_of_difference(logits_SBV[part], offset_SB[part]).sum(-1) for part in _parts(logits_SBV)])


def _exp_of_difference(logits_SBV: torch.Tensor, offset_SB: torch.Tensor) -> torch.Tensor:
    return torch.sub(logits_SBV, offset_SB[..., None]).exp_()  # float32, in one piece of memory, also for bf16 logits


def _parts(logits_SBV: torch.Tensor) -> Iterator[slice]:
    step = max(1, SOFTMAX_AT_ONCE[logits_SBV.device.type] // logits_SBV[0].numel())
    return (slice(first, first + step) for first in range(0, len(logits_SBV), step))
