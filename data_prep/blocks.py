"""Files of rows cut into blocks of whole lines, so that one process reads and others parse.

Where a file is cut depends on its bytes alone, not on how many processes there are: the blocks of a file that was read before are the
same again. `data_prep.row` says what a row is.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.row import LONGEST_OF_OURS, Row, fields_of, row_of
from data_prep.steps.read import NOTHING, records
from mujina.files import LONGEST, open_rows, read_rows, too_long
from mujina.user_input import UserError

# Small blocks first, so that a small source keeps all cores busy; large ones later, so that a large source has few of them.
FIRST_BLOCK, LAST_BLOCK = 1 << 19, 1 << 25  # bytes
BLOCKS_OF_A_SIZE = 32


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of `path`: the bytes, and the number (from 1) of the first. What is no JSONL comes as lines of JSON, one for each row."""

    path: str
    first_line: int
    lines: bytes

    def __str__(self) -> str:
        return f"{self.path} from {_unit(self.path)} {self.first_line} on"


def read_blocks(path: str, is_ours: bool = False) -> Iterator[Block]:
    """Cuts a file of rows (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or a `datasets:` name into blocks; `is_ours`: steps have written it.

    Raises UserError when it is unreadable or holds no rows.
    """
    first_line, anything = 1, False
    longest = LONGEST_OF_OURS if is_ours else LONGEST
    for lines in _cut(_lines_of_table(path)) if _is_table(path) else _cut_file(path, longest):
        if lines is None:
            raise UserError(f"{path} line {first_line}: {too_long('line', longest)}")
        anything = anything or not lines.isspace()
        yield Block(path, first_line, lines)
        first_line += lines.count(b"\n")
    if not anything:
        raise UserError(f"{path}: {NOTHING}")


def rows_of(block: Block, labels: dict[str, str]) -> Iterator[Row]:
    """Yields the rows of a block. Raises UserError, naming the file and the line (or row), on what is no row.

    labels   of the source, see `row.SourceFacts.labels`
    """
    name, unit = Path(block.path).name, _unit(block.path)
    for number, line in enumerate(io.BytesIO(block.lines), start=block.first_line):
        if not line.strip():
            continue
        fields = fields_of(line)
        row = fields if isinstance(fields, str) else row_of(fields, f"{name}:{number}", labels)
        if isinstance(row, str):
            raise UserError(f"{block.path} {unit} {number}: {row}")
        yield row


def _unit(path: str) -> str:
    return "row" if _is_table(path) else "line"


def _is_table(path: str) -> bool:
    return path.startswith("datasets:") or path.lower().endswith(".parquet")


def _cut_file(path: str, longest: int) -> Iterator[bytes | None]:
    """Yields blocks, and None where a line is too long to be held."""
    rest, sizes = b"", _sizes()
    try:
        with open_rows(path) as stream:
            while data := stream.read(next(sizes)):
                head, newline, tail = data.rpartition(b"\n")
                if len(rest) + (data.find(b"\n") if newline else len(data)) > longest:  # other lines are shorter than a block
                    yield None
                if newline:
                    yield rest + head + newline
                    rest = tail
                else:
                    rest += data  # a line longer than a block
    except OSError:
        for _ in read_rows(path, longest):  # names what is wrong, and after which line
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


def _lines_of_table(path: str) -> Iterator[bytes]:
    for where, _, found in records(path):
        if isinstance(found, str):
            raise UserError(f"{where}: {found}")
        # What JSON cannot hold is no text either: `row_of` complains about the null.
        yield json.dumps(found, ensure_ascii=False, default=lambda _: None).encode() + b"\n"
