"""The fence: what of megatron-core is private, or young enough to change, is touched here, behind words of ours.

What cannot be put behind words stays beside it: the stand-ins of `cpu.py` and `cpu_speed.py`, which take the places of functions by
name, and `moe/router.py`, a subclass that overrides two private methods. tests/megatron_jobs/engine/test_core.py lists every name that
these files rely on, with its parameters and what to do when it is another: an upgrade of megatron-core then fails with one table.

Shapes: B micro-batch, S sequence (this rank's part of it), H hidden, V this rank's part of the vocabulary; megatron-core puts S first.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

# --- the optimizer ---


class OwnedRange(NamedTuple):
    """The flat values of a parameter from `start` on, as many as `main` has, are this rank's to update."""

    parameter: torch.nn.Parameter
    start: int
    main: torch.Tensor  # float32, of one dimension
    state: dict[str, torch.Tensor]  # of AdamW for `main`


def _distributed(optimizer: ChainedOptimizer) -> list[DistributedOptimizer]:
    """One for the dense parameters, one for the experts, who have another data-parallel group; none of what is not trained."""
    return [distributed for distributed in optimizer.chained_optimizers if not distributed.is_stub_optimizer]


def set_up_adamw(optimizer: ChainedOptimizer, weight_decay: float) -> None:
    for distributed in _distributed(optimizer):
        for group in distributed.optimizer.param_groups:
            # megatron-core leaves this to its scheduler, and until then decays the norms as well
            group["weight_decay"] = weight_decay * group["wd_mult"]
            if isinstance(distributed.optimizer, torch.optim.AdamW):
                group["fused"] = True  # one pass over the memory instead of a dozen


def owned_ranges(optimizer: ChainedOptimizer) -> Iterator[OwnedRange]:
    for distributed in _distributed(optimizer):
        for parameter in distributed.model_param_gbuf_map:
            owned = distributed._get_model_param_range_map(parameter)["param"]
            main = distributed._get_main_param_and_optimizer_states(parameter)["param"]
            yield OwnedRange(parameter, owned.start, main, distributed.optimizer.state[main])


def write_back(optimizer: ChainedOptimizer, chunks: Iterable[DistributedDataParallel]) -> None:
    """Takes the float32 weights over into the model, in its type, those that other ranks own included."""
    for distributed in _distributed(optimizer):
        distributed._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def set_updates(optimizer: ChainedOptimizer, updates: int) -> None:
    """How many updates the optimizer has made, for the correction of AdamW's moments."""
    for distributed in _distributed(optimizer):
        inner = distributed.optimizer
        if isinstance(inner, torch.optim.AdamW):
            for main, values in inner.state.items():
                values["step"] = torch.tensor(float(updates), device=main.device)
        else:  # Transformer Engine's FusedAdam counts per group
            for group in inner.param_groups:
                group["step"] = updates


def update(optimizer: ChainedOptimizer, learning_rate: float, clip_grad: float, norm: float) -> None:
    """One update with gradients that `prepare_grads` has made ready, clipped where their `norm` is more than `clip_grad`."""
    for distributed in _distributed(optimizer):
        for group in distributed.optimizer.param_groups:
            group["lr"] = learning_rate
        clip_grad_by_total_norm_fp32(distributed.get_parameters(), clip_grad, norm)
    for distributed in _distributed(optimizer):
        distributed.step_with_ready_grads()


# --- the layers ---


def replace_router(block: TransformerBlockSubmodules, router: Callable[..., Any], experts: Callable[..., Any] | None) -> None:
    """Gives every mixture among the layers this router, and these experts where they are not None."""
    for layer in block.layer_specs:
        mlp = layer.submodules.mlp.keywords["submodules"]
        if hasattr(mlp, "experts"):
            mlp.router = router
            mlp.experts = experts or mlp.experts


def replace_attention_and_norms(block: TransformerBlockSubmodules, attention: type, norm: type, qk_norm: bool) -> None:
    """Gives every layer this attention, and these norms in the places where megatron-core's local layers have theirs."""
    block.layer_norm = norm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = norm
        layer.submodules.pre_mlp_layernorm = norm
        own = layer.submodules.self_attention.submodules
        own.core_attention = ModuleSpec(attention)
        if qk_norm:
            own.q_layernorm = own.k_layernorm = norm


def router_losses() -> dict[str, torch.Tensor]:
    """Clears and returns what the routers of this process have added up over its layers: "load_balancing_loss" and "z_loss", if any."""
    tracked = get_moe_metrics_tracker()
    losses = {name: entry.values.sum() for name, entry in tracked.metrics.items()}
    tracked.clear()
    return losses


# --- the model ---


def set_rotary_frequencies(gpt: GPTModel, frequencies: torch.Tensor) -> None:
    """Radians a token, [head size / 2]."""
    gpt.rotary_pos_emb.inv_freq = frequencies.to(gpt.rotary_pos_emb.inv_freq.device)


def forward(
    gpt: torch.nn.Module,
    tokens_BS: torch.Tensor,
    labels_BS: torch.Tensor | None,
    documents_BW: torch.Tensor | None,
    packed: PackedSeqParams | None,
    output_processor: Callable[..., torch.Tensor] | None,
) -> torch.Tensor:
    """GPTModel's forward pass.

    `documents_BW`, over the whole sequence W, goes where megatron-core has a mask: it hands that down to the attention as it is
    (`attention.FusedAttention`). Positions are not looked at: rotary embeddings go by the place in the sequence.
    """
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand(tokens_BS.shape)
    return gpt(tokens_BS, positions_BS, documents_BW, labels=labels_BS, packed_seq_params=packed, output_processor=output_processor)


def embed(gpt: GPTModel, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into the first layer, of a model in one process: the hidden states [S, B, H], and the rotary embedding."""
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand(tokens_BS.shape)
    return gpt.embedding(tokens_BS, positions_BS), gpt.rotary_pos_emb(tokens_BS.shape[1])


def layer_forward(gpt: GPTModel, number: int, hidden_SBH: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """The hidden states [S, B, H] after the layer `number`, counted in this process, without a mask but the causal one."""
    hidden_SBH, _ = gpt.decoder.layers[number](hidden_states=hidden_SBH, attention_mask=None, rotary_pos_emb=rotary)
    return hidden_SBH


def unembed(gpt: GPTModel, hidden_SBH: torch.Tensor) -> torch.Tensor:
    """The logits [S, B, V] of what the last layer gave."""
    tied = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
    logits_SBV, _ = gpt.output_layer(gpt.decoder.final_layernorm(hidden_SBH), weight=tied)
    return logits_SBV
