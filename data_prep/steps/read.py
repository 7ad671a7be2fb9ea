"""Raw inputs become documents: WARC and WET archives, HTML pages, text files, JSONL and parquet rows, `datasets:` names.

An input is read as a stream, flat in memory, and what is wrong in it is named by file and line, record or row; `data_prep.row` says what
a row is. HTML stays HTML here (`metadata["html"]` is True); the step `extract` turns it into text.
"""

import glob
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow
from datatrove.data import Document
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from pyarrow import parquet

from data_prep.row import KEYS, LONGEST, Fields, fields_of, joined, known, row_of, too_long
from data_prep.steps.decode import html_of
from mujina.files import Stream, not_utf8
from mujina.user_input import UserError

PAGES = (".html", ".htm")
HTML_TYPES = ("text/html", "application/xhtml+xml")
PIECE = 1 << 8  # compressed bytes at a time: zstd makes up to 32,000 times as much of them
ROWS = 64  # of a parquet file at a time
NOTHING = "holds nothing: leave it out, or build it again"

# What a reader finds: a number (of the line, record or row; 0 for a whole file), and there the fields of a row, or what is wrong.
Found = Iterator[tuple[int, Fields | str]]


def find_inputs(patterns: list[str]) -> list[str]:
    """Resolves paths, patterns (`crawl/*.warc.gz`) and folders to inputs, each once, sorted within a pattern.

    A folder stands for all inputs under it, hidden ones aside; `datasets:` names stay as they are.
    Raises UserError when a pattern matches nothing, or a file whose name says nothing that `read` knows.
    """
    found: list[str] = []
    for pattern in patterns:
        exact = pattern.startswith("datasets:") or os.path.exists(pattern)
        inputs = [path for match in ([pattern] if exact else sorted(glob.glob(pattern, recursive=True))) for path in _inputs_at(match)]
        if not inputs:
            raise UserError(f"documents {pattern!r}: no such file: check the path, which starts at the folder where the command runs")
        found += inputs
    for path in found:
        _format_of(path)
    return list(dict.fromkeys(found))


def read(path: str, labels: dict[str, str], damaged: Literal["stop", "skip"], problems: Callable[[str], None]) -> Iterator[Document]:
    """Yields the documents of one input, in order; the end of its name says how it is read (`FORMATS`).

    labels     of the source, see `row.SourceFacts.labels`
    damaged    what becomes of a row, record or file that cannot be read: "stop" raises UserError; "skip" calls `problems` with
               what was wrong and goes on after it

    A document's id is the row's or record's own, else <file name>:<number>, and its metadata has `url` and `date` where they are known.
    A dialogue has its turns in metadata["messages"], and their contents by lines in `text`.
    Raises UserError when the input is missing or of an unknown kind.
    """
    for where, number, found in records(path):
        row = found if isinstance(found, str) else row_of(found, f"{Path(path).name}:{number}", labels)
        if not isinstance(row, str):
            metadata = {key: value for key, value in row.items() if key not in ("id", "text")}
            yield Document(text=joined(row["messages"]) if "messages" in row else row["text"], id=row["id"], metadata=metadata)
        elif damaged == "stop":
            raise UserError(f"{where}: {row}")
        else:
            problems(f"{where}: {row}")


def records(path: str) -> Iterator[tuple[str, int, Fields | str]]:
    """Yields (where, number, fields of a row or what is wrong there) of one input, in order; the last may be what is wrong with the file.

    Raises UserError when the input is missing or of an unknown kind.
    """
    reader, unit = _format_of(path)
    number, anything = 0, False
    try:
        for number, found in reader(path):
            anything = True
            yield (f"{path} {unit} {number}" if number else path), number, found
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path") from None
    except OSError as error:
        after = f"{path} after {unit} {number}" if number else path
        yield after, number, f"cannot be read further ({error}), the rest of the file is lost: copy or build the file again"
    else:
        if not anything:
            yield path, 0, NOTHING


def _read_jsonl(path: str) -> Found:
    for number, line in _lines(Stream(path)):
        if line is None:
            yield number, too_long("line")
        elif line.strip():
            yield number, fields_of(line)


def _lines(stream: io.RawIOBase) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number from 1, line), with None for one longer than LONGEST, whose bytes are passed over in pieces."""
    number, buffered = 0, io.BufferedReader(stream, 1 << 16)
    while part := buffered.readline(1 << 20):
        number, size, parts = number + 1, len(part), [part]
        while not part.endswith(b"\n") and (part := buffered.readline(1 << 20)):
            size += len(part)
            parts = [*parts, part] if size <= LONGEST else []
        yield number, b"".join(parts) if size <= LONGEST else None


def _read_parquet(path: str) -> Found:
    try:
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        columns = [name for name in file.schema_arrow.names if name in KEYS]
        batches = file.iter_batches(batch_size=ROWS, columns=columns)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(error) from None


def _read_dataset(path: str) -> Found:
    import datasets

    name, _, split = path.removeprefix("datasets:").partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: cannot be read by the datasets library ({error}): check the name, the split and the files") from None
    try:
        yield from enumerate(map(known, rows), start=1)
    except (ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise OSError(error) from None


def _read_warc(path: str) -> Found:
    """Pages of the responses and texts of the conversions. A record is given when the next one, or the end, is where it should be:
    a wrong Content-Length or a cut-off file is noticed only there."""
    stream, held = Stream(path), None
    for number, record in enumerate(ArchiveIterator(stream, parse_http=False, stream_detect=False), start=1):
        if held:
            yield held
        found = _page_of(record)
        held = found and (number, found)
        record.consume()
    if stream.position and stream.tail != b"\r\n\r\n":
        raise OSError("the file ends within a record")
    if held:
        yield held


def _page_of(record: WarcRecord) -> Fields | str | None:
    """The row of a record, or what is wrong with it; None for what is no page: requests, redirects, pictures."""
    headers, is_page = record.headers, record.record_type == WarcRecordType.response
    if not is_page and record.record_type != WarcRecordType.conversion:
        return None
    if record.content_length > LONGEST:
        return too_long("record")
    if is_page:
        record.parse_http(auto_decode="transfer")
        content_type = headers.get("WARC-Identified-Payload-Type") or record.http_content_type
        if content_type not in HTML_TYPES or record.http_headers.status_code != 200:
            return None
    try:
        data = record.reader.read()
        # By the magic number: some crawlers store a page unpacked and leave its header as it was.
        if data.startswith(b"\x1f\x8b"):
            data = zlib.decompressobj(wbits=31).decompress(data, LONGEST + 1)
    except (OSError, zlib.error) as error:
        return f"its body cannot be unpacked ({error}): fetch the page again"
    if len(data) > LONGEST:
        return too_long("record, unpacked,")
    if is_page and record.http_headers.get("Content-Encoding") in ("br", "deflate", "zstd") and not data.lstrip().startswith(b"<"):
        return f"its body is packed with {record.http_headers.get('Content-Encoding')}, which is not read: store it plain or with gzip"
    url = headers.get("WARC-Target-URI")
    row = {"id": record.record_id or url, "url": url, "date": headers.get("WARC-Date")}
    if is_page:
        page = html_of(data, record.http_charset)
        return page if isinstance(page, str) else row | page
    try:
        return row | {"text": data.decode().replace("\0", "")}
    except UnicodeDecodeError as wrong:
        return not_utf8(wrong)


def _read_file(path: str) -> Found:
    """One file, one document."""
    if os.path.getsize(path) > LONGEST:
        yield 0, too_long("file")
        return
    data = Path(path).read_bytes()
    if not data.strip():
        return
    if path.lower().endswith(PAGES):
        page = html_of(data, None)
        yield 0, page if isinstance(page, str) else {"id": path, "url": path} | page
        return
    try:
        yield 0, {"id": path, "text": data.decode("utf-8-sig")}
    except UnicodeDecodeError as wrong:
        yield 0, not_utf8(wrong)


FORMATS: list[tuple[tuple[str, ...], Callable[[str], Found], str]] = [
    ((".jsonl", ".jsonl.gz", ".jsonl.zst"), _read_jsonl, "line"),
    ((".parquet",), _read_parquet, "row"),
    ((".warc", ".warc.gz", ".wet", ".wet.gz"), _read_warc, "record"),
    ((*PAGES, ".txt", ".rst", ".md"), _read_file, "file"),
]  # endings, reader, what its numbers count


def _format_of(path: str) -> tuple[Callable[[str], Found], str]:
    if path.startswith("datasets:"):
        return _read_dataset, "row"
    for endings, reader, unit in FORMATS:
        if path.lower().endswith(endings):
            return reader, unit
    known = ", ".join(ending for endings, _, _ in FORMATS for ending in endings)
    raise UserError(f"{path}: unknown kind of file: give {known}, a folder of such files, or datasets:NAME")


def _inputs_at(match: str) -> list[str]:
    if not os.path.isdir(match):
        return [match]
    endings = tuple(ending for endings, _, _ in FORMATS for ending in endings)
    files = (path for path in Path(match).rglob("*") if path.name.lower().endswith(endings) and path.is_file())
    return sorted(str(path) for path in files if not any(part.startswith(".") for part in path.relative_to(match).parts))
