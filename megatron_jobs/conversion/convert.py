"""Converts a checkpoint into a Hugging Face folder: Llama, Mistral, Qwen2, Qwen3, Mixtral or Qwen3-MoE, as its model is built.

    python -m megatron_jobs.conversion.convert CHECKPOINT OUTPUT_FOLDER [--no-check]              (what `mujina convert` calls)

Streams matrix by matrix, needs no process group and no GPU, and ends with a comparison of the logits of both sides on the
run's data. The folder gets its name when that comparison holds.

OUTPUT_FOLDER/conversion.json has `origin` (run, step, tokens and files of the checkpoint, with their checksums) and `agreement` (what the
comparison found; null with --no-check); README.md is the model's card.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_jobs.conversion.families import FAMILIES, config_values, family_of, hugging_face_name, older_spellings
from megatron_jobs.conversion.model_card import Exportable, model_card
from mujina.files import whole_folder
from mujina.matrices import Box
from mujina.user_input import UserError, command_line

if TYPE_CHECKING:
    import torch

    from mujina.tensor_files import Planned

RECORD = "conversion.json"  # where a folder comes from, and how well it agrees
SHARD_BYTES = 4 * 2**30


def main(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, such as RUN/checkpoints/latest, or RUN@PHASE")],
    output: Annotated[Path, typer.Argument(help="Hugging Face folder to write")],
    no_check: Annotated[bool, typer.Option("--no-check", help="leave out the comparison of logits at the end")] = False,
) -> None:
    """Writes a checkpoint as a Hugging Face folder and compares the logits of both."""
    from megatron_jobs.checkpoints.checkpoint import Checkpoint

    source = Exported(Checkpoint(checkpoint))
    if source.moe and source.moe.normalize_logits:
        if not no_check:
            raise UserError(
                "moe.normalize_logits (True) is known to no stock architecture, and the comparison of logits would fail: give --no-check "
                f"to write {source.architecture} all the same, for engines that you have taught it"
            )
        print(
            "WARNING: this model normalises its router's logits (moe.normalize_logits), and no stock inference engine does: transformers, "
            f"vLLM and others will load this folder as {source.architecture} without an error and COMPUTE SOMETHING ELSE"
        )
    if origin_of(output) == source.checkpoint.identity:
        print(f"{output}: is there already")
        return
    write(source, output, no_check)
    print(f"{output}: {source.architecture}, step {source.checkpoint.step}, {source.checkpoint.tokens:,} tokens")


def write(source: "Exported", output: Path, no_check: bool, **record: Any) -> None:
    """Writes the folder and compares the logits of both sides; `record` goes into its RECORD as well.

    Raises UserError, and leaves no folder, when they differ.
    """
    with whole_folder(output, RECORD) as folder:
        _write_weights(source, folder)
        write_companions(source, folder)
        agreement = None if no_check else _check(source, folder)
        (folder / "README.md").write_text(model_card(source.checkpoint, source.architecture, agreement), encoding="utf-8")
        record = {"origin": source.checkpoint.identity, "agreement": agreement} | record
        (folder / RECORD).write_text(json.dumps(record, indent=1))


class Exported:
    """A checkpoint as it is exported (`matrices.TensorSource`): every value rounded to the type that it is written in.

    A mixture that `upcycle.py` makes of a dense model may stand in for the checkpoint. What was imported and not trained comes back under
    the family's name, in the types and with the configuration that it had.
    """

    def __init__(self, checkpoint: Exportable) -> None:
        """Raises UserError when no stock architecture can hold the model."""
        self.checkpoint, self.model, self.moe = checkpoint, checkpoint.config.model, checkpoint.config.moe
        if self.moe:  # inference drops no tokens
            self.moe = self.moe.model_copy(update={"capacity_factor": None})
        self.origin: dict[str, Any] = checkpoint.ledger.untouched_import or {}
        self.model_type = self.origin["config"]["model_type"] if self.origin else family_of(self.model, self.moe)
        self.architecture = FAMILIES[self.model_type].architecture
        self.type = self.origin.get("type") or ("F32" if checkpoint.config.train.precision == "fp32" else "BF16")

    @property
    def dtype(self) -> str:
        """Of most of the tensors, as config.json spells it."""
        return str(_dtype(self.type)).removeprefix("torch.")

    def read(self, name: str, box: Box) -> "torch.Tensor":
        return self.checkpoint.read(name, box).to(self._dtype_of(name))

    def tensors(self) -> Iterator["Planned"]:
        """Every matrix under its Hugging Face name, the padding of the vocabulary cut off, to be read when it is written."""
        from mujina.tensor_files import Planned

        names = FAMILIES[self.model_type].names
        for name, (rows, columns) in self.checkpoint.shapes.items():
            if name in ("embedding", "output"):
                rows = self.model.vocab_size
            shape = (rows,) if columns == 1 else (rows, columns)
            read = partial(self.read, name, Box(0, rows, 0, columns))
            yield Planned(hugging_face_name(name, names), shape, self._dtype_of(name), read)

    def _dtype_of(self, name: str) -> "torch.dtype":
        return _dtype(self.origin.get("other_types", {}).get(name, self.type))


def _dtype(safetensors_type: str) -> "torch.dtype":
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[safetensors_type]


def _write_weights(source: Exported, folder: Path) -> None:
    from mujina.tensor_files import write_shards

    write_shards(folder, list(source.tensors()), SHARD_BYTES, "converting")


def write_companions(source: Exported, folder: Path) -> None:
    """Configuration, generation configuration, tokenizer and chat template."""
    from transformers import AutoConfig, GenerationConfig

    from tokenization.load import load as load_tokenizer

    run = source.checkpoint.config
    tokenizer = load_tokenizer(run.tokenizer)
    if source.origin:
        respelled = ("torch_dtype", "rope_theta", "rope_scaling")  # of older folders, see `older_spellings`
        values = {name: value for name, value in source.origin["config"].items() if name not in respelled}
    else:
        values = {"max_position_embeddings": max(phase.sequence_length for phase in run.phases)}
        values |= {"bos_token_id": None, "eos_token_id": tokenizer.eod_id}
        if source.model_type in ("mistral", "mixtral"):
            values["sliding_window"] = None
    values |= config_values(source.model_type, source.model, source.moe) | {"dtype": source.dtype}
    AutoConfig.for_model(**values | {"model_type": source.model_type}).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | older_spellings(values), indent=2))
    generation = {"eos_token_id": [tokenizer.eod_id, tokenizer.end_of_turn_id], "pad_token_id": tokenizer.eod_id}
    GenerationConfig(**source.origin.get("generation_config", generation)).save_pretrained(folder)
    tokenizer.save_hf(folder)


def _check(source: Exported, folder: Path) -> dict[str, Any]:
    """Loads the folder as a user would and compares, on the first samples of the run."""
    from megatron_jobs.conversion import agreement

    tokens = agreement.samples(source.checkpoint.config)[:, : source.origin.get("config", {}).get("sliding_window")]
    return agreement.compare_with_transformers(source, folder, tokens, "conversion").as_dict()


def origin_of(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / RECORD).read_text())["origin"]
    except (OSError, ValueError, KeyError):
        return None


if __name__ == "__main__":
    command_line(main)
