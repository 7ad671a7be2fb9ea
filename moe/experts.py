"""The experts of a layer as two stacked weights and two grouped matrix products, where Transformer Engine is not there to do it.

Shapes: E experts here, H hidden, F this rank's part of the FFN's width, T tokens routed to the experts here, sorted by expert; R rows and C
columns of an expert's matrix.
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
        self.gate_up = GroupedLinear(num_local_experts, 2 * width, config.hidden_size, 0, config.params_dtype)
        self.down = GroupedLinear(num_local_experts, config.hidden_size, width, 1, config.params_dtype)

    def forward(self, tokens_TH: torch.Tensor, tokens_per_expert: torch.Tensor, probs_T: torch.Tensor) -> tuple[torch.Tensor, None]:
        ends_E = tokens_per_expert.to(tokens_TH.device).cumsum(0, dtype=torch.int32)
        gate_up_TF = self.gate_up(tokens_TH, ends_E)
        if tokens_TH.is_cuda:
            out_TF = weighted_bias_swiglu_impl(gate_up_TF, None, probs_T.unsqueeze(-1))
        else:
            gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
            out_TF = (F.silu(gate_TF) * up_TF * probs_T.unsqueeze(-1)).to(tokens_TH.dtype)
        return self.down(out_TF, ends_E), None


class GroupedLinear(torch.nn.Module):
    """A matrix [rows, columns] of each expert, one below the other in one weight; each takes its own tokens."""

    def __init__(self, num_experts: int, rows: int, columns: int, split: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = torch.nn.Parameter(torch.empty(num_experts * rows, columns, dtype=dtype))
        # What megatron-core's own expert linears say of their weights: their gradients are summed in the experts' groups.
        self.weight.allreduce = False  # type: ignore[attr-defined]  # a mark that torch's stubs do not know
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=split, stride=1)

    def forward(self, tokens_TC: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """The tokens of expert e are those from `ends_E[e - 1]` up to `ends_E[e]`."""
        weight_ERC = self.weight.view(self.num_experts, -1, self.weight.shape[1])
        return F.grouped_mm(tokens_TC, weight_ERC.transpose(1, 2), offs=ends_E)
