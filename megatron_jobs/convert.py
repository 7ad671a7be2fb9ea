"""Converts a checkpoint into a Hugging Face folder: Llama, or stock Mixtral for a mixture.

    python -m megatron_jobs.convert CHECKPOINT OUTPUT_FOLDER [--no-check]              (what `mujina convert` calls)

Streams matrix by matrix, needs no process group and no GPU, and ends with a comparison of the logits of both sides on the
run's data. The folder gets its name when that comparison holds.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from files import whole_folder
from user_input import UserError, run

if TYPE_CHECKING:
    import torch

    from megatron_jobs.checkpoint import Checkpoint
    from megatron_jobs.weights import Box

RECORD = "conversion.json"  # where a folder comes from, and how well it agrees
BOUND = 1e-4
SHARD_BYTES = 4 * 2**30

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


def hugging_face_name(name: str, rules: dict[str, str]) -> str:
    """The name of a matrix on the other side. Raises KeyError when no rule covers it."""
    numbers = iter(re.findall(r"(?<=\.)\d+(?=\.)", name))
    return re.sub(r"\*", lambda _: next(numbers), rules[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)])


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
    common: dict[str, Any] = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_size,
        max_position_embeddings=max(phase.sequence_length for phase in source.config.phases),
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        initializer_range=model.init_std,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eod_id,
        dtype="bfloat16" if source.config.train.precision == "bf16" else "float32",
    )
    if moe is None:
        config = LlamaConfig(**common, architectures=["LlamaForCausalLM"])
    else:
        config = MixtralConfig(
            **common,
            architectures=["MixtralForCausalLM"],
            num_local_experts=moe.num_experts,
            num_experts_per_tok=moe.top_k,
            router_aux_loss_coef=moe.load_balancing_loss,
            sliding_window=None,
        )
    config.save_pretrained(folder)
    # Readers older than transformers 5 look for the base of the rotary positions here.
    values = json.loads((folder / "config.json").read_text()) | {"rope_theta": model.rope_theta}
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    GenerationConfig(eos_token_id=[tokenizer.eod_id, tokenizer.end_of_turn_id], pad_token_id=tokenizer.eod_id).save_pretrained(folder)
    tokenizer.save_hf(folder)


def _check(source: "Checkpoint", folder: Path) -> dict[str, Any]:
    """Loads the folder as a user would and compares. Raises UserError when keys are left over or missing, or logits differ."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_jobs import gate, parallel

    tokens = gate.samples(source.config)
    with parallel.alone():
        before = gate.megatron_logits(source.config.model, source.config.moe, Exported(source), tokens[:, :-1])
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[trouble]:
            raise UserError(f"conversion: transformers reports {trouble}: {sorted(info[trouble])}: this is a defect, please report it")
    with torch.no_grad():
        after = theirs.eval()(tokens[:, :-1]).logits.float()
    agreement = gate.compare(before, after, tokens[:, 1:], BOUND)
    print(agreement)
    gate.require(agreement, "conversion")
    return agreement.as_dict()


def _origin_of(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / RECORD).read_text())["origin"]
    except (OSError, ValueError, KeyError):
        return None


if __name__ == "__main__":
    run(main)
