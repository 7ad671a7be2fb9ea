"""The tensors of a Hugging Face folder under the names that transformers writes, whoever has written them.

    files       model.safetensors, or several with model.safetensors.index.json; else pytorch_model.bin in the same two forms, tensors only
    wrappers    `_orig_mod.` (torch.compile), `module.` (DDP) and the like are left out; `model.` may stand twice, or not at all
    experts     of a layer may stand in one tensor, gate_up_proj [experts, 2 × width, hidden] and down_proj, as transformers 5 has them
    twice       a tensor that stands in two files counts once, where both are equal to the last bit

What is not as `save_pretrained` writes it is told in `Tensors.remarks`; what contradicts itself is refused by name.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_jobs.conversion.families import Family
from mujina.tensor_files import TYPES
from mujina.user_input import UserError, read_object, stand_in

ANEW = "save the model with save_pretrained of transformers"
MERGE = "merge it into its model first (merge_and_unload of peft), and save that with save_pretrained"
FILES = ("model.safetensors", "pytorch_model.bin")  # as transformers looks for them
COMPUTED = ".rotary_emb.inv_freq"  # a buffer that old folders have saved; it follows from rope_theta
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model")
EXPERTS = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?")
ROUTER = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight")


class Stored:
    """A tensor of a file, or the rows of one expert in it: `stored[rows, columns]` reads just these."""

    def __init__(self, file: Path, name: str, whole: Any, expert: int | None = None, rows: range | None = None) -> None:
        self.file, self.name, self._whole, self._expert = file, name, whole, expert
        self.shape: list[int] = list(whole.get_shape())
        self.dtype: str = whole.get_dtype()
        if expert is not None:
            assert rows is not None
            self._rows, self.shape = rows, [len(rows), *self.shape[2:]]

    def __getitem__(self, key: slice | tuple[slice, ...]) -> torch.Tensor:
        if self._expert is None:
            read: torch.Tensor = self._whole[key]
            return read
        rows, *columns = key if isinstance(key, tuple) else (key,)
        part = self._rows[rows]
        read = self._whole[(slice(self._expert, self._expert + 1), slice(part.start, part.stop), *columns)]
        return read[0]


class Tensors(dict[str, Stored]):
    """The tensors of a folder of a family, by their stock names.

    files      the weight files
    remarks    what was not as transformers writes it
    """

    def __init__(self, folder: Path, family: Family) -> None:
        """Reads the headers. Raises UserError where files are missing or damaged, or contradict each other."""
        super().__init__()
        self.files, index = _files(folder)
        found = list(_of_files(self.files))
        if index is not None:
            _check_index(folder, index, found)
        self.remarks: list[str] = []
        renamed: dict[str, str] = {}
        experts = Counter[str]()
        for stored in found:
            name = _stock_name(stored.name, family)
            if name != stored.name:
                renamed[stored.name] = name
            if family.moe_fields and (fused := EXPERTS.fullmatch(name)) and len(stored.shape) == 3:
                experts[fused[2]] += 1
                for its_name, part in _experts(fused[1], fused[2], stored, family):
                    self._add(folder, its_name, part)
            else:
                self._add(folder, name, stored)
        if renamed:
            theirs, ours = next(iter(renamed.items()))
            self.remarks.append(f"{folder}: {len(renamed)} tensors are read under stock names, such as {theirs} as {ours}")
        if experts:
            self.remarks.append(f"{folder}: the experts of {max(experts.values())} layers are read out of {' and '.join(sorted(experts))}")

    def _add(self, folder: Path, name: str, stored: Stored) -> None:
        if (other := self.get(name)) is not None and not same(other, stored):
            where = [f"{one.name} of {one.file.name}" for one in (other, stored)]
            raise UserError(
                f"{folder}: {name} is there twice with other values ({where[0]}, {where[1]}): remove the file that is not of this model, "
                "or save it anew with save_pretrained of transformers"
            )
        self.setdefault(name, stored)


def same(one: Stored, other: Stored) -> bool:
    """Whether two tensors are equal to the last bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(stored[:].contiguous().view(torch.uint8) for stored in (one, other)))


def read_files(files: list[Path]) -> dict[str, Stored]:
    """The tensors of files, by the names that they have there."""
    return {stored.name: stored for stored in _of_files(files)}


def _files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and what the index says of them: {tensor: file}. Raises UserError when one is missing."""
    for name in FILES:
        path = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name], None
        if path.exists():
            index = read_object(path, ANEW).get("weight_map")
            if not (isinstance(index, dict) and index) or not all(
                isinstance(file, str) and Path(file).name == file for file in index.values()
            ):
                raise UserError(f"{path}: has no weight_map of tensors to files beside it: {ANEW}")
            files = [folder / file for file in sorted(set(index.values()))]
            if missing := [file for file in files if not file.exists()]:
                raise UserError(stand_in(missing[0]) or f"{missing[0]}: is missing, and {path.name} names it: copy it too")
            return files, index
        for one in (folder / name, path):
            if problem := stand_in(one):
                raise UserError(problem)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: is a PEFT adapter and no model: {MERGE}, or train it further (adapter.init_from)")
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pth") for path in folder.glob(pattern))
    remedy = f"of {', '.join(others[:3])} it says what they are: copy {FILES[0]}.index.json too, or {ANEW}" if others else ANEW
    raise UserError(f"{folder / FILES[0]}: is missing, and {FILES[1]} too: {remedy}")


def _of_files(files: list[Path]) -> Iterator[Stored]:
    for file in files:
        tensors = _unpickled(file) if file.suffix == ".bin" else _slices(file)
        yield from (Stored(file, name, tensor) for name, tensor in tensors if not name.endswith(COMPUTED))


def _slices(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        tensors = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(stand_in(file) or f"{file}: is not a whole safetensors file ({error}): copy it again") from None
    return ((name, tensors.get_slice(name)) for name in tensors.keys())


class _Loaded:
    """A tensor of a .bin file, as safetensors gives those of its own."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return TYPES.get(str(self._tensor.dtype), str(self._tensor.dtype))

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self._tensor[key]


def _unpickled(file: Path) -> Iterator[tuple[str, Any]]:
    """Tensors alone are unpickled: no code of the file is run."""
    remedy = "copy it again, or load it with transformers where you trust it, and save it with save_pretrained"
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # of any kind: what is no pickle is read as one, instruction by instruction
        code = re.search(r"GLOBAL (\S+)", str(error))
        told = f"holds more than tensors ({code[1]})" if code else f"is damaged, or holds more than tensors ({type(error).__name__})"
        raise UserError(stand_in(file) or f"{file}: {told}: {remedy}") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{file}: holds a {type(tensors).__name__} and no tensors by their names: {remedy}")
    if others := [name for name, tensor in tensors.items() if not (isinstance(name, str) and isinstance(tensor, torch.Tensor))]:
        raise UserError(f"{file}: holds {others[0]}, which is no tensor with a name: {remedy}")
    return ((name, _Loaded(tensor)) for name, tensor in tensors.items())


def _is_zip(file: Path) -> bool:
    """Of today's kind, which can be mapped into memory."""
    with open(file, "rb") as stream:
        return stream.read(2) == b"PK"


def _check_index(folder: Path, index: dict[str, str], found: list[Stored]) -> None:
    """Raises UserError where the index and its files disagree."""
    there = {(stored.name, stored.file.name) for stored in found}
    remedy = f"copy both again from where they belong together, or {ANEW}"
    for name, file in index.items():
        if (name, file) not in there and not name.endswith(COMPUTED):
            raise UserError(f"{folder}: the index says that {name} is in {file}, and it is not there: {remedy}")
    for name, file in sorted(there):
        if name not in index:
            raise UserError(f"{folder / file}: holds {name}, of which the index says nothing: {remedy}")


def _stock_name(name: str, family: Family) -> str:
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts[:2] in (["model", "model"], ["model", "lm_head"]):
        parts = parts[1:]
    if parts[0] in ("layers", "embed_tokens", "norm"):
        parts = ["model", *parts]
    name = ".".join(parts)
    router = ROUTER.fullmatch(name) if family.moe_fields else None
    return family.names["layers.*.router"].replace("model.layers.*", router[1]) if router else name


def _experts(layer: str, kind: str, stored: Stored, family: Family) -> Iterator[tuple[str, Stored]]:
    """The matrices of each expert in one tensor of all."""
    num_experts, height, _ = stored.shape
    rows = {"down": range(height)} if kind == "down_proj" else {"gate": range(height // 2), "up": range(height // 2, height)}
    for expert in range(num_experts):
        for ours, part in rows.items():
            name = family.names[f"layers.*.experts.*.{ours}"].replace("model.layers.*", layer).replace("*", str(expert))
            yield name, Stored(stored.file, stored.name, stored._whole, expert, part)
