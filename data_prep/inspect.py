"""What is in a token binary: the facts of its manifest, statistics, and documents as text.

    python -m data_prep.inspect PREFIX [--documents 3] [--from N] [--tokenizer FOLDER] [--verify]        (= mujina inspect)

PREFIX is the path without .bin, such as runs/quickstart/data/web_ja. Without a tokenizer, documents are shown as ids.
"""

import re
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.indexed import Channel, TokenBinary, open_binary, path_of
from mujina.user_input import UserError, command_line
from tokenization.load import load
from tokenization.tokenizer import Tokenizer

COUNTED = 100_000_000  # tokens that the most frequent pieces are counted in, from the start: about a second
CHUNK = 1 << 22  # tokens counted at once
FREQUENT = 20  # pieces shown
SHOWN_CHARACTERS, SHOWN_IDS = 1_000, 100  # of one document
# All but tab and newline: a document must not be able to move the cursor or colour the terminal.
TERMINAL_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def facts(binary: TokenBinary) -> list[tuple[str, str]]:
    """(name, value) of what the manifest says and the index shows."""
    manifest, lengths = binary.manifest, binary.lengths
    return [
        ("kind, origin", f"{manifest.kind}, {manifest.origin}"),
        ("languages", _counts(manifest.languages)),
        ("licences", _counts(manifest.licences)),
        ("teachers", _counts(manifest.teachers) or "none"),
        ("documents", f"{manifest.num_documents:,}" + (f"; {manifest.num_empty:,} of nothing were left out" if manifest.num_empty else "")),
        *([("tokens of answers", f"{manifest.num_answer_tokens:,}")] if manifest.num_answer_tokens else []),
        *([("damaged dialogues", f"{manifest.num_damaged:,} were passed over")] if manifest.num_damaged else []),
        ("begin with bos_token", f"{manifest.num_begun:,} documents"),
        ("tokens", f"{manifest.num_tokens:,}, an end-of-document token each document included"),
        ("tokens per document", f"mean {lengths.mean():,.1f}, median {np.median(lengths):,.1f}, max {lengths.max():,}"),
        ("characters per token", f"{manifest.num_characters / manifest.num_tokens:.2f}"),
        ("bytes", f"{manifest.num_tokens * np.dtype(manifest.dtype).itemsize:,} as {manifest.dtype}"),
        ("tokenizer", f"{manifest.vocab_size:,} pieces, {manifest.tokenizer_hash[:12]}"),
        *((f"channel {name}", _values(channel, binary.channel(name))) for name, channel in manifest.channels.items()),
    ]


def _values(channel: Channel, values: np.ndarray) -> str:
    chunks = [values[start : start + CHUNK] for start in range(0, values.size, CHUNK)]
    mean = sum(float(chunk.sum(dtype=np.float64)) for chunk in chunks) / values.size
    least, most = min(float(chunk.min()) for chunk in chunks), max(float(chunk.max()) for chunk in chunks)
    return f"{values.size:,} {channel.dtype}, one per {channel.per}: min {least:.4g}, mean {mean:.4g}, max {most:.4g}"


def frequent_pieces(binary: TokenBinary, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """(piece, its share of the tokens), the most frequent first; of equally frequent ones the lower id first."""
    tokens = binary.tokens[:COUNTED]
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, tokens.size, CHUNK):
        chunk = tokens[start : start + CHUNK]
        if chunk.min() < 0 or chunk.max() >= counts.size:
            path = path_of(binary.prefix, "bin")
            raise UserError(f"{path}: holds ids that none of the {counts.size:,} pieces has: it is damaged, prepare the source again")
        counts += np.bincount(chunk, minlength=counts.size)
    order = np.argsort(-counts, kind="stable")[:FREQUENT]
    return [(tokenizer.piece(int(token)), float(counts[token] / tokens.size)) for token in order if counts[token]]


def show_document(binary: TokenBinary, index: int, tokenizer: Tokenizer | None) -> str:
    """One document as text (as ids without a tokenizer), cut when it is long. Its end-of-document token is left out."""
    ids = binary.document(index)[:-1]
    if tokenizer is None:
        return " ".join(map(str, ids[:SHOWN_IDS])) + _rest(ids.size - SHOWN_IDS, "ids")
    text = tokenizer.decode(ids.tolist())
    shown = TERMINAL_CONTROLS.sub(lambda match: f"\\x{ord(match.group()):02x}", text[:SHOWN_CHARACTERS])
    return shown + _rest(len(text) - SHOWN_CHARACTERS, "characters")


def _rest(left_out: int, unit: str) -> str:
    return f" … and {left_out:,} {unit}" if left_out > 0 else ""


def _counts(counts: dict[str, int]) -> str:
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {count:,}" for name, count in islice(ranked, 10))
    return named + _rest(len(ranked) - 10, "more")


def main(
    prefix: Annotated[Path, typer.Argument(help="path of a binary without .bin, such as runs/quickstart/data/web_ja")],
    documents: Annotated[int, typer.Option(min=0, help="how many documents to show")] = 3,
    first: Annotated[int, typer.Option("--from", min=0, help="number of the first one, counted from 0")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="read everything and compare it with the manifest's checksums")] = False,
    tokenizer_folder: Annotated[
        Path | None, typer.Option("--tokenizer", help="folder of the tokenizer that the binary was prepared with: shows text and pieces")
    ] = None,
) -> None:
    """Shows what is in a token binary: facts, statistics, and some documents as text."""
    binary, tokenizer = open_binary(prefix), None
    if tokenizer_folder is not None:
        tokenizer = load(tokenizer_folder, binary.manifest.end_of_document, binary.manifest.begin_documents)
        open_binary(prefix, tokenizer.hash)
    if documents and first >= binary.manifest.num_documents:
        raise UserError(f"--from {first}: {prefix} holds the documents 0 to {binary.manifest.num_documents - 1:,}: name one of them")
    console = Console(soft_wrap=True)
    table = Table("", str(prefix), show_header=True)
    for name, value in facts(binary):
        table.add_row(name, Text(value))
    console.print(table)
    if tokenizer is not None:
        counted = min(COUNTED, binary.manifest.num_tokens)
        console.print(Text(f"\nmost frequent pieces (of the first {counted:,} tokens):"))
        console.print(Text("  ".join(f"{piece!r} {share:.2%}" for piece, share in frequent_pieces(binary, tokenizer))))
    for index in range(first, min(first + documents, binary.manifest.num_documents)):
        console.print(Text(f"\n── document {index:,}, {binary.lengths[index]:,} tokens", style="bold"))
        console.print(Text(show_document(binary, index, tokenizer)))
    if verify:
        binary.verify()
        console.print("\nverified: all files have the manifest's checksums")


if __name__ == "__main__":
    command_line(main)
