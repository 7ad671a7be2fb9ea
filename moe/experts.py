"""The experts of a layer as two stacked weights and two grouped matrix products, where Transformer Engine is not there to do it.

Shapes: E experts here, H hidden, F this rank's part of the FFN's width, T tokens routed to the experts here, sorted by expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class GroupedExperts(MegatronModule):
    """Takes the place of megatron-core's SequentialMLP: one product for all experts instead of one after the other."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection, **_: Any) -> None:
        super().__init__(config=config)
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.num_local_experts = num_local_experts
        self.gate_up = self._weight(num_local_experts * 2 * width, config.hidden_size, split=0)
        self.down = self._weight(num_local_experts * config.hidden_size, width, split=1)

    def _weight(self, rows: int, columns: int, split: int) -> torch.nn.Parameter:
        weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=self.config.params_dtype))
        # What megatron-core's own expert linears say of their weights: their gradients are summed in the experts' groups.
        weight.allreduce = False  # type: ignore[attr-defined]  # a mark that torch's stubs do not know
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=split, stride=1)
        return weight

    def forward(self, tokens_TH: torch.Tensor, tokens_per_expert: torch.Tensor, probs_T: torch.Tensor) -> tuple[torch.Tensor, None]:
        ends_E = tokens_per_expert.to(tokens_TH.device).cumsum(0, dtype=torch.int32)
        gate_up_EFH, down_EHF = (weight.view(self.num_local_experts, -1, weight.shape[1]) for weight in (self.gate_up, self.down))
        gate_up_TF = F.grouped_mm(tokens_TH, gate_up_EFH.transpose(1, 2), offs=ends_E)
        if tokens_TH.is_cuda:
            out_TF = weighted_bias_swiglu_impl(gate_up_TF, None, probs_T.unsqueeze(-1))
        else:
            gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
            out_TF = (F.silu(gate_TF) * up_TF * probs_T.unsqueeze(-1)).to(tokens_TH.dtype)
        return F.grouped_mm(out_TF, down_EHF.transpose(1, 2), offs=ends_E), None
