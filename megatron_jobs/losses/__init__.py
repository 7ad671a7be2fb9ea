"""What a phase may minimise, one file a loss. Torch, no megatron-core."""

from megatron_jobs.config.phase import Answers, NextToken, Preference
from megatron_jobs.losses.loss import Loss
from megatron_jobs.losses.next_token import NextTokenLoss
from megatron_jobs.losses.preference import PreferenceLoss


def of(section: NextToken | Answers | Preference) -> Loss:
    """The loss that the section `loss` of a phase asks for; answers differ from next_token in the weights of their tokens."""
    if isinstance(section, Preference):
        return PreferenceLoss(section)
    return NextTokenLoss(section.z_loss if isinstance(section, NextToken) else 0.0)
