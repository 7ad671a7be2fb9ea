"""The families of Hugging Face's models that can be trained here: Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE.

The names of matrices and the fields of config.json on both sides, in one table. `convert.py` goes by it from here to there, and
`hugging_face.py` from there to here. Needs no torch.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_jobs.config import RunConfig
from megatron_jobs.config.model import ModelConfig, MoEConfig
from mujina.user_input import SHOWN, T, UserError, parse, read_object

# Names of `placement.py` and of the Hugging Face families; * is a number, the same on both sides in the same order.
LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "layers.*.attention_norm": "model.layers.*.input_layernorm.weight",
    "layers.*.query": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.key": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.value": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention_out": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.ffn_norm": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.gate": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.up": "model.layers.*.mlp.up_proj.weight",
    "layers.*.down": "model.layers.*.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
QWEN2 = LLAMA | {
    "layers.*.query_bias": "model.layers.*.self_attn.q_proj.bias",
    "layers.*.key_bias": "model.layers.*.self_attn.k_proj.bias",
    "layers.*.value_bias": "model.layers.*.self_attn.v_proj.bias",
}
QWEN3 = LLAMA | {
    "layers.*.query_norm": "model.layers.*.self_attn.q_norm.weight",
    "layers.*.key_norm": "model.layers.*.self_attn.k_norm.weight",
}
MIXTRAL = LLAMA | {
    "layers.*.router": "model.layers.*.block_sparse_moe.gate.weight",
    "layers.*.experts.*.gate": "model.layers.*.block_sparse_moe.experts.*.w1.weight",
    "layers.*.experts.*.up": "model.layers.*.block_sparse_moe.experts.*.w3.weight",
    "layers.*.experts.*.down": "model.layers.*.block_sparse_moe.experts.*.w2.weight",
}
QWEN3_MOE = QWEN3 | {
    "layers.*.router": "model.layers.*.mlp.gate.weight",
    "layers.*.experts.*.gate": "model.layers.*.mlp.experts.*.gate_proj.weight",
    "layers.*.experts.*.up": "model.layers.*.mlp.experts.*.up_proj.weight",
    "layers.*.experts.*.down": "model.layers.*.mlp.experts.*.down_proj.weight",
}

# Fields of the sections `model:` and `moe:`, and of config.json.
MODEL_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
MOE_FIELDS = {"num_experts": "num_local_experts", "top_k": "num_experts_per_tok", "load_balancing_loss": "router_aux_loss_coef"}
ROPE_SCALING_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}


@dataclass(frozen=True)
class Family:
    """What transformers has under one `model_type`."""

    architecture: str
    names: dict[str, str]
    switches: dict[str, bool]  # of `model:`
    moe_fields: dict[str, str] = field(default_factory=dict)  # none: dense
    moe_only: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # the values of fields of `moe:` that it can hold


PLAIN = {"qkv_bias": False, "qk_norm": False}
PLAIN_MOE = {"shared_ffn_hidden_size": (0,)}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", LLAMA, PLAIN),
    "mistral": Family("MistralForCausalLM", LLAMA, PLAIN),
    "qwen2": Family("Qwen2ForCausalLM", QWEN2, PLAIN | {"qkv_bias": True}),
    "qwen3": Family("Qwen3ForCausalLM", QWEN3, PLAIN | {"qk_norm": True}),
    "mixtral": Family("MixtralForCausalLM", MIXTRAL, PLAIN, MOE_FIELDS, PLAIN_MOE | {"every": (1,), "scores": ("topk_softmax",)}),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        QWEN3_MOE,
        PLAIN | {"qk_norm": True},
        MOE_FIELDS | {"ffn_hidden_size": "moe_intermediate_size"},
        PLAIN_MOE | {"scores": ("topk_softmax", "softmax_topk")},
    ),
}
# What the models here cannot do otherwise: the only value that each of these fields of config.json may have, and the remedy.
ANOTHER = "take another model"
AS_WELL = "write that in its place, for it is of training alone, and the model stays the same"
ONLY: dict[str, tuple[Any, str]] = {
    "auto_map": (None, ANOTHER),  # code of its own
    "text_config": (None, ANOTHER),  # of pictures or sounds, too
    "quantization_config": (None, "take the model as it was before it was quantized"),
    "hidden_act": ("silu", ANOTHER),
    "attention_bias": (False, ANOTHER),
    "mlp_bias": (False, ANOTHER),
    "attention_dropout": (0.0, AS_WELL),
    "router_jitter_noise": (0.0, AS_WELL),
    "partial_rotary_factor": (1.0, ANOTHER),
}


def hugging_face_name(name: str, rules: dict[str, str]) -> str:
    """The name of a matrix on the other side. Raises KeyError when no rule covers it."""
    numbers = iter(re.findall(r"(?<=\.)\d+(?=\.)", name))
    return re.sub(r"\*", lambda _: next(numbers), rules[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)])


def family_of(model: ModelConfig, moe: MoEConfig | None, origin: str | None = None) -> str:
    """The key in FAMILIES of the stock architecture that can hold a model. Raises UserError where there is none.

    `origin` is the family that the model came from, in which it stays where that can hold it.
    """
    if origin and _holds(FAMILIES[origin], model, moe):
        return origin
    if model.qkv_bias and (moe or model.qk_norm):
        other = "moe" if moe else "model.qk_norm"
        raise UserError(f"model.qkv_bias (True) can be exported only as Qwen2, which has no {other}: train without one of them")
    if moe is None:
        if model.qkv_bias or model.qk_norm:
            return "qwen2" if model.qkv_bias else "qwen3"
        # transformers wants a Llama's heads to divide its width, and lets Mistral, which is the same else, off that
        return "mistral" if model.hidden_size % model.num_attention_heads else "llama"
    kind = "qwen3_moe" if model.qk_norm else "mixtral"
    for name, allowed in FAMILIES[kind].moe_only.items():
        if (value := getattr(moe, name)) not in allowed:
            raise UserError(
                f"moe.{name} ({value}) has no place in {FAMILIES[kind].architecture}, the stock architecture nearest to this model, which "
                f"has only {' or '.join(map(str, allowed))}: train with that, or use the checkpoint with this project alone"
            )
    return kind


def hindrance(model: ModelConfig, moe: MoEConfig | None) -> str | None:
    """Why `mujina convert` refuses a model, in words; None where it does not. Told before anything is computed, not after it."""
    if moe and moe.normalize_logits:
        return (
            "moe.normalize_logits (True) is known to no stock architecture, and the comparison of logits would fail: give --no-check to "
            "write it all the same, for engines that you have taught it"
        )
    try:
        family_of(model, moe)
    except UserError as error:
        return str(error)
    return None


def tell_hindrance(config: RunConfig) -> None:
    """Prints a line where `mujina convert` will refuse what the run trains."""
    if reason := hindrance(config.model, config.moe):
        print(f"NOTE: `mujina convert` will refuse this model: {reason}", flush=True)


def _holds(family: Family, model: ModelConfig, moe: MoEConfig | None) -> bool:
    if any(getattr(model, name) != value for name, value in family.switches.items()) or (moe is not None) != bool(family.moe_fields):
        return False
    return moe is None or all(getattr(moe, name) in allowed for name, allowed in family.moe_only.items())


def config_values(model_type: str, model: ModelConfig, moe: MoEConfig | None) -> dict[str, Any]:
    """The fields of config.json that say what the model is."""
    family = FAMILIES[model_type]
    values = {theirs: getattr(model, ours) for ours, theirs in MODEL_FIELDS.items()} | {"architectures": [family.architecture]}
    if model_type != "qwen2" or model.head_size * model.num_attention_heads != model.hidden_size:  # Qwen2 as published has no such field
        values["head_dim"] = model.head_size
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling:
        rope |= {"rope_type": "llama3"} | {theirs: getattr(model.rope_scaling, ours) for ours, theirs in ROPE_SCALING_FIELDS.items()}
    values["rope_parameters"] = rope
    if moe is not None:
        values |= {theirs: getattr(moe, ours) for ours, theirs in family.moe_fields.items()}
        if model_type == "qwen3_moe":
            values["moe_intermediate_size"] = moe.expert_width(model)
            values["norm_topk_prob"] = moe.scores == "topk_softmax"  # all scores, the top k of them made to sum to one: the same
            values |= {"decoder_sparse_step": 1, "mlp_only_layers": [n for n in range(model.num_layers) if not moe.is_mixture(n)]}
        else:
            values["intermediate_size"] = moe.expert_width(model)
    return values


def older_spellings(values: dict[str, Any]) -> dict[str, Any]:
    """What readers older than transformers 5, and other engines, look for in a config.json."""
    rope = values["rope_parameters"]
    older = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if values["model_type"] == "qwen3_moe":
        older["num_experts"] = values["num_local_experts"]
    return older


def read_config(path: Path) -> tuple[str, ModelConfig, MoEConfig | None, int | None]:
    """What a config.json says: model_type, `model:` and `moe:` in our terms, and the sliding window in tokens (None: without a bound).

    Raises UserError when the model is none that can be trained here.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = read_object(path, "name a Hugging Face folder")
    kind = values.get("model_type")
    if kind not in FAMILIES:
        *others, last = FAMILIES
        raise UserError(f"{path}: model_type ({kind}) must be {', '.join(others)} or {last}: take another model")
    family = FAMILIES[kind]
    # transformers knows what a field that is missing means, and the older spellings of the rotary positions.
    try:
        values = AutoConfig.for_model(**values).to_dict()
    except StrictDataclassError as error:
        told = " ".join(str(error).split())[: 2 * SHOWN]
        raise UserError(f"{path}: is no configuration that transformers reads ({told}): mend it") from None
    rope = values["rope_parameters"]
    values["partial_rotary_factor"] = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if values["hidden_act"] == "swish":  # by its older name
        values["hidden_act"] = "silu"
    for name, (only, remedy) in ONLY.items():
        if (values.get(name) or only) != only:
            raise UserError(f"{path}: {name} ({values[name]}) is not supported, only {only}: {remedy}")
    padding = values.get("pad_token_id")
    if padding is not None and not -values["vocab_size"] <= padding < values["vocab_size"]:
        raise UserError(f"{path}: pad_token_id ({padding}) is no row of vocab_size ({values['vocab_size']}): write null, or one that is")
    if rope["rope_type"] not in ("default", "llama3"):
        raise UserError(f"{path}: rope_scaling of the type {rope['rope_type']} is not supported, only llama3 or none: take another model")
    ours = {name: values[theirs] for name, theirs in MODEL_FIELDS.items()} | family.switches
    ours |= {"head_size": values.get("head_dim"), "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        ours["rope_scaling"] = {name: rope[theirs] for name, theirs in ROPE_SCALING_FIELDS.items()}
    model, moe = _parse(ours, ModelConfig, MODEL_FIELDS, path), None
    if family.moe_fields:
        ours = {name: values[theirs] for name, theirs in family.moe_fields.items()}
        if kind == "qwen3_moe":
            ours |= {"scores": "topk_softmax" if values["norm_topk_prob"] else "softmax_topk", "every": _every(values, path)}
        if ours["top_k"] == 1 and ours.get("scores", "topk_softmax") == "topk_softmax":
            raise UserError(f"{path}: num_experts_per_tok (1): a softmax over one expert is always 1, and no router learns: {ANOTHER}")
        moe = _parse(ours, MoEConfig, family.moe_fields, path)
    return kind, model, moe, values.get("sliding_window")


def _parse(values: dict[str, Any], section: type[T], fields: dict[str, str], path: Path) -> T:
    """The section of these values; what is wrong with them is told under the names of config.json."""
    try:
        return parse(values, section, str(path))
    except UserError as error:
        told = str(error).removeprefix(f"{path}: ")
        spelled = re.sub(r"\b[a-z_]+\b", lambda word: fields.get(word[0], word[0]), told)
        raise UserError(f"{path}: {spelled}") from None


def _every(values: dict[str, Any], path: Path) -> int:
    """`moe.every` of a Qwen3-MoE's config.json. Raises UserError when its mixtures do not lie so."""
    num_layers, step, dense = values["num_hidden_layers"], values["decoder_sparse_step"], values["mlp_only_layers"]
    mixtures = [layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0]
    for every in range(1, num_layers + 1):
        if mixtures == list(range(0, num_layers, every)):
            return every
    raise UserError(
        f"{path}: decoder_sparse_step ({step}) and mlp_only_layers ({dense}) put experts into the layers {mixtures}, and here the first of "
        "each so many layers has them (moe.every): take another model"
    )
