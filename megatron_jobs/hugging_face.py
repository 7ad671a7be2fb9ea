"""Hugging Face folders of the Llama and Mixtral families: the names and fields of both sides, and a folder as a source of weights.

`convert.py` goes from here to there, `import_hf.py` and `train.init_from` from there to here, by the same tables.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_jobs.config import ModelConfig, MoEConfig, RunConfig
from user_input import UserError, parse

if TYPE_CHECKING:
    import torch

    from megatron_jobs.gate import Agreement
    from megatron_jobs.weights import Box

BOUND = 1e-4  # on the relative difference of logits

# Names of `layout.py` and of the Hugging Face families; * is a number, the same on both sides in the same order.
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
MIXTRAL = LLAMA | {
    "layers.*.router": "model.layers.*.block_sparse_moe.gate.weight",
    "layers.*.experts.*.gate": "model.layers.*.block_sparse_moe.experts.*.w1.weight",
    "layers.*.experts.*.up": "model.layers.*.block_sparse_moe.experts.*.w3.weight",
    "layers.*.experts.*.down": "model.layers.*.block_sparse_moe.experts.*.w2.weight",
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
# How a model starts and is trained, not what it computes: a run may choose these anew.
FREE_FIELDS = {"init_std", "load_balancing_loss", "router_z_loss", "router_init_std"}

# What the models here cannot do otherwise: the only value that each of these fields of config.json may have.
ONLY: dict[str, Any] = {
    "auto_map": None,  # code of its own
    "quantization_config": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "partial_rotary_factor": 1.0,
}
MODEL_TYPES = ("llama", "mistral", "mixtral")
DTYPES = ("F32", "F16", "BF16")
COMPUTED = ".rotary_emb.inv_freq"  # a buffer that old folders have saved; it follows from rope_theta


def hugging_face_name(name: str, rules: dict[str, str]) -> str:
    """The name of a matrix on the other side. Raises KeyError when no rule covers it."""
    numbers = iter(re.findall(r"(?<=\.)\d+(?=\.)", name))
    return re.sub(r"\*", lambda _: next(numbers), rules[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)])


class HuggingFaceFolder:
    """A Hugging Face folder as a source of named matrices (`layout.TensorSource`). Needs no process group.

    model, moe       what config.json says, in our terms
    sliding_window   tokens that a token attends to at most, None without a bound
    """

    def __init__(self, folder: Path) -> None:
        """Reads config.json and the headers of the safetensors.

        Raises UserError when the model is none that can be trained here, or its tensors are not exactly those of config.json.
        """
        from safetensors import SafetensorError, safe_open

        from megatron_jobs.weights import shapes

        self.folder = folder
        self.model, self.moe, self.sliding_window = _read_config(folder / "config.json")
        self._slices: dict[str, Any] = {}
        for file in _weight_files(folder):
            try:
                tensors = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: is not a whole safetensors file ({error}): copy the folder again") from None
            self._slices |= {name: tensors.get_slice(name) for name in tensors.keys() if not name.endswith(COMPUTED)}
        rules = LLAMA if self.moe is None else MIXTRAL
        self._names: dict[str, str] = {}
        for name, (rows, columns) in shapes(self.model, self.moe):
            rows = self.model.vocab_size if name in ("embedding", "output") else rows
            self._names[name] = theirs = hugging_face_name(name, rules)
            self._check_tensor(theirs, [rows] if name.endswith("_norm") else [rows, columns])
        if left_over := sorted(set(self._slices) - set(self._names.values())):
            raise UserError(
                f"{folder}: {len(left_over)} tensors have no place in the model of its config.json: {_some(left_over)}: "
                "they would be lost; is config.json the one of these weights?"
            )

    def _check_tensor(self, name: str, shape: list[int]) -> None:
        if name not in self._slices:
            raise UserError(f"{self.folder}: has no tensor {name}, which the model of its config.json needs: copy the folder again")
        found = self._slices[name]
        if found.get_shape() != shape:
            raise UserError(f"{self.folder}: {name} has the shape {found.get_shape()}, and by config.json it is {shape}: mend config.json")
        if found.get_dtype() not in DTYPES:
            raise UserError(f"{self.folder}: {name} is of type {found.get_dtype()}, only {', '.join(DTYPES)} are read: convert the folder")

    def read(self, name: str, box: "Box") -> "torch.Tensor":
        """float32 on the CPU, shape [box.rows, box.columns]; only the box is read. Rows that pad the vocabulary are zero."""
        import torch

        stored = self._slices[self._names[name]]
        shape = stored.get_shape()
        end = min(box.row1, shape[0])
        result = torch.zeros(box.rows, box.columns)
        if end > box.row0:
            rows = stored[box.row0 : end] if len(shape) == 1 else stored[box.row0 : end, box.column0 : box.column1]
            result[: end - box.row0] = rows.view(-1, box.columns)
        return result

    def check(self, config: RunConfig) -> None:
        """Raises UserError when a run's model is not the one of this folder; names every field and what to write."""
        if (config.moe is None) != (self.moe is None):
            wanted = "write moe: " + _as_yaml(self.moe, MOE_FIELDS) if self.moe else "leave it out, or upcycle a checkpoint first"
            raise UserError(f"moe must fit train.init_from ({self.folder}), which is {'a mixture' if self.moe else 'dense'}: {wanted}")
        problems = []
        for section, ours, theirs in (("model", config.model, self.model), ("moe", config.moe, self.moe)):
            for field in type(ours).model_fields if ours and theirs else ():
                mine, its = getattr(ours, field), getattr(theirs, field)
                if mine != its and field not in FREE_FIELDS:
                    problems.append(f"{section}.{field} ({mine}) must be that of train.init_from ({self.folder}): write {field}: {its}")
        for phase in config.phases:
            if self.sliding_window and phase.sequence_length > self.sliding_window:
                problems.append(
                    f"phases.{phase.name}.sequence_length ({phase.sequence_length}) must not exceed the sliding_window of "
                    f"train.init_from ({self.folder}): write at most {self.sliding_window}"
                )
        if problems:
            raise UserError("\n".join(problems))


def config_values(model: ModelConfig, moe: MoEConfig | None) -> dict[str, Any]:
    """The fields of config.json that say what the model is."""
    values = {theirs: getattr(model, ours) for ours, theirs in MODEL_FIELDS.items()}
    values |= {"head_dim": model.head_size, "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta}}
    if moe is not None:
        values |= {theirs: getattr(moe, ours) for ours, theirs in MOE_FIELDS.items()} | {"sliding_window": None}
    return values


def _read_config(path: Path) -> tuple[ModelConfig, MoEConfig | None, int | None]:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}): name a Hugging Face folder") from None
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{path}: model_type ({kind}) must be {', '.join(MODEL_TYPES[:-1])} or {MODEL_TYPES[-1]}: take another model")
    # transformers knows what a field that is missing means, and the older spellings of the rotary positions.
    try:
        values = AutoConfig.for_model(**values).to_dict()
    except StrictDataclassError as error:
        raise UserError(f"{path}: is no configuration that transformers reads ({error}): mend it") from None
    rope = values["rope_parameters"]
    values["partial_rotary_factor"] = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    for field, only in ONLY.items():
        if (values.get(field) or only) != only:
            raise UserError(f"{path}: {field} ({values[field]}) is not supported, only {only}: take another model")
    if rope["rope_theta"] != int(rope["rope_theta"]):
        raise UserError(f"{path}: rope_theta ({rope['rope_theta']}) is not supported, only a whole number: take another model")
    if rope["rope_type"] != "default":
        raise UserError(f"{path}: rope_scaling of the type {rope['rope_type']} is not supported, only none: take another model")
    model_values = {ours: values[theirs] for ours, theirs in MODEL_FIELDS.items()} | {"rope_theta": rope["rope_theta"]}
    model = parse(model_values, ModelConfig, str(path))
    if values.get("head_dim") not in (None, model.head_size):
        raise UserError(
            f"{path}: head_dim ({values['head_dim']}) is not supported, only hidden_size / num_attention_heads "
            f"({model.head_size}): take another model"
        )
    moe = parse({ours: values[theirs] for ours, theirs in MOE_FIELDS.items()}, MoEConfig, str(path)) if kind == "mixtral" else None
    return model, moe, values.get("sliding_window")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: is missing: copy the folder again, or save the model with save_pretrained of transformers")
    return [folder / name for name in names]


def compare(config: "HuggingFaceFolder | RunConfig", weights: Any, folder: Path, tokens: "torch.Tensor", what: str) -> "Agreement":
    """Logits of `weights` in megatron-core's model and of `folder` in transformers', on token ids [samples, length + 1].

    Raises UserError when transformers finds keys left over or missing, or logits differ; `what` names the command.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_jobs import gate, parallel

    with parallel.alone():
        ours = gate.megatron_logits(config.model, config.moe, weights, tokens[:, :-1])
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[trouble]:
            raise UserError(f"{what}: transformers reports {trouble}: {sorted(info[trouble])}: this is a defect, please report it")
    with torch.no_grad():
        theirs = model.eval()(tokens[:, :-1]).logits.float()
    agreement = gate.compare(ours, theirs, tokens[:, 1:], BOUND)
    print(agreement)
    gate.require(agreement, what)
    return agreement


def _as_yaml(section: Any, fields: dict[str, str]) -> str:
    return "{" + ", ".join(f"{field}: {getattr(section, field)}" for field in fields) + "}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
