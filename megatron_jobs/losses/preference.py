"""Direct preference optimization: of two answers to a prompt, the chosen one against the rejected one, and both against a reference.

With log π the sum of an answer's log-probabilities, log π_ref that of the reference, and the rewards r = β (log π − log π_ref):

    dpo   −(1 − ε) log σ(r_chosen − r_rejected) − ε log σ(r_rejected − r_chosen)      Rafailov et al. 2023, equation 7; ε label_smoothing
    ipo   (h − 1 / 2β)², h the difference of log π − log π_ref, each a mean by token    Azar et al. 2023, equation 17, as TRL has it

and with `nll_weight` so many times −log π / tokens of the chosen answer (Pang et al. 2024, equation 1).

Shapes: B samples, L labels of a sample (of this rank's part of the sequence), D answers (documents), P = D / 2 pairs.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F

from megatron_jobs.config.phase import Preference
from megatron_jobs.data.feeder import MicroBatch
from megatron_jobs.losses.loss import Labels


class PreferenceLoss:
    """A mean over the pairs of the global batch. Rewards and log-probabilities are told for the two sides apart."""

    measures: ClassVar[tuple[str, ...]] = (
        *("loss", "reward_margin", "reward_accuracy", "chosen_reward", "rejected_reward"),
        *("chosen_log_probability", "rejected_log_probability"),
    )

    def __init__(self, section: Preference) -> None:
        self._section = section

    def weight(self, batch: MicroBatch) -> float:
        assert batch.pairs is not None
        return float((batch.pairs >= 0).sum())

    def sums(self, labels: Labels, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
        section, references_BD = self._section, labels.references_BD
        assert references_BD is not None
        log_BD, tokens_BD = log_probabilities(labels, references_BD.shape[1])
        there_BP = ~references_BD[:, ::2].isnan()
        gains_BD = log_BD - references_BD.nan_to_num()
        margins_BP = section.beta * (gains_BD[:, ::2] - gains_BD[:, 1::2])
        if section.form == "dpo":
            smoothing = section.label_smoothing
            losses_BP = -(1 - smoothing) * F.logsigmoid(margins_BP) - smoothing * F.logsigmoid(-margins_BP)
        else:
            by_token_BD = gains_BD / tokens_BD.clamp_min(1)
            losses_BP = (by_token_BD[:, ::2] - by_token_BD[:, 1::2] - 1 / (2 * section.beta)).square()
        if section.nll_weight:
            losses_BP = losses_BP - section.nll_weight * (log_BD / tokens_BD.clamp_min(1))[:, ::2]
        measured = [
            torch.ones_like(losses_BP),
            *(losses_BP, margins_BP, (margins_BP > 0).to(losses_BP.dtype)),
            *(section.beta * gains_BD[:, side::2] for side in (0, 1)),
            *(log_BD[:, side::2] for side in (0, 1)),
        ]
        sums = torch.stack([values_BP.where(there_BP, 0.0).sum(1) for values_BP in measured]) / labels.num_parts
        return sums[1].sum() / divisor, sums.detach().double()


class LogProbabilities:
    """No loss, and nothing to learn: it looks at what each answer's log-probability is (`found_BD`, by micro-batch)."""

    measures: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self) -> None:
        self.found_BD: list[torch.Tensor] = []

    def weight(self, batch: MicroBatch) -> float:
        return float(batch.tokens.shape[0])

    def sums(self, labels: Labels, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
        assert labels.references_BD is not None
        self.found_BD.append(log_probabilities(labels, labels.references_BD.shape[1])[0])
        nothing_B = labels.nats_BL.new_zeros(len(labels.nats_BL))
        return nothing_B.sum(), torch.stack([nothing_B + 1, nothing_B]).double()


def log_probabilities(labels: Labels, num_documents: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the answers, each a sum over its tokens, and how many tokens these are: [B, D] both, D = `num_documents`."""
    assert labels.documents_BL is not None and labels.weights_BL is not None
    numbers_D = torch.arange(num_documents, device=labels.documents_BL.device)
    is_in_BDL = labels.documents_BL[:, None] == numbers_D[:, None]
    sums_BD, tokens_BD = (
        values_BL[:, None].where(is_in_BDL, 0.0).sum(2) for values_BL in (-labels.nats_BL * labels.weights_BL, labels.weights_BL)
    )
    both = labels.sum_of_parts(torch.stack([sums_BD, tokens_BD]))
    return both[0], both[1]
