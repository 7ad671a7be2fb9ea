"""The router of a layer: megatron-core's, and what that one does not do.

Tanuki's normalised logits; a capacity and a balance over the global batch that mean the same at every layout; and a tally for the
statistics of `statistics.py`.

Shapes: T tokens of a micro-batch on this rank, S positions (this rank's part of the sequence) × B sequences; E experts; C the capacity.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss, get_capacity
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


class Router(TopKRouter):
    """Takes the place of megatron-core's router in the layers."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        normalize_logits: bool,
        part_of_sequence: Callable[[int, int, int], torch.Tensor],
        **kwargs: Any,
    ) -> None:
        """`part_of_sequence`: the positions that a context-parallel rank holds, of (length, rank, size); see `engine/attention.py`."""
        # megatron-core's router drops what is too much of a rank's tokens, and so more or less with tensor or context parallelism;
        # this one does it for a whole micro-batch. The dispatcher still learns from its configuration that tokens may be missing.
        without_capacity = copy.copy(config)
        without_capacity.moe_expert_capacity_factor = None
        super().__init__(without_capacity, *args, **kwargs)
        self.capacity_factor = config.moe_expert_capacity_factor
        self.frozen_expert_bias = True  # for megatron-core, which moves it in the pass, with an exchange of its own; see `move_bias`
        self.normalize_logits, self.part_of_sequence = normalize_logits, part_of_sequence
        # the share of each expert in the tokens of the step before, for `global_aux_loss`; who trains keeps it up to date
        even_E = torch.full((self.num_experts,), 1 / self.num_experts, device=torch.cuda.current_device())
        self.register_buffer("load_E", even_E, persistent=False)
        # of the step so far, on this rank: how often each expert was chosen, how often kept, and the sum of its scores
        self.register_buffer("tally_3E", torch.zeros(3, self.num_experts, device=torch.cuda.current_device()), persistent=False)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        logits = super().gating(input)
        if not self.normalize_logits:
            return logits
        variance, mean = torch.var_mean(logits, -1, keepdim=True)
        # equal logits have no deviation, whose gradient would be infinite
        return (logits - mean) / (variance.clamp_min(1e-12).sqrt() + 1e-5)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of the experts for each token, and whether it goes to them, both [T, E]."""
        weights_TE, is_chosen_TE = super().routing(logits, padding_mask)
        is_kept_TE = is_chosen_TE
        if self.capacity_factor is not None:
            is_kept_TE = is_chosen_TE & self._fits(weights_TE.detach(), logits.shape[1])
            weights_TE = weights_TE * is_kept_TE
        if torch.is_grad_enabled():  # once where activations are recomputed, never in validation
            with torch.no_grad():
                _, scores_TE = compute_routing_scores_for_aux_loss(logits.view(-1, self.num_experts), self.topk, self.score_function)
                self.tally_3E += torch.stack([is_chosen_TE.sum(0), is_kept_TE.sum(0), scores_TE.sum(0)])
        return weights_TE, is_kept_TE

    def _fits(self, weights_TE: torch.Tensor, B: int) -> torch.Tensor:
        """Which tokens are among the C with the largest weights for an expert, in the whole micro-batch.

        Of equal weights, which equal tokens have, those that stand first, whatever rank holds them.
        """
        group = self.tp_cp_group
        whole = weights_TE.new_empty(group.size() * len(weights_TE), self.num_experts)
        dist.all_gather_into_tensor(whole, weights_TE.contiguous(), group=group)
        C = min(get_capacity(len(whole) * self.topk, self.num_experts, self.capacity_factor), len(whole))
        rows_T = self._rows_by_place(len(whole) // B, B).to(whole.device)
        first_CE = rows_T[whole[rows_T].sort(dim=0, descending=True, stable=True).indices[:C]]
        fits = torch.zeros_like(whole, dtype=torch.bool).scatter_(0, first_CE, True)
        return fits.chunk(group.size())[group.rank()]

    def _rows_by_place(self, length: int, B: int) -> torch.Tensor:
        """Where in the ranks' tokens, one rank's after the other's, those of the micro-batch stand: sequence by sequence, by position."""
        size = self.cp_group.size()  # a rank's sequence-parallel ranks, which follow one another, divide its part from front to back
        positions_S = torch.cat([self.part_of_sequence(length, rank, size) for rank in range(size)])
        return (positions_S.argsort() * B + torch.arange(B)[:, None]).flatten()

    def _apply_global_aux_loss(
        self, probs: torch.Tensor, scores_for_aux_loss: torch.Tensor, routing_map: torch.Tensor, with_padding_mask: bool = False
    ) -> torch.Tensor:
        """E Σ f P over the experts (Qiu et al. 2025, arXiv 2501.11873), with the shares f of the global batch of the step before.

        megatron-core takes those of the micro-batches of this step so far: they depend on the layout, and in each layer all ranks wait.
        """
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        if not coefficient:
            return probs
        loss = coefficient * self.num_experts * (self.load_E * scores_for_aux_loss.mean(0)).sum() / self.tp_cp_group.size()
        return self.attach_and_log_load_balancing_loss(probs, coefficient, loss, "load_balancing_loss", self.tp_cp_group)

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Not megatron-core's count of tokens, which is in the tally."""

    def minimise(self, load_balancing_loss: float, z_loss: float) -> None:
        """The coefficients of the losses from now on; 0: none."""
        self.config.moe_aux_loss_coeff, self.config.moe_z_loss_coeff = load_balancing_loss, z_loss or None

    def move_bias(self, load_E: torch.Tensor, rate: float) -> None:
        """Up by the rate where an expert got less than the mean of the global batch, down where it got more (DeepSeek-V3)."""
        if self.enable_expert_bias:
            self.expert_bias += rate * (load_E.mean() - load_E).sign().to(self.expert_bias)
