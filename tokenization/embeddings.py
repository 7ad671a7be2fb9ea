"""Embedding rows for new pieces, written into a copy of a Hugging Face model's safetensors without holding the model in memory."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mujina.tensor_files import METADATA, header, read_header
from mujina.user_input import UserError

if TYPE_CHECKING:
    from tokenization.tokenizer import Tokenizer

# Input and output embeddings, as Llama and Mixtral, GPT-2 and GPT-NeoX name them.
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias", "wte.weight", "embed_in.weight", "embed_out.weight")
INDEX = "model.safetensors.index.json"


def extend_embeddings(source: Path, folder: Path, first_id: int, old_ids: list[list[int]]) -> int:
    """Copies `source`'s shards into `folder` with a row for each new piece; returns the number of rows (the model's vocab_size).

    Piece first_id + k gets the mean of the rows old_ids[k] (Yao et al. 2021, "Adapt-and-Distill"), computed in float32. All other bytes
    stay as they are. Rows that pad the old embedding beyond `first_id` stand for no piece, and are used up before the embedding grows.
    A first_id of 0 replaces the vocabulary: nothing of the old embedding stays.
    Raises UserError when there are no safetensors, no embedding that we know by its name, or fewer rows than pieces.
    """
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise UserError(f"{source}: holds no *.safetensors: save the model with save_pretrained of transformers first")
    extended = [extend_shard(shard, folder / shard.name, first_id, old_ids) for shard in shards]
    rows = {num_rows for num_rows in extended if num_rows is not None}
    if len(rows) != 1:
        raise UserError(f"{source}: {'its embeddings differ in length' if rows else 'has no tensor ' + ' or '.join(EMBEDDINGS)}")
    if (source / INDEX).exists():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        headers = [read_header(folder / shard.name)[0] for shard in shards]
        tensors = [tensor for about in headers for name, tensor in about.items() if name != METADATA]
        total = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors)
        index["metadata"] = index.get("metadata", {}) | {"total_size": total}
        if "total_parameters" in index["metadata"]:
            index["metadata"]["total_parameters"] = sum(prod(tensor["shape"]) for tensor in tensors)
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return rows.pop()


def respell(new: "Tokenizer", old: "Tokenizer") -> list[list[int]]:
    """How `old` spells each piece of `new`: ids by the piece's id, never empty; for `extend_embeddings` with a first_id of 0.

    The end-of-document token is the old one, a control or chat piece of the same name too; any other is spelled as text, so that
    `<|user|>` starts from what its letters mean.
    """
    control = {old.piece(token): token for token in range(old.vocab_size) if old.bytes_of(token) is None} | {
        new.piece(new.eod_id): old.eod_id
    }
    result = []
    for token in range(new.vocab_size):
        data, piece = new.bytes_of(token), new.piece(token)
        if data is None:
            ids = [control[piece]] if piece in control else old.encode(piece)
        else:
            ids = old.encode_bytes(data)
        result.append(ids or [old.eod_id])  # a normalizer may leave nothing of a character
    return result


def extend_shard(source: Path, target: Path, first_id: int, old_ids: list[list[int]]) -> int | None:
    """Copies one file with its embeddings extended; returns their rows, None when it holds none."""
    try:
        old_header, start = read_header(source)
    except ValueError as error:
        raise UserError(f"{source}: is not a safetensors file ({error}): copy it again") from None
    embeddings = {name: tensor for name, tensor in old_header.items() if name.endswith(EMBEDDINGS)}
    if not embeddings:
        shutil.copyfile(source, target)
        return None
    lengths = {tensor["shape"][0] for tensor in embeddings.values()}
    if len(lengths) > 1 or min(lengths) < first_id:
        raise UserError(
            f"{source}: embeddings of {sorted(lengths)} rows do not fit a tokenizer of {first_id} pieces: give the one that belongs to it"
        )
    old_rows = lengths.pop()
    num_rows = max(old_rows, first_id + len(old_ids)) if first_id else len(old_ids)

    metadata = old_header.pop(METADATA, None)
    tensors = sorted(old_header.items(), key=lambda item: item[1]["data_offsets"])
    extended = []
    for name, tensor in tensors:
        shape, nbytes = tensor["shape"], tensor["data_offsets"][1] - tensor["data_offsets"][0]
        if name in embeddings:
            shape, nbytes = [num_rows, *shape[1:]], nbytes // old_rows * num_rows
        extended.append((name, tensor["dtype"], shape, nbytes))
    with source.open("rb") as old, target.open("wb") as new:
        new.write(header(extended, metadata))
        for name, tensor in tensors:
            begin, end = (start + offset for offset in tensor["data_offsets"])
            if name in embeddings:
                row = (end - begin) // old_rows
                _copy(old, new, begin, begin + row * first_id)
                new.write(_new_rows(source, name, old_ids))
                _copy(old, new, begin + row * (first_id + len(old_ids)), begin + row * min(old_rows, num_rows))
            else:
                _copy(old, new, begin, end)
    return num_rows


def _new_rows(shard: Path, name: str, old_ids: list[list[int]]) -> bytes:
    import torch
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as tensors:
        old = tensors.get_tensor(name)
    rows = torch.stack([old[ids].float().mean(dim=0) for ids in old_ids]).to(old.dtype)
    return bytes(rows.view(torch.uint8).numpy().tobytes())


def _copy(old: IO[bytes], new: IO[bytes], start: int, end: int) -> None:
    old.seek(start)
    for at in range(start, end, 1 << 24):
        new.write(old.read(min(1 << 24, end - at)))
