"""Files of rows cut into blocks of whole lines, so that one process reads and others parse.

Where a file is cut depends on its bytes alone, not on how many processes there are: the blocks of a file that was read before are the
same again. What a row may be, and how a mistake in it is explained, is for `files.read_rows` to say.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pydantic_core

from mujina.files import open_rows, read_rows
from mujina.user_input import UserError

# Small blocks first, so that a small source keeps all cores busy; large ones later, so that a large source has few of them.
FIRST_BLOCK, LAST_BLOCK = 1 << 19, 1 << 25  # bytes
BLOCKS_OF_A_SIZE = 32
# Of a row that the `datasets` library gives, what a document is made of.
FIELDS = ("text", "messages", "id", "source", "kind", "origin", "language", "licence", "teacher")


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of `path`: the bytes, and the number (from 1) of the first."""

    path: str
    first_line: int
    lines: bytes


def read_blocks(path: str) -> Iterator[Block]:
    """Cuts a file of rows (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or a `datasets:` name into blocks. Raises UserError if unreadable."""
    from_library = path.startswith("datasets:") or path.endswith(".parquet")
    first_line = 1
    for lines in _cut(_library_lines(path)) if from_library else _cut_file(path):
        yield Block(path, first_line, lines)
        first_line += lines.count(b"\n")


def rows_of(block: Block) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, row) of the lines that are not blank. Raises UserError, naming file and line, on what is no row."""
    for number, line in enumerate(io.BytesIO(block.lines), start=block.first_line):
        if not line.strip():
            continue
        try:
            row = pydantic_core.from_json(line)
        except ValueError:
            row = None
        yield number, row if isinstance(row, dict) else _strictly(block.path, number)


def _strictly(path: str, wanted: int) -> dict[str, Any]:
    """The row as the strict reader has it, or its complaint: slow, because it starts at the top, but only a mistake comes here."""
    return next(row for number, row in read_rows(path) if number == wanted)


def _cut_file(path: str) -> Iterator[bytes]:
    rest, sizes = b"", _sizes()
    try:
        with open_rows(path) as stream:
            while data := stream.read(next(sizes)):
                head, newline, tail = data.rpartition(b"\n")
                if newline:
                    yield rest + head + newline
                    rest = tail
                else:
                    rest += data  # a line longer than a block
    except OSError:
        for _ in read_rows(path):  # names what is wrong, and after which line
            pass
        raise
    if rest:
        yield rest


def _cut(lines: Iterator[bytes]) -> Iterator[bytes]:
    sizes, held, held_bytes = _sizes(), list[bytes](), 0
    size = next(sizes)
    for line in lines:
        held.append(line)
        held_bytes += len(line)
        if held_bytes >= size:
            yield b"".join(held)
            held, held_bytes, size = [], 0, next(sizes)
    if held:
        yield b"".join(held)


def _sizes() -> Iterator[int]:
    size = FIRST_BLOCK
    while True:
        for _ in range(BLOCKS_OF_A_SIZE):
            yield size
        size = min(2 * size, LAST_BLOCK)


def _library_lines(path: str) -> Iterator[bytes]:
    """The rows of a parquet file or `datasets:` name as lines of JSON."""
    import datasets

    try:
        if path.startswith("datasets:"):
            name, _, split = path.removeprefix("datasets:").partition(":")
            rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        else:
            rows = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
        for row in rows:
            # What JSON cannot hold is no text either: the reader of the documents complains about the null.
            yield json.dumps({key: row[key] for key in FIELDS if key in row}, ensure_ascii=False, default=lambda _: None).encode() + b"\n"
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: cannot be read by the datasets library ({error}): check the name, the split and the file") from None
