"""Where the parameters of this rank lie in the whole model.

The whole model is a set of named matrices (Hugging Face's shapes: query, key and value apart, gate and up apart, experts
counted over all ranks); a vector is a matrix of one column. A rank holds boxes of them. Checkpoints, initial weights,
upcycling and conversion all speak of (name, box), so none of them knows about TP, PP, EP or DP.

    embedding                                  [vocabulary, hidden]      output (unless tied)  [vocabulary, hidden]
    layers.3.attention_norm, layers.3.ffn_norm, final_norm               [hidden, 1]
    layers.3.query, .key, .value               [heads × head size, hidden]
    layers.3.query_bias, .key_bias, .value_bias [heads × head size, 1]   layers.3.query_norm, .key_norm [head size, 1]
    layers.3.attention_out                     [hidden, heads × head size]
    layers.3.gate, .up                         [ffn, hidden]             layers.3.down         [hidden, ffn]
    layers.3.router                            [experts, hidden]         layers.3.experts.5.gate, .up, .down; layers.3.shared.gate …
    layers.3.router_bias                       [experts, 1]              of `moe.balancing: bias`: no gradient moves it
    layers.3.query.lora_a                      [rank, columns]           of an adapter: `config/adapter.py`
    layers.3.query.lora_b                      [rows, rank]
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_jobs.config.model import ModelConfig, MoEConfig
from mujina.matrices import Box, TensorSource


class Part(NamedTuple):
    """Rows `local_row` … of a parameter, from its first column on, are the box of the named matrix.

    What no part covers belongs to groups of heads that are there for tensor parallelism alone (`ModelConfig.split_over`).
    """

    name: str
    local_row: int
    box: Box

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """This part of a parameter, a view, shape [box.rows, box.columns]."""
        return rows[self.local_row : self.local_row + self.box.rows, : self.box.columns]


@dataclass(frozen=True)
class LocalParameter:
    parameter: torch.Tensor  # a torch.nn.Parameter, but for a router's bias, which is a buffer
    parts: tuple[Part, ...]
    is_first_copy: bool  # False on the ranks that hold a further copy of what another rank of the model-parallel group saves

    @property
    def columns(self) -> int:
        return self.parameter.shape[1] if self.parameter.dim() == 2 else 1


def local_parameters(gpt: GPTModel, model: ModelConfig, moe: MoEConfig | None) -> list[LocalParameter]:
    """Every parameter of this rank's part of the model, in the order of the modules, and the biases of the routers behind them."""
    return [*_parameters_of(gpt, model, moe), *_router_biases_of(gpt)]


def fill(parameters: Iterable[LocalParameter], source: TensorSource) -> None:
    """Gives every parameter the values that `source` has for it."""
    for local in parameters:
        rows = local.parameter.detach().view(-1, local.columns)
        for part in local.parts:
            part.of(rows).copy_(source.read(part.name, part.box))


# Parameter names of megatron-core's local layers, of GroupedExperts, which holds the experts of a rank in one parameter, and of
# Transformer Engine's layers, which fold a norm into the linear behind it.
_NAMES = [
    (r"embedding\.word_embeddings\.weight", "embedding"),
    (r"output_layer\.weight", "output"),
    (r"decoder\.final_layernorm\.weight", "final_norm"),
    (r"(input_layernorm\.|self_attention\.linear_qkv\.layer_norm_)weight", "attention_norm"),
    (r"(pre_mlp_layernorm\.|mlp\.linear_fc1\.layer_norm_)weight", "ffn_norm"),
    (r"self_attention\.linear_qkv\.weight", "query_key_value"),
    (r"self_attention\.linear_qkv\.bias", "query_key_value_bias"),
    (r"self_attention\.q_layernorm\.weight", "query_norm"),
    (r"self_attention\.k_layernorm\.weight", "key_norm"),
    (r"self_attention\.linear_proj\.weight", "attention_out"),
    (r"mlp\.(shared_experts\.)?linear_fc1\.weight", "gate_up"),
    (r"mlp\.(shared_experts\.)?linear_fc2\.weight", "down"),
    (r"mlp\.router\.weight", "router"),
    (r"mlp\.experts\.(gate_up\.weight|linear_fc1\.weight(?P<expert>\d+))", "gate_up"),
    (r"mlp\.experts\.(down\.weight|linear_fc2\.weight(?P<expert>\d+))", "down"),
]


def _parameters_of(gpt: GPTModel, model: ModelConfig, moe: MoEConfig | None) -> Iterator[LocalParameter]:
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in gpt.named_parameters():
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        prefixes = [f"layers.{gpt.decoder.layers[int(layer[1])].layer_number - 1}."] if layer else [""]
        own_name = name[layer.end() :] if layer else name
        if found := re.fullmatch(r"(.*)\.adapter\.(\w+)_(lora_[ab])", own_name):
            yield _of_adapter(parameter, moe, prefixes[0], *found.groups())
            continue
        role, expert = _role(own_name)
        if own_name.startswith("mlp.experts."):
            here = _experts_here(moe)
            prefixes = [f"{prefixes[0]}experts.{one}." for one in (here if expert is None else [here[expert]])]
            # all of an expert's matrices are cut; megatron-core marks them as cut by the other tensor parallelism
            is_cut, shard = True, parallel_state.get_expert_tensor_parallel_rank()
        else:
            if own_name.startswith("mlp.shared_experts."):
                prefixes = [prefixes[0] + "shared."]
            is_cut = getattr(parameter, "tensor_model_parallel", False)
            shard = tp_rank if is_cut else 0
        tied_copy = role == "output" and model.tie_embeddings
        parts = []
        for n, (prefix, rows) in enumerate(zip(prefixes, parameter.chunk(len(prefixes)), strict=True)):
            for part in _parts(prefix, "embedding" if tied_copy else role, rows, shard, model):
                parts.append(part._replace(local_row=part.local_row + n * len(rows)))
        yield LocalParameter(parameter, tuple(parts), is_first_copy=(is_cut or tp_rank == 0) and not (tied_copy and not gpt.pre_process))


def _of_adapter(parameter: torch.nn.Parameter, moe: MoEConfig | None, prefix: str, linear: str, matrix: str, suffix: str) -> LocalParameter:
    """A or B of an adapter, whole on every rank: one matrix, or the matrices of the experts here, one below the other."""
    prefixes, is_first_copy = [prefix], parallel_state.get_tensor_model_parallel_rank() == 0
    if linear.startswith("mlp.shared_experts."):
        prefixes = [f"{prefix}shared."]
    elif linear.startswith("mlp.experts."):
        prefixes = [f"{prefix}experts."]
        if not getattr(parameter, "allreduce", True):  # else one for all experts
            prefixes = [f"{prefix}experts.{expert}." for expert in _experts_here(moe)]
            is_first_copy = parallel_state.get_expert_tensor_parallel_rank() == 0
    rows, columns = len(parameter) // len(prefixes), parameter.shape[1]
    parts = (Part(f"{one}{matrix}.{suffix}", n * rows, Box(0, rows, 0, columns)) for n, one in enumerate(prefixes))
    return LocalParameter(parameter, tuple(parts), is_first_copy)


def _experts_here(moe: MoEConfig | None) -> range:
    assert moe is not None
    count = moe.num_experts // parallel_state.get_expert_model_parallel_world_size()
    first = count * parallel_state.get_expert_model_parallel_rank()
    return range(first, first + count)


def _router_biases_of(gpt: GPTModel) -> Iterator[LocalParameter]:
    """The same on all ranks of a pipeline stage."""
    is_first_copy = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True).rank() == 0
    for layer in gpt.decoder.layers:
        bias = getattr(getattr(layer.mlp, "router", None), "expert_bias", None)
        if bias is not None:
            part = Part(f"layers.{layer.layer_number - 1}.router_bias", 0, Box(0, len(bias), 0, 1))
            yield LocalParameter(bias, (part,), is_first_copy)


def _role(name: str) -> tuple[str, int | None]:
    """What a parameter of a layer is, and which expert's if it is of one alone."""
    for pattern, role in _NAMES:
        if found := re.fullmatch(pattern, name):
            expert = found.groupdict().get("expert")
            return role, None if expert is None else int(expert)
    raise AssertionError(f"megatron-core has a parameter that placement.py does not know: {name}")


def _parts(prefix: str, role: str, parameter: torch.Tensor, shard: int, model: ModelConfig) -> Iterator[Part]:
    """The boxes of a parameter which is the `shard`-th of its tensor-parallel peers."""
    rows, columns = parameter.shape[0], parameter.shape[1] if parameter.dim() == 2 else 1
    if role in ("query_key_value", "query_key_value_bias"):
        # megatron-core keeps, for each query group in turn, its queries, its key and its value.
        heads_per_group = model.num_attention_heads // model.num_query_groups
        groups_here = rows // ((heads_per_group + 2) * model.head_size)
        local_row, suffix = 0, role.removeprefix("query_key_value")
        for group in range(shard * groups_here, min((shard + 1) * groups_here, model.num_query_groups)):
            for kind, heads in (("query", heads_per_group), ("key", 1), ("value", 1)):
                size = heads * model.head_size
                yield Part(prefix + kind + suffix, local_row, Box(group * size, (group + 1) * size, 0, columns))
                local_row += size
    elif role == "gate_up":
        half = rows // 2
        yield Part(prefix + "gate", 0, Box(shard * half, (shard + 1) * half, 0, columns))
        yield Part(prefix + "up", half, Box(shard * half, (shard + 1) * half, 0, columns))
    elif role == "attention_out":
        all_columns = model.num_attention_heads * model.head_size
        yield Part(prefix + role, 0, Box(0, rows, shard * columns, min((shard + 1) * columns, all_columns)))
    elif role == "down":
        yield Part(prefix + role, 0, Box(0, rows, shard * columns, (shard + 1) * columns))
    else:
        yield Part(prefix + role, 0, Box(shard * rows, (shard + 1) * rows, 0, columns))
