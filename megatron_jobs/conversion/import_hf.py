"""Makes a Hugging Face folder, or a GGUF file, ready for continued pretraining.

    python -m megatron_jobs.conversion.import_hf MODEL OUTPUT [--tokenizer FOLDER] [--no-check] [--checkpoint]     (`mujina import`)

OUTPUT/model.yaml is a preset with `model:`, `moe:`, `tokenizer:` and `train.init_from`: a run's YAML says `extends: OUTPUT/model.yaml`
and adds data and phases. OUTPUT holds the tokenizer, and weights where they differ from MODEL's: a GGUF file is unpacked to float32
(transformers and the package gguf read it), and --tokenizer gives the model another vocabulary, each new piece starting as the mean
of the pieces that spelled it. Ends with a comparison of the logits of megatron-core's model and of transformers'.

--checkpoint also writes the weights as a checkpoint, OUTPUT/checkpoints/latest: `mujina convert` makes the Hugging Face folder of it
that it came from, equal to the last bit of every tensor.
"""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_jobs.config import from_dict
from megatron_jobs.conversion import gguf
from megatron_jobs.data.ledger import Ledger, Origin
from mujina import strict_yaml
from mujina.files import whole_folder
from mujina.user_input import UserError, command_line, read_object, stand_in
from tokenization.embeddings import extend_embeddings, respell
from tokenization.load import load as load_tokenizer
from tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_jobs.conversion.hugging_face import HuggingFaceFolder

PRESET = "model.yaml"
# Fields of a generation_config.json that speak of ids.
OF_THE_VOCABULARY = re.compile(r".*_token_id|.*suppress_tokens|.*_words_ids|sequence_bias|_from_model_config")


def main(
    model: Annotated[
        Path, typer.Argument(help="Hugging Face folder (Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE), or a Llama's GGUF")
    ],
    output: Annotated[Path, typer.Argument(help="folder to write")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer folder that replaces the model's own")] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="leave out the comparison of logits at the end")] = False,
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="also write OUTPUT/checkpoints/latest, weights only")] = False,
) -> None:
    """Writes a preset, the tokenizer, and weights where they change, for runs that start from a Hugging Face model."""
    from megatron_jobs.conversion.hugging_face import HuggingFaceFolder
    from megatron_jobs.conversion.tensors import MERGE

    model, output = model.absolute(), output.absolute()  # a run may be started from any folder
    if not (model.is_file() or (model / "config.json").is_file()):
        if (model / "adapter_config.json").exists():
            raise UserError(f"{model}: is a PEFT adapter and no model: {MERGE}, or train it further (adapter.init_from)")
        problem = stand_in(model / "config.json") or f"{model}: is neither a GGUF file nor a folder with a config.json: check the path"
        raise UserError(problem)
    with whole_folder(output, PRESET) as partial:
        folder = model
        if model.is_file():
            folder = partial if tokenizer is None else partial / "before"
            gguf.unpack(model, folder)
        used = load_tokenizer(folder)
        if tokenizer is not None:
            old, used = used, load_tokenizer(tokenizer)
            _replace_vocabulary(folder, partial, old, used)
            shutil.rmtree(partial / "before", ignore_errors=True)
            folder = partial
        elif folder != partial:
            used.save_hf(partial)
        source = HuggingFaceFolder(folder)
        if used.vocab_size > source.model.vocab_size:
            raise UserError(
                f"{model}: its tokenizer has {used.vocab_size} pieces, more than its vocab_size ({source.model.vocab_size}): give the "
                f"model rows for them (resize_token_embeddings({used.vocab_size}) of transformers), or copy the tokenizer that is its own"
            )
        for remark in [*source.tensors.remarks, *filter(None, [used.remark])]:
            print(remark)
        if no_check:
            source.verify()
        else:
            from megatron_jobs.conversion import agreement

            agreement.compare_with_transformers(source, folder, agreement.texts(used)[:, : source.sliding_window], "import")
        if checkpoint:
            _write_checkpoint(source, partial / "checkpoints", output)
        (partial / PRESET).write_text(_preset(source, model, output, output if folder == partial else model), encoding="utf-8")
    print(f"{output}: a run's YAML may now say extends: {output / PRESET}, and add run, data, train and phases")


def _replace_vocabulary(folder: Path, target: Path, old: Tokenizer, new: Tokenizer) -> None:
    """Writes the model in `folder` into `target`, with embeddings and output rows for the pieces of `new` made of those of `old`."""
    num_rows = extend_embeddings(folder, target, 0, respell(new, old))
    special = {"bos_token_id": new.bos_id if new.begins_texts else None, "eos_token_id": new.eod_id, "pad_token_id": None}
    values = read_object(folder / "config.json") | special | {"vocab_size": num_rows}
    (target / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    path = folder / "generation_config.json"
    generation = read_object(path) if path.exists() else {}
    values = {name: value for name, value in generation.items() if not OF_THE_VOCABULARY.fullmatch(name)}
    values |= {"eos_token_id": list(dict.fromkeys([new.eod_id, new.end_of_turn_id])), "pad_token_id": new.eod_id}
    (target / path.name).write_text(json.dumps(values, indent=2), encoding="utf-8")
    new.save_hf(target)


def _write_checkpoint(source: "HuggingFaceFolder", folder: Path, output: Path) -> None:
    """The weights as a checkpoint of a run without phases; its ledger says where they come from, for a conversion back."""
    from megatron_jobs.checkpoints.checkpoint import write_weights
    from megatron_jobs.checkpoints.weights import shapes

    wanted = dict(shapes(source.model, source.moe))
    types = {source.dtype(name) for name in wanted}
    values = {
        "run": output,
        "tokenizer": output,
        "model": source.model.model_dump(mode="json"),
        "moe": source.moe and source.moe.model_dump(mode="json"),
        "data": {"folder": output},
        "train": {"micro_batch_size": 1, "precision": "fp32" if "F32" in types else "bf16"},
        "phases": [],
    }
    ledger = Ledger(origin=Origin(kind="imported", of=({"folder": str(source.folder)},), hugging_face=source.facts()))
    write_weights(folder, from_dict(values, str(output)), source, wanted, ledger, "importing")


def _preset(source: "HuggingFaceFolder", model: Path, output: Path, weights: Path) -> str:
    sections: dict[str, Any] = {"tokenizer": str(output), "model": source.model.model_dump(mode="json")}
    if source.moe:
        sections["moe"] = source.moe.model_dump(mode="json")
    sections["train"] = {"init_from": str(weights)}
    told = f"# {str(model)!r}, as mujina import has read it: a run's YAML says extends: and this file's path\n"
    return told + strict_yaml.dump(sections, sort_keys=False)


if __name__ == "__main__":
    command_line(main)
