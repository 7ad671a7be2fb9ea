"""The model: megatron-core's GPTModel for a configuration, with the best layers that this machine has.

Transformer Engine's layers where it is installed on a GPU; else megatron-core's local ones with torch's fused attention
(`FusedAttention`) and a norm that knows sequence parallelism (`Norm`). Weights are left empty: `layout.fill` fills them.

Shapes: S sequence, B micro-batch, N attention heads, G query groups, H head size; megatron-core puts the sequence first.
"""

import importlib.util
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_jobs.config import ModelConfig, MoEConfig, ParallelConfig


def build(model: ModelConfig, moe: MoEConfig | None, parallel: ParallelConfig, dtype: torch.dtype, sequence_length: int) -> GPTModel:
    """This rank's part of the model, on this rank's device, weights empty. `sequence_length` is the longest in tokens."""
    config = transformer_config(model, moe, parallel, dtype)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(config),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
    )
    if gpt.post_process:
        gpt.output_layer.register_forward_hook(partial(_without_padding, model.vocab_size))
    return gpt.to(_device())


def _without_padding(vocab_size: int, layer: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, None]) -> None:
    """Takes the rows that pad the vocabulary out of the softmax, so that the loss is the one of the exported model."""
    logits_SBV, _ = outputs
    mine = logits_SBV.shape[-1]
    first_padding = max(0, vocab_size - parallel_state.get_tensor_model_parallel_rank() * mine)
    if first_padding < mine:
        logits_SBV[..., first_padding:] = -torch.inf


def transformer_config(model: ModelConfig, moe: MoEConfig | None, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    mixture: dict[str, Any] = {}
    if moe is not None:
        mixture = dict(
            num_moe_experts=moe.num_experts,
            moe_router_topk=moe.top_k,
            moe_router_pre_softmax=False,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=moe.load_balancing_loss,
            moe_z_loss_coeff=moe.router_z_loss,
            moe_router_dtype="fp32",
            moe_token_dispatcher_type="alltoall",
            moe_grouped_gemm=has_transformer_engine(),
            moe_ffn_hidden_size=model.ffn_hidden_size,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
        )
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.tensor > 1,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        bias_activation_fusion=torch.cuda.is_available(),
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **mixture,
    )


class Norm(torch.nn.RMSNorm):
    """RMSNorm whose weight tells megatron-core to sum its gradient over the sequence-parallel ranks."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class FusedAttention(torch.nn.Module):
    """Causal attention through torch's scaled_dot_product_attention, in the place of megatron-core's unfused one."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()

    def forward(self, q_SBNH: torch.Tensor, k_SBGH: torch.Tensor, v_SBGH: torch.Tensor, attention_mask: None, **_: Any) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBNH, k_SBGH, v_SBGH))
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out_BNSH = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out_BNSH.permute(2, 0, 1, 3).flatten(2)


def _layer_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=has_transformer_engine(), normalization="RMSNorm")
    if not has_transformer_engine():
        block.layer_norm = Norm
        for layer in block.layer_specs:
            layer.submodules.input_layernorm = Norm
            layer.submodules.pre_mlp_layernorm = Norm
            layer.submodules.self_attention.submodules.core_attention = ModuleSpec(FusedAttention)
    return block


def has_transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
