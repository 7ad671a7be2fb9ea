"""Converts a checkpoint into a Hugging Face folder: Llama, Mistral, Qwen2, Qwen3, Mixtral or Qwen3-MoE, as its model is built.

    python -m megatron_jobs.conversion.convert CHECKPOINT OUTPUT_FOLDER [--adapter] [--no-check]  (what `mujina convert` calls)

Streams matrix by matrix, needs no process group and no GPU, and ends with a comparison of the logits of both sides on the
run's data. The folder gets its name when that comparison holds.

OUTPUT_FOLDER/conversion.json has `origin` (run, step, tokens and files of the checkpoint, with their checksums), `agreement` (what the
comparison found; null with --no-check) and `files` (bytes and SHA-256 of what was written and compared); README.md is the model's card.
A folder is there already when all of that still holds.

A checkpoint of a run with an adapter is merged with its base, which has to be where `train.init_from` says; with --adapter it becomes a
folder of peft's (`peft.py`), whose logits are compared beside that base.

A model that began as a Hugging Face folder keeps what training did not change: its family, its special tokens, its defaults of sampling.
The context is the longest of that folder's, of the phases, and of those of the runs before; what ends a turn by the run's tokenizer is
added to what ended one there.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_jobs.conversion.families import FAMILIES, config_values, family_of, hindrance, hugging_face_name, older_spellings
from megatron_jobs.conversion.model_card import Exportable, model_card
from mujina.files import sha256_of, whole_folder
from mujina.matrices import Box
from mujina.user_input import UserError, command_line, read_object

if TYPE_CHECKING:
    import torch

    from megatron_jobs.conversion.merge import Merged
    from mujina.tensor_files import Planned
    from tokenization.tokenizer import Tokenizer

RECORD = "conversion.json"  # where a folder comes from, how well it agrees, and what is in it
CARDS = ("README.md", RECORD)  # a card may be written on by its readers
# What a config.json says of the tokenizer and of the context, in any family.
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
OF_ALL_FAMILIES = (*SPECIAL, "max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
SHARD_BYTES = 4 * 2**30


def main(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, such as RUN/checkpoints/latest, or RUN@PHASE")],
    output: Annotated[Path, typer.Argument(help="Hugging Face folder to write")],
    no_check: Annotated[bool, typer.Option("--no-check", help="leave out the comparison of logits at the end")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="of a run with an adapter: that alone, for peft, and not merged")] = False,
) -> None:
    """Writes a checkpoint as a Hugging Face folder and compares the logits of both."""
    from megatron_jobs.checkpoints.checkpoint import Checkpoint
    from megatron_jobs.conversion.merge import Merged

    found = Checkpoint(checkpoint)
    source = Exported(Merged(found) if found.config.adapter else found)
    if hindered := hindrance(source.model, source.moe):
        if not no_check:
            raise UserError(hindered)
        print(
            "WARNING: this model normalises its router's logits (moe.normalize_logits), and no stock inference engine does: transformers, "
            f"vLLM and others will load this folder as {source.architecture} without an error and COMPUTE SOMETHING ELSE"
        )
    if adapter and not isinstance(source.checkpoint, Merged):
        raise UserError(f"{checkpoint}: --adapter is for runs with an adapter, and this one has trained the whole model: leave it out")
    if is_written(output, source.checkpoint.identity | ({"form": "peft"} if adapter else {}), no_check):
        print(f"{output}: is there already")
        return
    if adapter:
        assert isinstance(source.checkpoint, Merged)
        write_adapter(source, source.checkpoint, output, no_check)
    else:
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
        _finish(source, folder, agreement, record)


def write_adapter(source: "Exported", merged: "Merged", output: Path, no_check: bool) -> None:
    """As `write`, a folder of peft's with the adapter alone."""
    from megatron_jobs.conversion import peft

    with whole_folder(output, RECORD) as folder:
        peft.write(merged.adapter, source.model_type, folder)
        _tokenizer(source).save_hf(folder)
        agreement = None if no_check else _check_adapter(source, merged, folder)
        _finish(source, folder, agreement, {"origin": merged.identity | {"form": "peft"}})


def _finish(source: "Exported", folder: Path, agreement: dict[str, Any] | None, record: dict[str, Any]) -> None:
    """The model's card, and RECORD with what `record` has beside, or in the place of, what is in every one."""
    card = model_card(source.checkpoint, source.architecture, agreement, "peft" if "form" in record.get("origin", {}) else "transformers")
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = {path.name: _facts(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name not in CARDS}
    record = {"origin": source.checkpoint.identity, "agreement": agreement, "files": files} | record
    (folder / RECORD).write_text(json.dumps(record, indent=1))


class Exported:
    """A checkpoint as it is exported (`matrices.TensorSource`): every value rounded to the type that it is written in.

    A mixture that `upcycle.py` makes of a dense model may stand in for the checkpoint. What was imported and not trained comes back in the
    types and with the configuration that it had.

    origin      the Hugging Face side of the folder that the model began as; empty without one
    is_origin   whether nothing was trained since
    """

    def __init__(self, checkpoint: Exportable) -> None:
        """Raises UserError when no stock architecture can hold the model."""
        self.checkpoint, self.model, self.moe = checkpoint, checkpoint.config.model, checkpoint.config.moe
        if self.moe:  # inference drops no tokens
            self.moe = self.moe.model_copy(update={"capacity_factor": None})
        ledger = checkpoint.ledger
        self.origin: dict[str, Any] = ledger.hugging_face or {}
        self.is_origin = ledger.untouched_import is not None
        self.model_type = family_of(self.model, self.moe, self.origin["config"]["model_type"] if self.origin else None)
        self.architecture = FAMILIES[self.model_type].architecture
        trained = "F32" if checkpoint.config.train.precision == "fp32" else "BF16"
        self.type: str = self.origin["type"] if self.is_origin else trained

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
        return _dtype(self.origin["other_types"].get(name, self.type) if self.is_origin else self.type)


def _dtype(safetensors_type: str) -> "torch.dtype":
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[safetensors_type]


def _write_weights(source: Exported, folder: Path) -> None:
    from mujina.tensor_files import write_shards

    write_shards(folder, list(source.tensors()), SHARD_BYTES, "converting")


def write_companions(source: Exported, folder: Path) -> None:
    """Configuration, generation configuration, tokenizer and chat template."""
    from transformers import AutoConfig

    run, tokenizer = source.checkpoint.config, _tokenizer(source)
    before = _config_before(source)
    values: dict[str, Any] = {"sliding_window": None} if source.model_type in ("mistral", "mixtral") else {}
    values |= {"bos_token_id": tokenizer.bos_id if tokenizer.begins_texts else None, "eos_token_id": tokenizer.eod_id}
    values |= before | config_values(source.model_type, source.model, source.moe) | {"dtype": source.dtype}
    longest = [source.checkpoint.ledger.context, *(phase.sequence_length for phase in run.phases)]
    config = AutoConfig.for_model(**values | {"model_type": source.model_type})
    config.max_position_embeddings = max([config.max_position_embeddings, *longest] if before else longest)
    config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | older_spellings(values), indent=2))
    (folder / "generation_config.json").write_text(json.dumps(_generation(source, tokenizer), indent=2))
    tokenizer.save_hf(folder)
    path = folder / "tokenizer_config.json"
    about = read_object(path) if path.exists() else {}
    if about.get("model_max_length", config.max_position_embeddings) < config.max_position_embeddings:
        path.write_text(json.dumps(about | {"model_max_length": config.max_position_embeddings}, ensure_ascii=False, indent=2))


def _tokenizer(source: Exported) -> "Tokenizer":
    from tokenization.load import load

    run = source.checkpoint.config
    return load(run.tokenizer, run.end_of_document, run.begin_documents)


def _config_before(source: Exported) -> dict[str, Any]:
    """What the config.json of the folder that the model began as says, without what `config_values` says anew."""
    config: dict[str, Any] = source.origin.get("config", {})
    if config.get("model_type") != source.model_type:  # upcycled since
        return {name: value for name, value in config.items() if name in OF_ALL_FAMILIES}
    respelled = ("torch_dtype", "rope_theta", "rope_scaling")  # of older folders, see `older_spellings`
    return {name: value for name, value in config.items() if name not in respelled}


def _generation(source: Exported, tokenizer: "Tokenizer") -> dict[str, Any]:
    """generation_config.json: what ends an answer, and the defaults of sampling that the model began with."""
    ends = [tokenizer.eod_id, tokenizer.end_of_turn_id]
    before: dict[str, Any] = source.origin.get("generation_config", {})
    if source.is_origin and before:
        return before
    if source.origin:
        config = source.origin["config"]
        before = {name: config[name] for name in SPECIAL if config.get(name) is not None} | before
        its_ends = before.get("eos_token_id") or []
        ends = [*(its_ends if isinstance(its_ends, list) else [its_ends]), *ends]
    else:
        before = {"pad_token_id": tokenizer.eod_id}
    before.pop("_from_model_config", None)  # it says more now
    return before | {"eos_token_id": list(dict.fromkeys(token for token in ends if isinstance(token, int)))}


def _check(source: Exported, folder: Path) -> dict[str, Any]:
    """Loads the folder as a user would and compares, on the first samples of the run."""
    from megatron_jobs.conversion import agreement

    tokens = agreement.samples(source.checkpoint.config)[:, : _config_before(source).get("sliding_window")]
    return agreement.compare_with_transformers(source, folder, tokens, "conversion").as_dict()


def _check_adapter(source: Exported, merged: "Merged", folder: Path) -> dict[str, Any]:
    """Compares the model that the run has trained with transformers' base and what peft adds to it, out of the files that were written."""
    from megatron_jobs.conversion import agreement, peft
    from megatron_jobs.engine import groups

    tokens = agreement.samples(source.checkpoint.config)[:, : _config_before(source).get("sliding_window")]
    with groups.alone():
        ours = agreement.megatron_logits(source.model, source.moe, merged, tokens[:, :-1])
    with TemporaryDirectory() as beside:
        write_companions(source, Path(beside))
        tensors = dict(peft.adapted(merged.config, merged.base, source.model_type, folder))
        theirs = agreement.transformers_logits(Path(beside), tensors, tokens[:, :-1], "conversion")
    found = agreement.compare(ours, theirs, tokens[:, 1:], agreement.BOUND)
    print(found)
    agreement.require(found, "conversion")
    return found.as_dict()


def is_written(folder: Path, identity: dict[str, Any], no_check: bool) -> bool:
    """Whether a folder is of this model, was compared unless `no_check`, and has every file as it was then. Reads all of it."""
    try:
        record = json.loads((folder / RECORD).read_text())
        if record["origin"] != identity or not (record["agreement"] or no_check):
            return False
        files: dict[str, Any] = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    changed = [name for name, facts in files.items() if not (folder / name).is_file() or _facts(folder / name) != facts]
    if changed:
        print(f"{folder}: {changed[0]} is not what was written: it is converted again")
    return not changed


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


if __name__ == "__main__":
    command_line(main)
