"""What a phase may minimise, one file a loss. Torch, no megatron-core."""

from megatron_jobs.config.phase import NextToken
from megatron_jobs.losses.loss import Loss
from megatron_jobs.losses.next_token import NextTokenLoss


def of(section: NextToken) -> Loss:
    """The loss that the section `loss` of a phase asks for."""
    return NextTokenLoss(section)
