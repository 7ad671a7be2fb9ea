"""A Hugging Face folder of one of the `families.py` as a source of weights, for `mujina import` and for `train.init_from`."""

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron_jobs.checkpoints.weights import shapes
from megatron_jobs.conversion.families import FAMILIES, hugging_face_name, read_config
from megatron_jobs.conversion.tensors import MERGE, Stored, Tensors, same
from mujina.files import sha256_of
from mujina.matrices import Box
from mujina.user_input import UserError, read_object, reading

DTYPES = ("F32", "F16", "BF16")
ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save)\.")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class HuggingFaceFolder:
    """A Hugging Face folder as a source of named matrices (`matrices.TensorSource`). Needs no process group.

    model_type       its key in FAMILIES
    model, moe       what config.json says, in our terms
    sliding_window   tokens that a token attends to at most, None without a bound
    tensors          by their stock names
    """

    def __init__(self, folder: Path) -> None:
        """Reads config.json and the headers of the weight files.

        Raises UserError when the model is none that can be trained here, or its tensors are not exactly those of config.json.
        """
        self.folder = folder
        with reading(folder / "config.json", "a configuration that transformers writes", "mend it, or take another model"):
            self.model_type, self.model, self.moe, self.sliding_window = read_config(folder / "config.json")
        self.tensors = Tensors(folder, FAMILIES[self.model_type])
        if self.model.tie_embeddings and HEAD in self.tensors:
            self._leave_out_head()
        if adapters := [name for name in self.tensors if ADAPTER.search(name)]:
            raise UserError(f"{folder}: holds {adapters[0]}, of a PEFT adapter: {MERGE}")
        rules = FAMILIES[self.model_type].names
        self._names: dict[str, str] = {}
        for name, (rows, columns) in shapes(self.model, self.moe):
            rows = self.model.vocab_size if name in ("embedding", "output") else rows
            self._names[name] = theirs = hugging_face_name(name, rules)
            self._check_tensor(theirs, [rows] if columns == 1 else [rows, columns])
        if left_over := sorted(set(self.tensors) - set(self._names.values())):
            raise UserError(
                f"{folder}: {len(left_over)} tensors have no place in the model of its config.json: {_some(left_over)}: "
                "they would be lost; is config.json the one of these weights?"
            )

    def _leave_out_head(self) -> None:
        if EMBEDDING not in self.tensors:
            self.tensors[EMBEDDING] = self.tensors[HEAD]
        if not same(self.tensors[HEAD], self.tensors[EMBEDDING]):
            raise UserError(
                f"{self.folder}: {HEAD} differs from {EMBEDDING}, and config.json says that they are one (tie_word_embeddings): write "
                f"false there where the model has a head of its own, else take {HEAD} out"
            )
        del self.tensors[HEAD]
        self.tensors.remarks.append(f"{self.folder}: {HEAD} is the embedding by another name, and is left out")

    def _check_tensor(self, name: str, shape: list[int]) -> None:
        if name not in self.tensors:
            remedy = "is config.json the one of these weights, and is every file there?"
            if name == HEAD:
                remedy = "where the embedding is the head, write tie_word_embeddings: true into config.json"
                architectures = read_object(self.folder / "config.json").get("architectures") or []
                if FAMILIES[self.model_type].architecture not in architectures:
                    remedy += f"; where {' and '.join(map(str, architectures)) or 'the model'} has none, take the causal language model"
            raise UserError(f"{self.folder}: has no tensor {name}, which the model of its config.json needs: {remedy}")
        found = self.tensors[name]
        if found.shape != shape:
            remedy = "is config.json the one of these weights?"
            if found.shape == shape[::-1]:
                remedy = "it is transposed: save it as torch.nn.Linear has it"
            raise UserError(f"{self.folder}: {name} has the shape {found.shape}, and by config.json it is {shape}: {remedy}")
        if found.dtype not in DTYPES:
            raise UserError(
                f"{self.folder}: {name} is of type {found.dtype}, only {', '.join(DTYPES)} are read: save the model in one of them"
            )

    def read(self, name: str, box: Box) -> torch.Tensor:
        """float32 on the CPU, shape [box.rows, box.columns]; only the box is read. Rows that pad the vocabulary are zero.

        Raises UserError where it holds NaN or Inf.
        """
        stored = self._stored(name)
        end = min(box.row1, stored.shape[0])
        result = torch.zeros(box.rows, box.columns)
        if end > box.row0:
            rows = stored[box.row0 : end] if len(stored.shape) == 1 else stored[box.row0 : end, box.column0 : box.column1]
            result[: end - box.row0] = rows.view(-1, box.columns)
        if not result.isfinite().all():
            nan, infinite = int(result.isnan().sum()), int(result.isinf().sum())
            raise UserError(
                f"{stored.file}: {stored.name} holds {nan:,} NaN and {infinite:,} Inf among {result.numel():,} values: nothing can be "
                "trained from that; take another save of the model"
            )
        return result

    def verify(self) -> None:
        """Reads everything. Raises UserError where there is NaN or Inf."""
        for name, theirs in self._names.items():
            rows, columns = (*self.tensors[theirs].shape, 1)[:2]
            self.read(name, Box(0, rows, 0, columns))

    def dtype(self, name: str) -> str:
        """The type of a matrix's values, one of DTYPES."""
        return self._stored(name).dtype

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Tells this folder from any other, by its checksums: reads all of it."""
        files = [self.folder / "config.json", *self.tensors.files]
        facts = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
        return {"folder": str(self.folder), "files": facts}

    def facts(self) -> dict[str, Any]:
        """What a conversion back needs, for ledgers: config, generation_config, the usual type of the tensors and the other types."""
        types = {name: self.dtype(name) for name in self._names}
        usual = Counter(types.values()).most_common(1)[0][0]
        files = {name: self.folder / f"{name}.json" for name in ("config", "generation_config")}
        found = {name: read_object(path) for name, path in files.items() if path.exists()}
        if self.sliding_window:  # a Mistral's has a value where config.json says nothing of it
            found["config"] = {"sliding_window": self.sliding_window} | found["config"]
        return {
            **found,
            "type": usual,
            "other_types": {name: dtype for name, dtype in types.items() if dtype != usual},
        }

    def _stored(self, name: str) -> Stored:
        return self.tensors[self._names[name]]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
