"""What a row is, and what is said of one that is none, is the same with steps and without."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_prep import row as module
from data_prep.blocks import read_blocks, rows_of
from data_prep.row import SourceFacts
from data_prep.steps.read import read
from mujina.user_input import UserError

WEB = SourceFacts(kind="web", licence="CC0")
CHAT = SourceFacts(kind="chat", origin="synthetic", teacher="tanuki")
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def without_steps(path: Path | str, facts: SourceFacts) -> list[dict[str, Any]]:
    return [dict(row) for block in read_blocks(str(path)) for row in rows_of(block, facts.labels("mine"))]


def with_steps(path: Path | str, facts: SourceFacts) -> list[dict[str, Any]]:
    rows = []
    for document in read(str(path), facts.labels("mine"), "stop", pytest.fail):
        text = {} if "messages" in document.metadata else {"text": document.text}
        rows.append({"id": document.id} | text | document.metadata)
    return rows


Reader = Callable[[Path | str, SourceFacts], list[dict[str, Any]]]
of_both = pytest.mark.parametrize("rows", [with_steps, without_steps])


@of_both
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_have_the_labels_of_their_source_unless_they_state_their_own(tmp_path: Path, name: str, rows: Reader) -> None:
    written: list[dict[str, Any]] = [
        {"id": "0", "text": "一", "language": "ja", "licence": "MIT", "source": "there", "teacher": "t", "url": "http://a.jp", "more": 1},
        {"id": "", "text": "", "language": "", "licence": None, "kind": "web", "origin": "human"},
        {"text": "three", "messages": None},
    ]
    if name.endswith("parquet"):
        keys = {key: None for row in written for key in row}
        parquet.write_table(pyarrow.table({key: [row.get(key) for row in written] for key in keys}), tmp_path / name)
    else:
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in written).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    labels = {"kind": "web", "origin": "human", "language": "unknown", "licence": "CC0", "source": "mine"}
    own = {"language": "ja", "licence": "MIT", "source": "there", "teacher": "t", "url": "http://a.jp"}
    assert rows(tmp_path / name, WEB) == [
        labels | own | {"id": "0", "text": "一"},
        labels | {"id": f"{name}:2", "text": ""},
        labels | {"id": f"{name}:3", "text": "three"},
    ]


@of_both
def test_a_number_is_an_id_and_blank_lines_count(tmp_path: Path, rows: Reader) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 0, "text": "x"}\r\n\n \t\n{"text": "y"}')
    assert [row["id"] for row in rows(tmp_path / "a.jsonl", WEB)] == ["0", "a.jsonl:4"]


@of_both
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path: Path, name: str, rows: Reader) -> None:
    data = "\ufeff".join(["", '{"text": "one"}\n', '{"text": "two"}\n'])  # as of two files put together
    (tmp_path / name).write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
    assert [row["text"] for row in rows(tmp_path / name, WEB)] == ["one", "two"]
    (tmp_path / name).write_bytes(gzip.compress(data.encode("utf-16")) if name.endswith("gz") else data.encode("utf-16"))
    with pytest.raises(UserError, match="line 1: byte 0xff at 0 is not UTF-8: convert the file"):
        rows(tmp_path / name, WEB)


@of_both
def test_endings_in_capitals_zeros_behind_and_packed_files_that_do_not_say_so(tmp_path: Path, rows: Reader) -> None:
    packed = gzip.compress(b'{"text": "x"}\n')
    for name, data in {"A.JSONL": b'{"text": "x"}', "A.JSONL.GZ": packed, "zeros.jsonl.gz": packed + bytes(20_000) + packed}.items():
        (tmp_path / name).write_bytes(data)
        assert {row["text"] for row in rows(tmp_path / name, WEB)} == {"x"}
    (tmp_path / "a.jsonl").write_bytes(packed)
    with pytest.raises(UserError, match="a.jsonl line 1: holds packed bytes, and its name does not say so: let it end in .gz"):
        rows(tmp_path / "a.jsonl", WEB)


@of_both
def test_dialogues(tmp_path: Path, rows: Reader) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": MESSAGES, "text": "passed over"}))
    (row,) = rows(tmp_path / "chat.jsonl", CHAT)
    assert row == CHAT.labels("mine") | {"id": "chat.jsonl:1", "messages": MESSAGES} and row["teacher"] == "tanuki"
    (tmp_path / "flat.jsonl").write_text('{"text": "not a dialogue"}')
    with pytest.raises(UserError, match="flat.jsonl line 1: a source of kind chat needs `messages`"):
        rows(tmp_path / "flat.jsonl", CHAT)


@of_both
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "byte 0xe9 at 13 is not UTF-8: convert"),
        (b'{"text": "cut', "is not JSON"),
        (b"[" * 100_000, "is not JSON .recursion limit"),
        (b'["text"]', "is a JSON list, not an object"),
        (b'{"body": "x"}', "has neither a string `text` nor `messages`"),
        (b'{"text": 5}', "has neither a string `text` nor `messages`"),
        (b'{"text": "\\ud800"}', "holds half of a surrogate pair"),
        (b'{"text": "a\\u0000b"}', "holds a NUL byte at character 1"),
        (b'{"messages": [{"role": "user", "content": "\\u0000"}]}', "holds a NUL byte at character 0"),
        (b'{"text": "' + b"x" * 1_001 + b'"}', "the (text|line) is longer than 0 MiB"),
        (b'{"text": "x", "kind": "chat"}', "kind is 'chat', but the source declares 'web': .*known: web, code"),
        (b'{"text": "x", "kind": ""}', "kind is '', but the source declares 'web'"),
        (b'{"text": "x", "origin": "synthetic"}', "origin is 'synthetic', but the source declares 'human'"),
        (b'{"text": "x", "language": ["ja"]}', "language is .'ja'., not a string: mend the row"),
        (b'{"text": "x", "teacher": NaN}', "teacher is nan, not a string"),
        (b'{"text": "x", "source": 5}', "source is 5, not a string"),
        (b'{"text": "x", "url": 5}', "url is 5, not a string: mend the row"),
        (b'{"text": "x", "url": ["http://a.jp"]}', "url is .'http://a.jp'., not a string"),
        (b'{"messages": []}', "`messages` is not a list of turns"),
        (b'{"messages": ""}', "`messages` is not a list of turns"),
        (b'{"messages": [{"role": "user"}]}', "the turn .'role': 'user'. lacks a string `role` or `content`"),
        (b'{"messages": [' + b'"' + b"x" * 900 + b'"]}', "the turn 'x{199} lacks"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str, rows: Reader) -> None:
    monkeypatch.setattr(module, "LONGEST", 1_000)
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=f"bad.jsonl line 2: {message}"):
        rows(tmp_path / "bad.jsonl", WEB)


@of_both
def test_a_bad_row_of_a_table_is_named(tmp_path: Path, rows: Reader) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder/train.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    for name in (str(path), f"datasets:{path.parent}:train"):
        with pytest.raises(UserError, match=f"{name} row 2: has neither"):
            rows(name, WEB)


@of_both
def test_parquet_and_the_datasets_library(tmp_path: Path, rows: Reader) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder/train.parquet"
    parquet.write_table(pyarrow.table({"messages": [MESSAGES, MESSAGES[:1]], "language": ["en", "ja"], "licence": [None, "MIT"]}), path)
    for name in (str(path), f"datasets:{path.parent}", f"datasets:{path.parent}:train"):
        found = [(row["messages"], row["language"], row["licence"]) for row in rows(name, WEB)]
        assert found == [(MESSAGES, "en", "CC0"), (MESSAGES[:1], "ja", "MIT")]
    with pytest.raises(UserError, match="test.*datasets library"):
        rows(f"datasets:{tmp_path / 'folder'}:test", WEB)
    (tmp_path / "broken.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="broken.parquet: cannot be read further"):
        rows(tmp_path / "broken.parquet", WEB)


@of_both
def test_broken_missing_and_empty_files_are_named(tmp_path: Path, rows: Reader) -> None:
    whole = gzip.compress("".join(json.dumps({"text": f"row {n} {hash(str(n))}"}) + "\n" for n in range(5000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.jsonl.gz after line \d+: cannot be read further"):
        rows(tmp_path / "cut.jsonl.gz", WEB)
    (tmp_path / "no.jsonl.gz").write_bytes(b'{"text": "plain"}')
    with pytest.raises(UserError, match="no.jsonl.gz.*: cannot be read further .*not gz"):
        rows(tmp_path / "no.jsonl.gz", WEB)
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        rows(tmp_path / "none.jsonl", WEB)
    with pytest.raises(UserError, match=r"rows.csv: unknown kind of file.*\.jsonl"):
        rows(tmp_path / "rows.csv", WEB)
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "empty.parquet")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    for name in ("empty.parquet", "empty.jsonl", "blank.jsonl"):
        with pytest.raises(UserError, match=f"{name}: holds nothing: leave it out"):
            rows(tmp_path / name, WEB)
