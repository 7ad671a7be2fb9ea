"""Blocks are a file's lines, all of them, once and whole."""

import gzip
from pathlib import Path

import pytest

from data_prep import blocks
from data_prep.blocks import read_blocks, rows_of
from mujina.user_input import UserError

LINES = [b'{"text": "' + b"x" * (n * 37 % 211) + b'"}\n' for n in range(100)] + [
    b"\n",
    b'{"text": "' + b"long" * 2_000 + b'"}\n',
    b'{"text": ""}',
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_blocks_are_the_lines_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(blocks, "FIRST_BLOCK", 300)
    data = b"".join(LINES)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = list(read_blocks(str(tmp_path / name)))
    assert len(found) > 10 and b"".join(block.lines for block in found) == data
    assert all(block.lines.endswith(b"\n") for block in found[:-1])
    numbers = [row["id"] for block in found for row in rows_of(block, {})]
    assert numbers == [f"{name}:{number}" for number in (*range(1, 101), 102, 103)]


def test_blocks_grow_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "FIRST_BLOCK", 100)
    monkeypatch.setattr(blocks, "LAST_BLOCK", 400)
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" * 9_000)
    sizes = [len(block.lines) for block in read_blocks(str(tmp_path / "rows.jsonl"))]
    small, middle, large = sizes[: blocks.BLOCKS_OF_A_SIZE], sizes[blocks.BLOCKS_OF_A_SIZE :][: blocks.BLOCKS_OF_A_SIZE], sizes[-9:]
    assert max(small) <= 102 < max(middle) <= 202 < max(large) <= 402


def test_a_line_without_an_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LONGEST", 4 << 20)
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "one"}\n' * 3 + b'{"text": "' + b"x" * (12 << 20))
    with pytest.raises(UserError, match="rows.jsonl line 4: the line is longer than"):
        list(read_blocks(str(tmp_path / "rows.jsonl")))
    # A text of the length that is allowed may take more bytes when steps have written it: a quote takes two.
    assert sum(len(block.lines) for block in read_blocks(str(tmp_path / "rows.jsonl"), is_ours=True)) > 12 << 20
