"""Converts a checkpoint into a Hugging Face folder: Llama, or stock Mixtral for a mixture.

    python -m megatron_jobs.convert CHECKPOINT OUTPUT_FOLDER [--no-check]              (what `mujina convert` calls)

Streams matrix by matrix, needs no process group and no GPU, and ends with a comparison of the logits of both sides on the
run's data. The folder gets its name when that comparison holds.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from files import whole_folder
from megatron_jobs.hugging_face import LLAMA, MIXTRAL, compare, config_values, hugging_face_name
from user_input import run

if TYPE_CHECKING:
    import torch

    from megatron_jobs.checkpoint import Checkpoint
    from megatron_jobs.weights import Box

RECORD = "conversion.json"  # where a folder comes from, and how well it agrees
SHARD_BYTES = 4 * 2**30


def main(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, such as RUN/checkpoints/latest")],
    output: Annotated[Path, typer.Argument(help="Hugging Face folder to write")],
    no_check: Annotated[bool, typer.Option("--no-check", help="leave out the comparison of logits at the end")] = False,
) -> None:
    """Writes a checkpoint as a Hugging Face folder and compares the logits of both."""
    from megatron_jobs.checkpoint import Checkpoint

    source = Checkpoint(checkpoint)
    if _origin_of(output) == source.identity:
        print(f"{output}: is there already")
        return
    with whole_folder(output, RECORD) as partial:
        _write_weights(source, partial)
        _write_companions(source, partial)
        agreement = None if no_check else _check(source, partial)
        (partial / RECORD).write_text(json.dumps({"origin": source.identity, "agreement": agreement}, indent=1))
    print(f"{output}: step {source.step}, {source.tokens:,} tokens")


class Exported:
    """The checkpoint as it is exported: every value rounded to the type of the export."""

    def __init__(self, source: "Checkpoint") -> None:
        import torch

        self.source = source
        self.dtype = torch.bfloat16 if source.config.train.precision == "bf16" else torch.float32

    def read(self, name: str, box: "Box") -> "torch.Tensor":
        return self.source.read(name, box).to(self.dtype)


def _tensors(source: "Checkpoint") -> Iterator[tuple[str, "torch.Tensor"]]:
    """Hugging Face name and tensor of every matrix, the padding of the vocabulary cut off."""
    from megatron_jobs.weights import Box

    rules = LLAMA if source.config.moe is None else MIXTRAL
    exported = Exported(source)
    for name, (rows, columns) in source.shapes.items():
        if name in ("embedding", "output"):
            rows = source.config.model.vocab_size
        tensor = exported.read(name, Box(0, rows, 0, columns))
        yield hugging_face_name(name, rules), tensor.flatten() if name.endswith("_norm") else tensor


def _write_weights(source: "Checkpoint", folder: Path) -> None:
    from rich.progress import track
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def write() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in track(_tensors(source), description="converting", total=len(source.shapes)):
        if pending and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for number, name in enumerate(names):
        os.rename(folder / f"shard-{number}", folder / name)
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _write_companions(source: "Checkpoint", folder: Path) -> None:
    """Configuration, generation configuration, tokenizer and chat template."""
    from transformers import GenerationConfig, LlamaConfig, MixtralConfig

    from tokenization.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(source.config.tokenizer)
    model, moe = source.config.model, source.config.moe
    kind, architecture = (LlamaConfig, "LlamaForCausalLM") if moe is None else (MixtralConfig, "MixtralForCausalLM")
    config = kind(
        **config_values(model, moe),
        architectures=[architecture],
        max_position_embeddings=max(phase.sequence_length for phase in source.config.phases),
        bos_token_id=None,
        eos_token_id=tokenizer.eod_id,
        dtype="bfloat16" if source.config.train.precision == "bf16" else "float32",
    )
    config.save_pretrained(folder)
    # Readers older than transformers 5 look for the base of the rotary positions here.
    values = json.loads((folder / "config.json").read_text()) | {"rope_theta": model.rope_theta}
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    GenerationConfig(eos_token_id=[tokenizer.eod_id, tokenizer.end_of_turn_id], pad_token_id=tokenizer.eod_id).save_pretrained(folder)
    tokenizer.save_hf(folder)


def _check(source: "Checkpoint", folder: Path) -> dict[str, Any]:
    """Loads the folder as a user would and compares, on the first samples of the run."""
    from megatron_jobs import gate

    return compare(source.config, Exported(source), folder, gate.samples(source.config), "conversion").as_dict()


def _origin_of(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / RECORD).read_text())["origin"]
    except (OSError, ValueError, KeyError):
        return None


if __name__ == "__main__":
    run(main)
