"""What megatron-core does not promise is as we rely on it, and its private names are touched in one place.

After an upgrade of megatron-core `test_megatron_core_is_as_we_rely_on_it` fails with one table: what is another, which file of ours
relies on it, and what to do. Every row below names a function with its parameters, or something that has a line in its source.
"""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
CORE, ROUTER = "megatron_jobs/engine/core.py", "moe/router.py"
CPU, CPU_SPEED = "megatron_jobs/engine/cpu.py", "megatron_jobs/engine/cpu_speed.py"


class Relied(NamedTuple):
    """`file` relies on it that `name`, a module or something in it (module:name), has these `parameters`, or a `line` in its source."""

    file: str
    name: str
    remedy: str
    parameters: str | None = None
    line: str | None = None  # a regular expression


OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
GPT = "megatron.core.models.gpt:GPTModel"
TOP_K = "megatron.core.transformer.moe.router:TopKRouter"
BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
RANGES = "find what tells which part of a parameter a rank owns, and give it from owned_ranges"
WALK = "follow GPTModel.forward in embed, layer_forward and unembed; test_agreement.py must then hold"
LOSSES = "find where routers put their losses, and give them from router_losses; test_passes.py compares them with a computation by hand"
OVERRIDE = "megatron-core would go its own way without an error: find what routing() calls now, and override that"
LOCAL = "find where megatron-core takes the name from now, and put the stand-in there"
PLACES = "find where the layers' specification has its place for it, and put ours there; test_parallel.py must then hold"

RELIED_ON = [
    Relied(CORE, "megatron.core.optimizer.optimizer:ChainedOptimizer", RANGES, line=r"self\.chained_optimizers = "),
    Relied(CORE, OPTIMIZER, RANGES, line=r"self\.model_param_gbuf_map = "),
    Relied(CORE, f"{OPTIMIZER}._get_model_param_range_map", RANGES, "self, param"),
    Relied(CORE, f"{OPTIMIZER}._build_model_gbuf_param_range_map", RANGES, line=r'"param": sub_param_range'),
    Relied(CORE, f"{OPTIMIZER}._get_main_param_and_optimizer_states", RANGES, "self, model_param"),
    Relied(
        CORE, f"{OPTIMIZER}._copy_main_params_to_model_params", "find what takes the updated weights into the model, for write_back", "self"
    ),
    Relied(
        CORE,
        "megatron.core.distributed:DistributedDataParallel.start_param_sync",
        "find what gathers the weights of all ranks, for write_back",
        "self, unused, force_sync, force_dispatch",
    ),
    Relied(
        CORE,
        "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        "clip in update as ChainedOptimizer.step does",
        "parameters, max_norm, total_norm, use_decoupled_grad",
    ),
    Relied(CORE, f"{OPTIMIZER}.step_with_ready_grads", "update as ChainedOptimizer.step does", "self"),
    Relied(CORE, "megatron.core.optimizer", "find what keeps norms from weight decay, for set_up_adamw", line="'wd_mult': 1.0"),
    Relied(
        CORE,
        "megatron.core.models.gpt.gpt_layer_specs:get_mlp_module_spec_for_backend",
        PLACES,
        line=r"return partial\(\s*module,\s*submodules=MLPSubmodules\(",
    ),
    Relied(CORE, "megatron.core.transformer.moe.moe_layer:MoESubmodules", PLACES, line=r"\n    experts: [\s\S]*\n    router: "),
    Relied(CORE, "megatron.core.transformer.transformer_block:TransformerBlockSubmodules", PLACES, line=r"\n    layer_norm: "),
    Relied(CORE, "megatron.core.transformer.transformer_layer:TransformerLayerSubmodules", PLACES, line=r"\n    pre_mlp_layernorm: "),
    Relied(CORE, "megatron.core.transformer.transformer_layer:TransformerLayerSubmodules", PLACES, line=r"\n    input_layernorm: "),
    Relied(CORE, "megatron.core.transformer.attention:SelfAttentionSubmodules", PLACES, line=r"\n    core_attention: "),
    Relied(
        CORE, "megatron.core.transformer.attention:SelfAttentionSubmodules", PLACES, line=r"\n    q_layernorm: [\s\S]*\n    k_layernorm: "
    ),
    Relied(
        "megatron_jobs/engine/attention.py",
        "megatron.core.transformer.attention:Attention",
        "give FusedAttention the arguments that attention modules get now",
        line=r"self\.core_attention\)\(\s*query,\s*key,\s*value,\s*attention_mask,",
    ),
    Relied(
        "moe/experts.py",
        "megatron.core.transformer.moe.moe_layer:MoELayer",
        "give GroupedExperts the arguments that experts get now",
        line=r"self\.submodules\.experts\(\s*self\.num_local_experts,\s*self\.config,\s*pg_collection=",
    ),
    Relied(
        "moe/experts.py",
        "megatron.core.transformer.moe.moe_layer:MoELayer",
        "give GroupedExperts the arguments that experts get now",
        line=r"self\.experts\)\(\s*dispatched_input, tokens_per_expert, permuted_probs",
    ),
    Relied(
        "moe/experts.py",
        "megatron.core.fusions.fused_bias_swiglu:weighted_bias_swiglu_impl",
        "call it as TEGroupedMLP does",
        "input, bias, weights, fp8_input_store",
    ),
    Relied(CORE, "megatron.core.transformer.moe.moe_logging:get_moe_metrics_tracker", LOSSES, ""),
    Relied(CORE, "megatron.core.transformer.moe.moe_logging:MetricEntry", LOSSES, line=r"\n    values: "),
    Relied(CORE, f"{TOP_K}.apply_z_loss", LOSSES, line='"z_loss"'),
    Relied(CORE, f"{TOP_K}._apply_aux_loss", LOSSES, line='"load_balancing_loss"'),
    Relied(
        CORE,
        "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding",
        "find where the frequencies are kept, for set_rotary_frequencies",
        line=r"self\.inv_freq = ",
    ),
    Relied(
        CORE,
        f"{GPT}.forward",
        "hand the documents down to the attention in another way",
        line=r"attention_mask=attention_mask,\s*inference",
    ),
    Relied(
        "megatron_jobs/engine/passes.py",
        f"{GPT}._postprocess",
        "find where the last stage can be given a loss of ours; else a forward hook of output_layer",
        line=r"return output_processor\(\s*hidden_states=hidden_states,\s*output_layer=self\.output_layer,\s*output_weight=",
    ),
    Relied(
        CORE,
        f"{GPT}._preprocess",
        WALK,
        line=r"self\.embedding\(input_ids=input_ids, position_ids=position_ids\)[\s\S]*self\.rotary_pos_emb\(\s*rotary_seq_len",
    ),
    Relied(
        CORE,
        "megatron.core.transformer.transformer_layer:TransformerLayer.forward",
        WALK,
        "self, hidden_states, attention_mask, context, context_mask, rotary_pos_emb, rotary_pos_cos, rotary_pos_sin, rotary_pos_cos_sin, "
        "attention_bias, inference_context, packed_seq_params, sequence_len_offset, padding_mask, inference_params",
    ),
    Relied(CORE, f"{GPT}.shared_embedding_or_output_weight", WALK, "self"),
    Relied(CORE, "megatron.core.transformer.transformer_block:TransformerBlock", WALK, line=r"self\.final_layernorm\)?\("),
    Relied(ROUTER, TOP_K, "give Router the arguments that routers get now", "config, pg_collection, is_mtp_layer"),
    Relied(ROUTER, f"{TOP_K}.routing", OVERRIDE, "self, logits, padding_mask"),
    Relied(ROUTER, f"{TOP_K}.gating", OVERRIDE, "self, input"),
    Relied(ROUTER, f"{TOP_K}._apply_global_aux_loss", OVERRIDE, "self, probs, scores_for_aux_loss, routing_map, with_padding_mask"),
    Relied(ROUTER, f"{TOP_K}.routing", OVERRIDE, line=r"self\._apply_global_aux_loss\("),
    Relied(ROUTER, f"{TOP_K}._apply_expert_bias", OVERRIDE, "self, routing_map, padding_mask"),
    Relied(ROUTER, f"{TOP_K}.routing", OVERRIDE, line=r"self\._apply_expert_bias\("),
    Relied(ROUTER, TOP_K, "count the tokens where megatron-core moves the bias by them", line=r"self\.local_tokens_per_expert \+="),
    Relied(ROUTER, f"{TOP_K}.get_aux_loss_coeff", "find where the coefficient is", "self, aux_loss_type"),
    Relied(
        ROUTER,
        f"{TOP_K}.attach_and_log_load_balancing_loss",
        LOSSES,
        "self, activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, needs_dp_avg, valid_token_count",
    ),
    Relied(ROUTER, "megatron.core.transformer.moe.router:Router", "find the group of a micro-batch's ranks", line=r"self\.tp_cp_group = "),
    Relied(
        ROUTER,
        "megatron.core.transformer.moe.moe_utils:compute_routing_scores_for_aux_loss",
        "find what gives the scores of all experts, for the tally",
        "logits, topk, score_function, fused, padding_mask",
    ),
    Relied(
        ROUTER,
        "megatron.core.transformer.moe.moe_utils:get_capacity",
        "compute it in Router: tokens × top_k ÷ experts × factor, rounded up",
        "num_tokens, num_experts, capacity_factor, min_capacity",
    ),
    Relied(
        "megatron_jobs/engine/gpt.py",
        "megatron.core.transformer.transformer_block:TransformerBlock.forward",
        "find what turns fp8 on at each forward pass, and turn that off in without_fp8",
        line=r"if self\.config\.fp8|self\.config\.fp8 and",
    ),
    Relied(
        "megatron_jobs/engine/placement.py",
        "megatron.core.distributed.finalize_model_grads:_update_router_expert_bias",
        "find where the routers' biases are, for _router_biases_of, and that finalize_model_grads still moves them",
        line=r"module\.expert_bias",
    ),
    Relied(CPU, "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork", LOCAL, "self, name"),
    Relied(CPU, "megatron.core.tensor_parallel.random:_get_all_rng_states", LOCAL, ""),
    Relied(
        CPU,
        "megatron.core.tensor_parallel.random:CheckpointFunction",
        LOCAL,
        line=r"ctx\.rng_states = _get_all_rng_states\(\)[\s\S]*_set_all_rng_states\(\*ctx\.rng_states\)",
    ),
    Relied(CPU, "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu", LOCAL, "tensor, as_numpy, record_stream"),
    Relied(CPU_SPEED, "megatron.core.transformer.mlp:bias_swiglu_impl", LOCAL, "input, bias, fp8_input_store, cpu_offload_input"),
    Relied(CPU_SPEED, BUFFERS, LOCAL, line=r" dist_all_gather_func\(\s*\S+,\s*\S+,\s*group="),
    Relied(CPU_SPEED, BUFFERS, LOCAL, line=r" dist_reduce_scatter_func\(\s*\S+,\s*\S+,\s*op=\S+,\s*group="),
    Relied(
        CPU, OPTIMIZER, "drop the stand-in for Tensor.type, if nobody compares with CUDA's names", line=r"\.type\(\) == 'torch\.cuda\.Float"
    ),
]


def _found(relied: Relied) -> str | None:
    """What is wrong with what a row says, None where it holds."""
    module, _, names = relied.name.partition(":")
    try:
        what: Any = importlib.import_module(module)
        for name in filter(None, names.split(".")):
            what = getattr(what, name)
    except (ImportError, AttributeError) as error:
        return f"is gone ({error})"
    if relied.parameters is not None:
        parameters = ", ".join(inspect.signature(what).parameters)
        return None if parameters == relied.parameters else f"takes ({parameters}), not ({relied.parameters})"
    assert relied.line is not None
    return None if re.search(relied.line, inspect.getsource(what)) else f"has no line like {relied.line}"


def _table() -> list[str]:
    return [f"{relied.name} {found}\n    {relied.file} relies on it: {relied.remedy}" for relied in RELIED_ON if (found := _found(relied))]


def test_megatron_core_is_as_we_rely_on_it():
    [table] = run_ranks(1, _table)  # in a process that has not put any stand-ins in the places of these
    assert not table, "megatron-core is another than this program was written for:\n" + "\n".join(table)


@pytest.mark.parametrize(
    "relied, wrong",
    [
        (Relied(CORE, f"{OPTIMIZER}._never_was", "mend it"), "is gone"),
        (Relied(CORE, "megatron.core.never_was", "mend it"), "is gone"),
        (
            Relied(CORE, f"{OPTIMIZER}._get_model_param_range_map", "mend it", "self, tensor"),
            r"takes \(self, param\), not \(self, tensor\)",
        ),
        (Relied(CORE, f"{OPTIMIZER}._get_model_param_range_map", "mend it", line="never was"), "has no line"),
    ],
)
def test_what_changed_is_seen(relied, wrong):
    assert re.match(wrong, run_ranks(1, _found, relied)[0])


def _own_names() -> set[str]:
    """Every private name that this project defines itself."""
    names = set()
    for tree in map(_parsed, _files()):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names | {"_replace", "_asdict"}  # of named tuples


def _files() -> list[Path]:
    return [*(ROOT / "megatron_jobs").rglob("*.py"), *(ROOT / "moe").rglob("*.py")]


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_private_names_of_others_are_touched_behind_the_fence_alone():
    own = _own_names()
    found = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}"
        for path in _files()
        if str(path.relative_to(ROOT)) not in (CORE, CPU, CPU_SPEED)
        for node in ast.walk(_parsed(path))
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and node.attr not in own
        if not (isinstance(node.value, ast.Name) and node.value.id in sys.stdlib_module_names)
    }
    assert not found
    touched = {node.attr for node in ast.walk(_parsed(ROOT / CORE)) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    assert touched and all(any(relied.name.endswith(f".{name}") for relied in RELIED_ON) for name in touched)
