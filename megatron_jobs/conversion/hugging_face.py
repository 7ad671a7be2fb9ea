"""A Hugging Face folder of one of the `families.py` as a source of weights, for `mujina import` and for `train.init_from`."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_jobs.checkpoints.weights import shapes
from megatron_jobs.conversion.families import FAMILIES, hugging_face_name, read_config
from mujina.matrices import Box
from mujina.user_input import UserError, read_object, reading

DTYPES = ("F32", "F16", "BF16")
COMPUTED = ".rotary_emb.inv_freq"  # a buffer that old folders have saved; it follows from rope_theta


class HuggingFaceFolder:
    """A Hugging Face folder as a source of named matrices (`matrices.TensorSource`). Needs no process group.

    model_type       its key in FAMILIES
    model, moe       what config.json says, in our terms
    sliding_window   tokens that a token attends to at most, None without a bound
    """

    def __init__(self, folder: Path) -> None:
        """Reads config.json and the headers of the safetensors.

        Raises UserError when the model is none that can be trained here, or its tensors are not exactly those of config.json.
        """
        self.folder = folder
        with reading(folder / "config.json", "a configuration that transformers writes", "mend it, or take another model"):
            self.model_type, self.model, self.moe, self.sliding_window = read_config(folder / "config.json")
        self._slices: dict[str, Any] = {}
        for file in weight_files(folder):
            try:
                tensors = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: is not a whole safetensors file ({error}): copy this file again") from None
            self._slices |= {name: tensors.get_slice(name) for name in tensors.keys() if not name.endswith(COMPUTED)}
        rules = FAMILIES[self.model_type].names
        self._names: dict[str, str] = {}
        for name, (rows, columns) in shapes(self.model, self.moe):
            rows = self.model.vocab_size if name in ("embedding", "output") else rows
            self._names[name] = theirs = hugging_face_name(name, rules)
            self._check_tensor(theirs, [rows] if columns == 1 else [rows, columns])
        if left_over := sorted(set(self._slices) - set(self._names.values())):
            raise UserError(
                f"{folder}: {len(left_over)} tensors have no place in the model of its config.json: {_some(left_over)}: "
                "they would be lost; is config.json the one of these weights?"
            )

    def _check_tensor(self, name: str, shape: list[int]) -> None:
        if name not in self._slices:
            raise UserError(f"{self.folder}: has no tensor {name}, which its config.json asks for: take the config.json of these weights")
        found = self._slices[name]
        if found.get_shape() != shape:
            raise UserError(f"{self.folder}: {name} has the shape {found.get_shape()}, and by config.json it is {shape}: mend config.json")
        if found.get_dtype() not in DTYPES:
            raise UserError(f"{self.folder}: {name} is of type {found.get_dtype()}, only {', '.join(DTYPES)} are read: convert the folder")

    def read(self, name: str, box: Box) -> torch.Tensor:
        """float32 on the CPU, shape [box.rows, box.columns]; only the box is read. Rows that pad the vocabulary are zero."""
        stored = self._slices[self._names[name]]
        shape = stored.get_shape()
        end = min(box.row1, shape[0])
        result = torch.zeros(box.rows, box.columns)
        if end > box.row0:
            rows = stored[box.row0 : end] if len(shape) == 1 else stored[box.row0 : end, box.column0 : box.column1]
            result[: end - box.row0] = rows.view(-1, box.columns)
        return result

    def dtype(self, name: str) -> str:
        """The type of a matrix's values, one of DTYPES."""
        return self._slices[self._names[name]].get_dtype()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises UserError when one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with reading(index, "an index of safetensors", "take the one of these weights"):
            names = sorted(set(read_object(index)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).exists():
            raise UserError(
                f"{folder / name}: is missing: bring it, or save the model with save_pretrained of transformers, as safetensors"
            )
    return [folder / name for name in names]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
