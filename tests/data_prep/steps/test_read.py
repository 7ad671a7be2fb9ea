"""Every format comes back as it was written, and whatever is wrong in an input is named, stops the run or is passed over."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from datatrove.data import Document
from pyarrow import parquet

from data_prep import row
from data_prep.steps import read as module
from data_prep.steps.read import find_inputs, read
from mujina.user_input import UserError

DEFAULTS = {"kind": "web", "origin": "human", "language": "unknown", "licence": "CC0", "source": "mine"}
PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def stop(path: Path | str, **labels: str) -> list[Document]:
    return list(read(str(path), DEFAULTS | labels, "stop", lambda problem: pytest.fail(problem)))


def skip(path: Path | str) -> tuple[list[str], list[str]]:
    """Texts and problems."""
    problems: list[str] = []
    texts = [document.text for document in read(str(path), DEFAULTS, "skip", problems.append)]
    return texts, problems


def assert_problem(path: Path, problem: str, texts: list[str]) -> None:
    """`stop` raises it, `skip` tells it and gives the other texts."""
    with pytest.raises(UserError, match=problem):
        stop(path)
    found, (told,) = skip(path)
    assert found == texts
    with pytest.raises(UserError, match=problem):
        raise UserError(told)


def be_longest(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for part in (module, row):
        monkeypatch.setattr(part, "LONGEST", size)


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def record(
    number: int, page: bytes, type: str = "response", header: str = "text/html", length: int | None = None, status: int = 200
) -> bytes:
    http = f"HTTP/1.1 {status} X\r\nContent-Type: {header}\r\n\r\n".encode() if type == "response" else b""
    content = "application/http; msgtype=response" if type == "response" else "text/plain"
    head = (
        f"WARC/1.0\r\nWARC-Type: {type}\r\nWARC-Record-ID: <urn:{number}>\r\nWARC-Target-URI: http://a.jp/{number}\r\n"
        f"WARC-Date: 2024-05-01T00:00:00Z\r\nContent-Type: {content}\r\nContent-Length: {length or len(http + page)}\r\n\r\n"
    )
    return head.encode() + http + page + b"\r\n\r\n"


@pytest.mark.parametrize("ending", PACKERS)
def test_rows_of_jsonl(tmp_path: Path, ending: str) -> None:
    rows = [
        {"id": 0, "text": "一", "language": "ja", "licence": None, "url": "http://a.jp/", "teacher": "t", "kind": "web", "more": 1},
        {"text": "two"},
    ]
    data = "\n\n".join(json.dumps(row) for row in rows).encode()
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(PACKERS[ending](data[:50]) + PACKERS[ending](data[50:]))  # frames and members may follow each other
    first, second = stop(path)
    assert (first.id, first.text, first.metadata) == ("0", "一", DEFAULTS | {"language": "ja", "url": "http://a.jp/", "teacher": "t"})
    assert (second.id, second.text, second.metadata) == (f"{path.name}:3", "two", DEFAULTS)


def test_dialogues(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    (document,) = stop(tmp_path / "chat.jsonl", kind="chat")
    assert (document.text, document.metadata["messages"]) == ("hi\nho", messages)
    (tmp_path / "flat.jsonl").write_bytes(lines("no dialogue"))
    with pytest.raises(UserError, match="flat.jsonl line 1.*needs `messages`"):
        stop(tmp_path / "flat.jsonl", kind="chat")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "caf\xe9"}', "0xe9 at 13 is not UTF-8"),
        (b'{"text": "cut', "is not JSON"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'["text"]', "a JSON list, not an object"),
        (b'{"body": "x"}', "neither a string `text` nor `messages`"),
        (b'{"text": 5}', "neither a string `text` nor `messages`"),
        (b'{"text": "a\\u0000b"}', "NUL byte at character 1"),
        (b'{"text": "x", "kind": "chat"}', "kind is 'chat', but the source declares 'web'"),
        (b'{"text": "x", "origin": "synthetic"}', "origin is 'synthetic', but the source declares 'human'"),
        (b'{"text": "x", "language": ["ja"]}', "language is .*, not a string"),
        (b'{"messages": []}', "not a list of turns"),
        (b'{"messages": [{"role": "user"}]}', "lacks a string `role` or `content`"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"text": "' + b"x" * (2 << 20) + b'"}', "line is longer than 1 MiB"),
    ],
)
def test_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, problem: str) -> None:
    be_longest(monkeypatch, 1 << 20)
    (tmp_path / "bad.jsonl").write_bytes(lines("one") + line + b"\n" + lines("three"))
    assert_problem(tmp_path / "bad.jsonl", f"bad.jsonl line 2: .*{problem}.*: ", ["one", "three"])


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_broken_stream_is_read_up_to_the_break(tmp_path: Path, ending: str) -> None:
    pack = PACKERS[ending]
    texts = [f"row {number} {hash(str(number))}" for number in range(2000)]
    path = tmp_path / f"broken.jsonl{ending}"
    path.write_bytes(pack(lines("one", "two")) + pack(lines(*texts))[:-200])
    found, (problem,) = skip(path)
    assert found[:2] == ["one", "two"] and found[2:] == texts[: len(found) - 2]
    assert f"broken.jsonl{ending} after line {len(found)}: cannot be read further (the file is cut off)" in problem
    path.write_bytes(pack(lines("one", "two")) + b"this is no packed data")
    assert_problem(path, "after line 2: cannot be read further .*: copy or build the file again", ["one", "two"])


def test_a_disk_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "disk.jsonl").symlink_to("/proc/self/mem")  # opens, and its first page gives an input/output error
    assert_problem(tmp_path / "disk.jsonl", "disk.jsonl: cannot be read further .*Input/output error", [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.html", "a.txt", "a.warc", "a.wet.gz", "a.parquet"])
def test_an_empty_input(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert_problem(tmp_path / name, f"{name}: holds nothing", [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.warc.gz", "a.html", "a.txt", "a.parquet", "a.csv"])
def test_a_missing_input_or_unknown_kind_always_stops(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file|unknown kind of file"):
        skip(tmp_path / name)


def test_parquet_and_the_datasets_library(tmp_path: Path) -> None:
    rows = {"text": ["one", None, "二"], "language": ["en", None, "ja"], "more": [1, 2, 3]}
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder/train.parquet"
    parquet.write_table(pyarrow.table(rows), path)
    for name in (str(path), f"datasets:{path.parent}", f"datasets:{path.parent}:train"):
        texts, (problem,) = skip(name)
        assert texts == ["one", "二"] and problem.startswith(f"{name} row 2: has neither")
    assert [(document.id, document.metadata) for document in read(str(path), DEFAULTS, "skip", lambda _: None)] == [
        ("train.parquet:1", DEFAULTS | {"language": "en"}),
        ("train.parquet:3", DEFAULTS | {"language": "ja"}),
    ]
    with pytest.raises(UserError, match="datasets library"):
        skip(f"datasets:{tmp_path / 'folder'}:test")
    path.write_bytes(path.read_bytes()[:-20])
    assert_problem(path, "train.parquet: cannot be read further", [])


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_archives(tmp_path: Path, ending: str) -> None:
    pack = PACKERS[ending]
    records = [
        record(1, b"", type="warcinfo"),
        record(2, "<p>日本語".encode("shift_jis"), header="text/html; charset=Shift_JIS"),
        record(3, b"\x89PNG", header="image/png"),
        record(4, b"<p>gone", status=404),
        record(5, gzip.compress(b"<p>nul\0"), header="application/xhtml+xml\r\nContent-Encoding: gzip"),
        record(6, "変換".encode(), type="conversion"),
    ]
    for name in ("a.warc", "a.warc.wet"):
        (tmp_path / f"{name}{ending}").write_bytes(b"".join(map(pack, records)))
        page, nul, text = stop(tmp_path / f"{name}{ending}")
        assert (page.id, page.text) == ("<urn:2>", "<p>日本語")
        assert page.metadata == DEFAULTS | {"url": "http://a.jp/2", "date": "2024-05-01T00:00:00Z", "html": True}
        assert (nul.text, text.text, "html" in text.metadata) == ("<p>nul", "変換", False)


def test_files_of_one_document(tmp_path: Path) -> None:
    for name, data in {"a.html": b"<p>x", "b.txt": b"\xef\xbb\xbfy", "c.md": b"# z"}.items():
        (tmp_path / name).write_bytes(data)
    (page,), (text,), (mark,) = (stop(tmp_path / name) for name in ("a.html", "b.txt", "c.md"))
    path = str(tmp_path / "a.html")
    assert (page.id, page.text, page.metadata) == (path, "<p>x", DEFAULTS | {"url": path, "html": True})
    assert (text.text, text.metadata, mark.text) == ("y", DEFAULTS, "# z")


def test_a_bad_text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes("日本".encode("euc-jp"))
    assert_problem(tmp_path / "a.txt", "a.txt: byte 0xc6 at 0 is not UTF-8", [])
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    assert_problem(tmp_path / "a.txt", "a.txt: holds a NUL byte", [])
    be_longest(monkeypatch, 2)
    for name in ("a.txt", "a.html"):
        (tmp_path / name).write_bytes(b"abc")
        assert_problem(tmp_path / name, f"{name}: the file is longer", [])


TEXT = "むかしむかし、あるところに、おじいさんとおばあさんがおりました。"


@pytest.mark.parametrize("encoding", ["shift_jis", "euc-jp", "iso-2022-jp", "utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("meta", [True, False])
def test_encodings_of_pages(tmp_path: Path, encoding: str, meta: bool) -> None:
    page = (
        f"<html><head>{f'<meta charset={encoding}>' if meta and 'utf-' not in encoding else ''}</head><body><p>{TEXT * 5}</p></body></html>"
    )
    (tmp_path / "page.html").write_bytes(page.encode(encoding))
    (document,) = stop(tmp_path / "page.html")
    assert document.text == page


def test_a_page_in_no_encoding_is_told_and_a_server_that_knows_nothing_is_not_believed(tmp_path: Path) -> None:
    page = f"<meta charset=euc-jp><p>{TEXT * 5}</p>"
    records = record(1, page.encode("euc-jp").replace(b"<p>", b"<p>\xff<p>"), header="text/html; charset=EUC-JP")
    records += record(2, page.encode("euc-jp"), header="text/html; charset=ISO-8859-1")
    (tmp_path / "a.warc").write_bytes(records)
    assert_problem(tmp_path / "a.warc", "record 1: its bytes are text in no encoding .declared: euc-jp, euc-jp", [page])
    (tmp_path / "a.html").write_bytes(page.encode("euc-jp").replace(b"<p>", b"<p>\xff<p>"))
    assert_problem(tmp_path / "a.html", "a.html: its bytes are text in no encoding .declared: euc-jp.", [])


LONG_LINE = """
import re, sys
from data_prep.blocks import read_blocks
from data_prep.steps.read import read
from mujina.user_input import UserError
def peak():  # getrusage's begins with what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
path, problems = sys.argv[1], []
open(path + ".small.jsonl", "w").write('{"text": "x"}')
list(read(path + ".small.jsonl", {}, "skip", print))
before = peak()
texts = [document.text for document in read(path, {}, "skip", problems.append)]
print(texts, problems, peak() - before, sep="\\n")
try:
    list(read_blocks(path))
except UserError as error:
    print(error, peak() - before, sep="\\n")
"""


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_of_200_mb_is_not_held_in_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"long.jsonl{ending}"
    path.write_bytes(PACKERS[ending](b'{"text": "' + b"x" * 200_000_000 + b'"}\n' + lines("after")))
    run = subprocess.run([sys.executable, "-c", LONG_LINE, str(path)], check=True, capture_output=True, text=True)
    texts, problems, megabytes, without_steps, more = run.stdout.splitlines()
    assert texts == "['after']" and "line 1: the line is longer than 64 MiB" in problems and "line 1: the line is longer" in without_steps
    assert float(megabytes) < 100 and float(more) < 250, (megabytes, more)


TABLES = """
import re, sys
import pyarrow
from pyarrow import parquet
from data_prep.steps import read
read.LONGEST, read.MEMORY = 1 << 20, 96 << 20
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
list(read.records(sys.argv[1]))
import datasets
before = peak()
for path in sys.argv[2:]:
    found, wrong = 0, []
    for where, number, row in read.records(path):
        found += not isinstance(row, str)
        wrong += [f"{number} {row}"] if isinstance(row, str) else []
    print(found, "|".join(wrong), peak() - before, sep=";")
"""


def test_a_table_that_unpacks_into_gigabytes_takes_no_more_memory_than_the_bound(tmp_path: Path) -> None:
    def write(name: str, column: Any, **options: Any) -> str:
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / name, compression="zstd", **options)
        assert (tmp_path / name).stat().st_size < 100_000 or name == "normal.parquet"
        return str(tmp_path / name)

    small, long, huge = [f"row {n}" for n in range(100)], "x" * 5_000_000, "x" * 150_000_000
    many = pyarrow.nulls(20_000_000, pyarrow.struct({"role": pyarrow.string()}))
    turns = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, len(many)], pyarrow.int32()), many)
    parquet.write_table(pyarrow.table({"messages": turns}), tmp_path / "turns.parquet")
    places, at_once = pyarrow.array([0] * 64 + [1] * 64, pyarrow.int32()), {"dictionary_pagesize_limit": 1 << 30}
    paths = [
        write("first.parquet", small),
        write("normal.parquet", [f"{n}, {hash(str(n))}" * 50 for n in range(20_000)]),
        write("long.parquet", [*small, long, *small], use_dictionary=False),
        write(
            "many.parquet",
            pyarrow.DictionaryArray.from_arrays(places, [long, "y"]).cast(pyarrow.string()),
            dictionary_pagesize_limit=1 << 30,
        ),
        write("categories.parquet", pyarrow.DictionaryArray.from_arrays(places, [long, "y"]), **at_once),
        write("huge.parquet", [*small, huge, *small], use_dictionary=False, row_group_size=50),
        write("dictionary.parquet", pyarrow.DictionaryArray.from_arrays(places, [huge, "y"]), **at_once),
        str(tmp_path / "turns.parquet"),
        f"datasets:{tmp_path / 'lines'}",
    ]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/train.jsonl").write_bytes(lines(huge))
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # the default one's first GiB is beyond the bound
    run = subprocess.run([sys.executable, "-c", TABLES, *paths], check=True, capture_output=True, text=True, env=environment)
    too_long = "the row is longer than 1 MiB: cut it into documents, or leave it out"
    lost = "{} its row group unpacks into more than 0 GiB, the rows to {} are lost: write it again with fewer of them in a group"
    expected = [
        (20_000, ""),
        (200, f"101 {too_long}"),
        (64, "|".join(f"{n} {too_long}" for n in range(1, 65))),
        (64, "|".join(f"{n} {too_long}" for n in range(1, 65))),
        (151, lost.format(101, 150)),
        (0, lost.format(1, 128)),
        (1, lost.format(2, 2)),
        (0, "0 cannot be read further (the next row takes more than 0 GiB), the rest of the file is lost: copy or build the file again"),
    ]
    told = [line.split(";") for line in run.stdout.splitlines()]
    assert [(int(found), wrong) for found, wrong, _ in told] == expected
    normal, *peaks = [int(megabytes) for _, _, megabytes in told]
    assert normal < 60 and max(peaks) < 300, (normal, peaks)


def test_a_cell_that_is_no_text_costs_its_row_and_categories_are_texts(tmp_path: Path) -> None:
    column = pyarrow.array([b"one", b"\xff", b"three"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert_problem(tmp_path / "a.parquet", "a.parquet row 2: byte 0xff at 0 is not UTF-8", ["one", "three"])
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "b.parquet")
    assert skip(tmp_path / "b.parquet") == (["a", "b", "a"], [])
    parquet.write_table(pyarrow.table({"more": [1, 2]}), tmp_path / "c.parquet")
    assert skip(tmp_path / "c.parquet")[1][0].startswith(f"{tmp_path}/c.parquet row 1: has neither a string `text`")


def test_splits_of_tables_and_of_other_files(tmp_path: Path) -> None:
    for name in ("train", "test"):
        parquet.write_table(pyarrow.table({"text": [name, "x"]}), tmp_path / f"{name}.parquet")
    documents = stop(f"datasets:{tmp_path}:train+test")
    assert [(document.id[-1], document.text) for document in documents] == [("1", "train"), ("2", "x"), ("3", "test"), ("4", "x")]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/train.jsonl").write_bytes(lines("one", "two"))
    assert [document.text for document in stop(f"datasets:{tmp_path / 'lines'}")] == ["one", "two"]


def test_inputs_are_found(tmp_path: Path) -> None:
    names = ("b.jsonl", "sub/a.html", "sub/deep/c.warc.gz", "sub/note.csv", ".x.jsonl", "sub/.d/e.txt")
    files = [tmp_path / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    b, a, c, note = (str(file) for file in files[:4])
    assert find_inputs([str(tmp_path), "datasets:name:split"]) == [b, a, c, "datasets:name:split"]
    assert find_inputs([str(tmp_path / "*"), b, str(tmp_path / "**/*.html")]) == [b, a, c]
    with pytest.raises(UserError, match="nothing-.*no such file"):
        find_inputs([str(tmp_path / "nothing-*.jsonl")])
    with pytest.raises(UserError, match="note.csv: unknown kind of file.*parquet"):
        find_inputs([note])
