"""Rows become documents, and a bad row is named by file and line."""

import gzip
import json
from pathlib import Path

import pytest

from data_prep.documents import Document, SourceFacts, find_files, read_documents
from mujina.user_input import UserError


def read(path: Path | str) -> list[Document]:
    return list(read_documents(str(path), "mine", SourceFacts(kind="web")))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_read_with_their_labels(tmp_path: Path, name: str) -> None:
    rows = [
        {"id": "a", "text": "一", "language": "ja", "licence": "MIT", "source": "there", "url": "unused"},
        {"text": "two", "kind": "web"},
    ]
    data = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(tmp_path / name) == [
        Document("a", "一", None, "there", "web", "human", "ja", "MIT", None),
        Document(f"{name}:3", "two", None, "mine", "web", "human", "unknown", "unknown", None),
    ]


def test_dialogues_are_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    (document,) = read_documents(str(tmp_path / "chat.jsonl"), "mine", SourceFacts(kind="chat", origin="synthetic"))
    assert (document.messages, document.text, document.kind, document.origin) == (messages, None, "chat", "synthetic")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "0xe9 is not UTF-8.*iconv"),
        (b'{"text": "cut', "is not JSON"),
        (b'["text"]', "a JSON list, not an object"),
        (b'{"body": "x"}', "neither a string `text` nor `messages`"),
        (b'{"text": 5}', "neither a string `text` nor `messages`"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "x", "kind": "chat"}', "kind is 'chat', but the source declares 'web'"),
        (b'{"text": "x", "origin": "synthetic"}', "origin is 'synthetic', but the source declares 'human'"),
        (b'{"messages": []}', "not a list of turns"),
        (b'{"messages": [{"role": "user"}]}', "lacks a string `role` or `content`"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=f"bad.jsonl line 2.*{message}"):
        read(tmp_path / "bad.jsonl")


def test_a_chat_source_refuses_plain_text(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"text": "not a dialogue"}')
    with pytest.raises(UserError, match="chat.jsonl line 1.*needs `messages`"):
        list(read_documents(str(tmp_path / "chat.jsonl"), "mine", SourceFacts(kind="chat", origin="synthetic")))


def test_a_broken_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": f"row {n} {hash(str(n))}"}) + "\n" for n in range(5000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.jsonl.gz after line \d+: cannot be read further"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.jsonl.gz").write_bytes(b'{"text": "plain"}')
    with pytest.raises(UserError, match="no.jsonl.gz after line 0.*not gz"):
        read(tmp_path / "no.jsonl.gz")


def test_missing_files_and_unknown_kinds_of_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"rows.csv: unknown kind of file.*\.jsonl"):
        read(tmp_path / "rows.csv")
    with pytest.raises(UserError, match="nothing-.*no such file"):
        find_files([str(tmp_path / "nothing-*.jsonl")])


def test_patterns_are_resolved_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    found = find_files([str(tmp_path / "*.jsonl"), "datasets:name:split"])
    assert found == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "datasets:name:split"]


def test_parquet_and_the_datasets_library(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "folder").mkdir()
    rows = {"text": ["one", "二"], "language": ["en", "ja"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "folder/train.parquet")
    for path in (str(tmp_path / "folder/train.parquet"), f"datasets:{tmp_path / 'folder'}", f"datasets:{tmp_path / 'folder'}:train"):
        assert [(document.text, document.language) for document in read(path)] == [("one", "en"), ("二", "ja")]
    with pytest.raises(UserError, match="test.*datasets library"):
        read(f"datasets:{tmp_path / 'folder'}:test")
    (tmp_path / "broken.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="broken.parquet.*datasets library"):
        read(tmp_path / "broken.parquet")
