"""The model: megatron-core's GPTModel for a configuration, with the best layers that this machine has.

Transformer Engine's layers where it is installed on a GPU; else megatron-core's local ones with an attention of ours
(`attention.FusedAttention`) and a norm that knows sequence parallelism (`Norm`). Weights are left empty: `placement.fill` fills them.

Shapes: B micro-batch, W whole sequence, S a context-parallel rank's part of it, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_jobs.config import ParallelConfig
from megatron_jobs.config.model import ModelConfig, MoEConfig
from megatron_jobs.config.phase import Phase
from megatron_jobs.engine import attention, core
from megatron_jobs.planning.layers import has_transformer_engine
from moe.experts import GroupedExperts
from moe.router import Router

Recompute = Literal["none", "attention", "layers"]


def build(
    model: ModelConfig,
    moe: MoEConfig | None,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    sequence_length: int,
    *,
    chunk: int = 0,
    recompute: Recompute = "none",
    fp8: bool = False,
) -> GPTModel:
    """This rank's part of the model, on this rank's device, weights empty. `sequence_length` is the longest in tokens.

    With virtual pipeline stages a rank has several parts, and `chunk` says which of them this is.
    """
    config = transformer_config(model, moe, parallel, dtype, recompute, fp8)
    vp_stage = chunk if parallel.virtual_pipeline > 1 else None
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(config, moe, vp_stage),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    core.set_rotary_frequencies(gpt, rotary_frequencies(model))
    if gpt.post_process:
        gpt.output_layer.register_forward_hook(partial(_without_padding, model.vocab_size))
    if config.num_query_groups > model.num_query_groups:  # those that `fill` knows nothing of
        for parameter in gpt.parameters():
            parameter.detach().zero_()
    return gpt.to(_device())


def forward(
    gpt: torch.nn.Module,
    tokens_BW: torch.Tensor,
    labels_BW: torch.Tensor | None = None,
    documents_BW: torch.Tensor | None = None,
    output_processor: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """One micro-batch through this rank's part of the model.

    The last pipeline stage returns what `output_processor` makes of its part of the sequence, else the loss of each label [B, S] (nats),
    or without labels the logits [B, S, V / tensor]; the others return what the next stage takes. `documents_BW` (the number of each
    position's document) keeps attention within documents; with Transformer Engine the B sequences then lie in one row.
    """
    shape_BW, packed = tokens_BW.shape, None
    tokens = attention.this_part(tokens_BW)
    labels = None if labels_BW is None else attention.this_part(labels_BW)
    if documents_BW is not None and has_transformer_engine():
        packed, documents_BW = attention.packed(documents_BW), None
        tokens = tokens.reshape(1, -1)
        labels = None if labels is None else labels.reshape(1, -1)
    output = core.forward(gpt, tokens, labels, documents_BW, packed, output_processor)
    return output if packed is None or output.shape[0] != 1 else output.view(shape_BW[0], -1, *output.shape[2:])


def message_shape(phase: Phase, micro_batch_size: int) -> dict[str, int]:
    """Sequence length and micro-batch size of what pipeline stages exchange, as megatron-core's schedules want them."""
    if phase.keeps_apart and has_transformer_engine():  # one row: see `forward`
        return dict(seq_length=phase.sequence_length * micro_batch_size, micro_batch_size=1)
    return dict(seq_length=phase.sequence_length, micro_batch_size=micro_batch_size)


@contextlib.contextmanager
def without_fp8(gpt: torch.nn.Module) -> Iterator[None]:
    """Within it a model that was built for fp8 computes in bf16 (and may be given no backward pass)."""
    configs = {id(config): config for module in gpt.modules() if (config := getattr(module, "config", None)) is not None}.values()
    before = [config.fp8 for config in configs]
    for config in configs:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in zip(configs, before, strict=True):
            config.fp8 = fp8


def _without_padding(vocab_size: int, layer: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, None]) -> None:
    """Takes the rows that pad the vocabulary out of the softmax, so that the loss is the one of the exported model."""
    logits_SBV, _ = outputs
    mine = logits_SBV.shape[-1]
    first_padding = max(0, vocab_size - parallel_state.get_tensor_model_parallel_rank() * mine)
    if first_padding < mine:
        with torch.no_grad():  # the softmax gives them no gradient, and autograd would copy that of all others
            logits_SBV[..., first_padding:] = -torch.inf


def transformer_config(
    model: ModelConfig,
    moe: MoEConfig | None,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    fp8: bool = False,
) -> TransformerConfig:
    split = model.split_over(parallel.tensor)
    options: dict[str, Any] = {}
    if moe is not None:
        options |= dict(
            num_moe_experts=moe.num_experts,
            moe_router_topk=moe.top_k,
            moe_router_pre_softmax=moe.scores == "softmax_topk",
            moe_router_score_function="sigmoid" if moe.scores == "sigmoid" else "softmax",
            moe_router_load_balancing_type="none" if moe.balancing == "bias" else moe.balancing,
            moe_router_enable_expert_bias=moe.balancing == "bias",
            moe_router_dtype="fp32",
            moe_expert_capacity_factor=moe.capacity_factor,
            # gloo cannot gather parts of unequal size, which the all-to-all dispatcher does over the expert-tensor ranks
            moe_token_dispatcher_type=moe.dispatcher if torch.cuda.is_available() or parallel.expert_tensor == 1 else "allgather",
            moe_grouped_gemm=has_transformer_engine(),
            moe_ffn_hidden_size=moe.expert_width(model),
            moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size or None,
            moe_layer_freq=moe.every,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
        )
    if parallel.virtual_pipeline > 1:
        # With the default, batched exchange, megatron-core 0.19 trains silently wrong at pipeline 2.
        options |= dict(virtual_pipeline_model_parallel_size=parallel.virtual_pipeline, overlap_p2p_comm=True, batch_p2p_comm=False)
    if recompute == "attention":
        options |= dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    elif recompute == "layers":
        options |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if fp8:  # scaled by each tensor's own maximum: no history, which a checkpoint would have to keep
        options |= dict(fp8="hybrid", fp8_recipe="tensorwise")
        if moe is not None:
            options |= dict(moe_router_padding_for_quantization=True)  # fp8 products want rows in multiples of 16
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=split.num_attention_heads,
        num_query_groups=split.num_query_groups,
        kv_channels=model.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.tensor > 1,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        bias_activation_fusion=True,  # on a CPU with the function of `cpu_speed.py`
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **options,
    )


def rotary_frequencies(model: ModelConfig) -> torch.Tensor:
    """Radians a token of each pair of a head's values, [head size / 2], after Llama 3.1 where `rope_scaling` is set.

    Wavelengths of more than original_length / low_freq_factor tokens are stretched by `factor`, those of less than original_length /
    high_freq_factor are left, and between the two the share that is left grows linearly (megatron-core has fixed lengths and factors).
    """
    frequencies = 1.0 / model.rope_theta ** (torch.arange(0, model.head_size, 2, dtype=torch.float32) / model.head_size)
    if (scaling := model.rope_scaling) is None:
        return frequencies
    turns = frequencies * scaling.original_length / (2 * torch.pi)  # within original_length tokens
    left = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return frequencies * (left + (1 - left) / scaling.factor)


class Norm(torch.nn.RMSNorm):
    """RMSNorm whose weight tells megatron-core to sum its gradient over the sequence-parallel ranks."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # torch's stubs know a parameter without megatron-core's marks
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _layer_spec(config: TransformerConfig, moe: MoEConfig | None, vp_stage: int | None) -> TransformerBlockSubmodules:
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=has_transformer_engine(), normalization="RMSNorm", vp_stage=vp_stage)
    if moe is not None:
        router = partial(Router, normalize_logits=moe.normalize_logits, part_of_sequence=attention.part_of_sequence)
        core.replace_router(block, router, None if has_transformer_engine() else GroupedExperts)
    if not has_transformer_engine():
        core.replace_attention_and_norms(block, attention.FusedAttention, Norm, config.qk_layernorm)
    return block


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
