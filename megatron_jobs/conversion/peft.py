"""Adapters as folders of peft's: adapter_config.json, and A and B in adapter_model.safetensors.

`mujina convert --adapter` writes one, and a run may begin with one (`adapter.init_from`).

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight                  layers.3.query.lora_a
    base_model.model.model.layers.3.block_sparse_moe.experts.5.w1.lora_B.weight     layers.3.experts.5.gate.lora_b

A and B stand beside the base's matrix under its Hugging Face name, in float32, as peft holds them. Each expert has its own: what
`adapter.experts: shared` gives to all experts of a layer is written once for each. transformers 5 has the experts of a layer in two
parameters, and peft (0.21) brings the adapters of experts, where they are of gate, up and down, or of down alone, into that form itself.

What adapter_config.json says beyond rank, alpha, their patterns and rsLoRA must be what a new LoraConfig says, or is refused by name.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.checkpoints.weights import shapes
from megatron_jobs.config import RunConfig
from megatron_jobs.config.adapter import FFN, MATRICES, AdapterConfig, kind_of
from megatron_jobs.conversion.families import FAMILIES, hugging_face_name
from megatron_jobs.conversion.tensors import MERGE, Stored, read_files
from mujina.files import sha256_of
from mujina.matrices import Box, TensorSource
from mujina.tensor_files import Planned, write_safetensors
from mujina.user_input import UserError, read_object, reading, stand_in

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SIDES = {"lora_a": "lora_A", "lora_b": "lora_B"}
READ = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# What says nothing of how A and B are to be used, or only what the tensors say themselves.
TELLS_NOTHING = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "qalora_group_size", "eva_config"),
)
# A and B that are drawn so, and leave the base as it is.
INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")


def of_module(about: dict[str, Any], module: str) -> tuple[int, float]:
    """Rank and alpha (B A x is multiplied with alpha ÷ rank) of a module of the model, as `get_pattern_key` of peft finds them."""

    def matched(pattern: str, default: str) -> Any:
        found = (value for key, value in (about.get(pattern) or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(found, about[default])

    rank, alpha = int(matched("rank_pattern", "r")), float(matched("alpha_pattern", "lora_alpha"))
    return rank, alpha * (rank**0.5 if about.get("use_rslora") else 1)


def _module(matrix: str, model_type: str) -> str:
    """The module of transformers' model that holds a matrix."""
    return hugging_face_name(matrix, FAMILIES[model_type].names).removesuffix(".weight")


def _tensor(module: str, suffix: str) -> str:
    return f"base_model.model.{module}.{SIDES[suffix]}.weight"


class PeftFolder:
    """The A and B of a folder, as the first ones of a run (`matrices.TensorSource`)."""

    def __init__(self, folder: Path, config: RunConfig, model_type: str) -> None:
        """Reads adapter_config.json and the headers of the tensors.

        Raises UserError when they are none that the configuration's adapter can begin with, and says what to write.
        """
        assert config.adapter is not None
        self.folder, self.config = folder, config
        about = read_object(folder / CONFIG, "name a folder that peft has saved")
        with reading(folder / CONFIG, "the configuration of a LoRA that peft has saved", "save it anew with save_pretrained of peft"):
            _check(folder, about)
            files = [folder / name for name in WEIGHTS if (folder / name).exists()]
            if not files:
                raise UserError(stand_in(folder / WEIGHTS[0]) or f"{folder}: holds no {WEIGHTS[0]}: copy the whole folder")
            self.file = files[0]
            found = read_files(files[:1])
            self._stored: dict[str, Stored] = {}
            has: dict[str, set[tuple[int, float] | None]] = {}
            for matrix, (rows, columns) in shapes(config.model, config.moe):
                kind = kind_of(matrix)
                if kind is None:
                    continue
                module = _module(matrix, model_type)
                rank, alpha = of_module(about, module)
                there = 0
                for suffix, shape in (("lora_a", [rank, columns]), ("lora_b", [rows, rank])):
                    if stored := found.pop(_tensor(module, suffix), None):
                        if stored.shape != shape:
                            raise UserError(
                                f"{self.file}: {stored.name} has the shape {stored.shape}, and by {CONFIG} and the model {shape}"
                            )
                        self._stored[f"{matrix}.{suffix}"] = stored
                        there += 1
                has.setdefault(kind, set()).add((rank, alpha) if there == 2 else None)
        if found:
            raise UserError(
                f"{self.file}: {next(iter(found))} has no place beside the matrices of this model ({', '.join(MATRICES)}): {MERGE}"
            )
        self._check_section(config.adapter, {kind: values for kind, values in has.items() if values != {None}})

    def _check_section(self, adapter: AdapterConfig, has: dict[str, set[tuple[int, float] | None]]) -> None:
        for kind, values in has.items():
            if len(values) > 1:
                raise UserError(
                    f"{self.folder}: {kind} has not the same rank and alpha in every layer, or in some none at all, and here all layers "
                    f"have the same: {MERGE}"
                )
        of = {kind: one for kind in MATRICES if kind in has for one in has[kind] if one}
        if not of:
            raise UserError(
                f"{self.file}: holds no A and B of matrices of this model ({', '.join(MATRICES)}): name the folder of another one"
            )
        rank, alpha = next(iter(of.values()))
        wanted = dict(
            rank=rank,
            alpha=alpha,
            matrices=list(of),
            rank_pattern={kind: one for kind, (one, _) in of.items() if one != rank},
            alpha_pattern={kind: one for kind, (_, one) in of.items() if one != alpha},
        )
        same = set(of) == set(adapter.matrices) and all(
            adapter.rank_of(kind) == one and math.isclose(adapter.alpha_of(kind), other) for kind, (one, other) in of.items()
        )
        if not same:
            told = ", ".join(f"{name}: {json.dumps(value)}" for name, value in wanted.items() if value)
            raise UserError(f"adapter.init_from ({self.folder}): is not what the section adapter describes: write there {told}")
        if adapter.experts != "each" and any(kind.startswith("experts.") for kind in of):
            raise UserError(
                f"adapter.experts ({adapter.experts}) must be each with adapter.init_from, for a PEFT folder has an adapter for each"
            )

    def read(self, name: str, box: Box) -> "torch.Tensor":
        """float32 on the CPU, shape [box.rows, box.columns]. Raises UserError where it holds NaN or Inf."""
        stored = self._stored[name]
        values = stored[box.row0 : box.row1, box.column0 : box.column1].float()
        if not values.isfinite().all():
            raise UserError(f"{stored.file}: {stored.name} holds values that are NaN or Inf: take another save of the adapter")
        return values

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Tells this folder from any other, by its checksums: reads all of it."""
        files = [self.folder / CONFIG, self.file]
        return {
            "folder": str(self.folder),
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files},
        }


def _check(folder: Path, about: dict[str, Any]) -> None:
    """Raises UserError where B A is not all that the adapter adds."""
    if about.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type ({about.get('peft_type')}) must be LORA: {MERGE}")
    if about.get("target_parameters"):
        raise UserError(
            f"{folder / CONFIG}: target_parameters ({', '.join(map(str, about['target_parameters']))}): the experts of a layer have one "
            f"adapter in one parameter, and here each matrix has its own: {MERGE}"
        )
    if (initial := about.get("init_lora_weights")) not in INITIAL:
        raise UserError(f"{folder / CONFIG}: init_lora_weights ({initial}) has changed the base as well: {MERGE}")
    known = (*READ, *TELLS_NOTHING, "init_lora_weights", "target_parameters")
    for field, value in about.items():
        if field not in known and value not in (None, False, "none", {}, []):
            raise UserError(f"{folder / CONFIG}: {field} ({value}) is not supported, an adapter here is A and B alone: {MERGE}")


def why_not_written(config: RunConfig) -> str | None:
    """Why peft would not load a run's adapter of a mixture, in words; None where it does."""
    adapter = config.adapter
    assert adapter is not None
    if config.moe is None:
        return None
    merge = "leave out --adapter, and it is merged with its base"
    if dense := [kind for kind in adapter.matrices if kind in FFN]:
        return f"adapter.matrices ({dense[0]}): peft takes the FFNs of a mixture for experts, those of its dense layers too: {merge}"
    experts = {kind for kind in adapter.matrices if kind.startswith("experts.")}
    if experts not in (set(), {"experts.down"}, {f"experts.{name}" for name in FFN}):
        return f"adapter.matrices ({', '.join(sorted(experts))}): of experts peft loads gate, up and down together, or down alone: {merge}"
    if "experts.gate" in experts:
        gate, up = ((adapter.rank_of(one), adapter.alpha_of(one)) for one in ("experts.gate", "experts.up"))
        if gate != up:
            return f"adapter: experts.gate and experts.up are one parameter in peft, and must have the same rank and alpha: {merge}"
    return None


def write(checkpoint: Checkpoint, model_type: str, folder: Path) -> None:
    """Writes the adapter of a checkpoint, CONFIG and the tensors, into a folder. Raises UserError where peft would not load them."""
    import torch

    config, adapter = checkpoint.config, checkpoint.config.adapter
    assert adapter is not None
    if problem := why_not_written(config):
        raise UserError(problem)
    base = config.train.init_from
    tensors = []
    for matrix, _ in shapes(config.model, config.moe):
        if own := adapter.adapted(matrix):
            for suffix in SIDES:
                rows, columns = checkpoint.shapes[f"{own}.{suffix}"]
                read = functools.partial(checkpoint.read, f"{own}.{suffix}", Box(0, rows, 0, columns))
                tensors.append(Planned(_tensor(_module(matrix, model_type), suffix), (rows, columns), torch.float32, read))
    write_safetensors(folder / WEIGHTS[0], tensors, {"format": "pt"})
    # The rank and alpha of the experts' gate and up must be those of no pattern: peft reckons with them what both together have.
    first = "experts.gate" if "experts.gate" in adapter.matrices else adapter.matrices[0]
    rank, alpha = adapter.rank_of(first), adapter.alpha_of(first)
    leaves = {kind: _leaves(kind, model_type) for kind in adapter.matrices}
    ranks = {leaf: adapter.rank_of(kind) for kind, names in leaves.items() for leaf in names}
    alphas = {leaf: adapter.alpha_of(kind) for kind, names in leaves.items() for leaf in names}
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base) if base and (base / "config.json").exists() else None,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "target_modules": sorted({names[0] for names in leaves.values()}),
        "rank_pattern": {leaf: one for leaf, one in ranks.items() if one != rank},
        "alpha_pattern": {leaf: _whole(one) for leaf, one in alphas.items() if one != alpha},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(about, indent=2))


def _leaves(kind: str, model_type: str) -> list[str]:
    """The last parts of the names that the matrices of a kind go by: with experts one by one, and in transformers 5's parameter."""
    matrix = f"layers.0.{kind}".replace(".experts.", ".experts.0.")
    leaf = _module(matrix, model_type).rpartition(".")[2]
    return list(dict.fromkeys([leaf, "down_proj"])) if kind == "experts.down" else [leaf]


def _whole(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha


class Adapted:
    """A tensor of transformers' model as peft computes with it: that of the base, and what a written folder adds."""

    def __init__(self, read: Callable[[], "torch.Tensor"], a: Stored | None, b: Stored | None, scale: float) -> None:
        self._read, self._a, self._b, self._scale = read, a, b, scale

    def __getitem__(self, key: slice | tuple[slice, ...]) -> "torch.Tensor":
        values = self._read()
        if self._a and self._b:
            values = values + self._scale * (self._b[:].float() @ self._a[:].float())
        return values[key]


def adapted(config: RunConfig, base: TensorSource, model_type: str, folder: Path) -> Iterator[tuple[str, Adapted]]:
    """Every tensor of transformers' model with the adapter in a folder, by its name."""
    about, found = read_object(folder / CONFIG), read_files([folder / WEIGHTS[0]])
    for matrix, (rows, columns) in shapes(config.model, config.moe):
        if matrix in ("embedding", "output"):
            rows = config.model.vocab_size
        name = hugging_face_name(matrix, FAMILIES[model_type].names)
        module = name.removesuffix(".weight")
        rank, alpha = of_module(about, module)
        read = functools.partial(_read, base, matrix, (rows,) if columns == 1 else (rows, columns))
        a, b = (found.get(_tensor(module, suffix)) for suffix in SIDES)
        yield name, Adapted(read, a, b, alpha / rank)


def _read(base: TensorSource, matrix: str, shape: tuple[int, ...]) -> "torch.Tensor":
    return base.read(matrix, Box(0, shape[0], 0, shape[1] if len(shape) > 1 else 1)).view(shape)
