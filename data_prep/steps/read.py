"""Raw inputs become documents: WARC and WET archives, HTML pages, text files, JSONL and parquet rows, `datasets:` names.

An input is read as a stream, flat in memory, and what is wrong in it is named by file and line, record or row; `data_prep.row` says what
a row is. HTML stays HTML here (`metadata["html"]` is True); the step `extract` turns it into text.
"""

import contextlib
import glob
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

import pyarrow
from datatrove.data import Document
from pyarrow import parquet

from data_prep.row import KEYS, Fields, fields_of, joined, known, row_of
from data_prep.steps.decode import html_of
from data_prep.steps.warc import Page, Passed, read_warc
from mujina.files import LONGEST, Stream, lines_of, not_utf8, too_long
from mujina.processes import bounded_memory
from mujina.user_input import UserError

PAGES = (".html", ".htm")
ROWS = 64  # of a parquet file at a time
MEMORY = 2 << 30  # bytes that they may take while they are read: a page of a file may have 1 GiB, for it holds a thousand rows or more
NOTHING = "holds nothing: leave it out, or build it again"

# What a reader finds: a number (of the line, record or row; 0 for a whole file), and there the fields of a row, or what is wrong, or what
# was passed over.
Found = Iterator[tuple[int, Fields | Passed | str]]


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


def files_of(path: str) -> list[str]:
    """The files of an input; none of a `datasets:` name that is no folder here."""
    if not path.startswith("datasets:"):
        return [path]
    folder = Path(path.removeprefix("datasets:").partition(":")[0])
    return sorted(str(file) for file in folder.rglob("*") if file.is_file())


def read(
    path: str,
    labels: dict[str, str],
    damaged: Literal["stop", "skip"],
    problems: Callable[[str], None],
    passed: Callable[[str], None] = lambda reason: None,
) -> Iterator[Document]:
    """Yields the documents of one input, in order; the end of its name says how it is read (`FORMATS`).

    labels     of the source, see `row.SourceFacts.labels`
    damaged    what becomes of a row, record or file that cannot be read: "stop" raises UserError; "skip" calls `problems` with
               what was wrong and goes on after it
    passed     called with the reason whenever something is passed over: what is damaged, and records of an archive that are no pages

    A document's id is the row's or record's own, else <file name>:<number>, and its metadata has `url` and `date` where they are known.
    A dialogue has its turns in metadata["messages"], and their contents by lines in `text`.
    Raises UserError when the input is missing or of an unknown kind.
    """
    for where, number, found in records(path):
        if isinstance(found, Passed):
            passed(found.reason)
            continue
        row = found if isinstance(found, str) else row_of(found, f"{Path(path).name}:{number}", labels)
        if not isinstance(row, str):
            metadata = {key: value for key, value in row.items() if key not in ("id", "text")}
            yield Document(text=joined(row["messages"]) if "messages" in row else row["text"], id=row["id"], metadata=metadata)
        elif damaged == "stop":
            raise UserError(f"{where}: {row}")
        else:
            problems(f"{where}: {row}")
            passed(re.split(r"[:(]| [`'{\d]", row.lstrip("0123456789, "))[0].strip())


def records(path: str) -> Iterator[tuple[str, int, Fields | Passed | str]]:
    """Yields (where, number, fields of a row, or what is wrong there, or passed over) of one input, in order; the last may be what is
    wrong with the file.

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
    for number, line in lines_of(io.BufferedReader(Stream(path), 1 << 16), LONGEST):
        if line is None:
            yield number, too_long("line", LONGEST)
        elif line.strip():
            yield number, fields_of(line)


def _read_parquet(source: str | IO[bytes], first: int = 0) -> Found:
    """`first` rows, of other files, are counted before its own."""
    try:
        file = parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
        for group in range(file.num_row_groups):
            yield from _read_group(file, group, first)
            first += file.metadata.row_group(group).num_rows
    except pyarrow.ArrowException as error:
        raise OSError(error) from None


def _read_group(file: parquet.ParquetFile, group: int, first: int) -> Found:
    """A few kilobytes of a file may unpack into any number of gigabytes, which nothing in it tells, so the memory is bounded."""
    about, done = file.metadata.row_group(group), 0
    columns = [name for name in file.schema_arrow.names if name in KEYS]
    few = max(1, min(ROWS, about.num_rows * LONGEST // max(about.total_byte_size, 1)))
    for size in (few, 1) if few > 1 else (1,):  # where a few take too much, from its beginning one by one
        batches, number = file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False), 0
        with contextlib.suppress(MemoryError):
            while (rows := _next_rows(batches)) is not None:
                for row in rows:
                    number += 1
                    if number > done:
                        done = number
                        yield first + number, row
            return
    last = f"the rows to {first + about.num_rows} are lost: write it again with fewer of them in a group"
    yield first + done + 1, f"its row group unpacks into more than {MEMORY >> 30} GiB, {last}"


def _next_rows(batches: Iterator[pyarrow.RecordBatch]) -> list[Fields | str] | None:
    """Raises MemoryError."""
    with bounded_memory(MEMORY):
        if (batch := next(batches, None)) is None:
            return None
        for number, column in enumerate(batch.columns):
            if isinstance(column, pyarrow.DictionaryArray):  # whose size is that of all that the group has
                batch = batch.set_column(number, batch.schema.names[number], column.dictionary_decode())
        with contextlib.suppress(UnicodeDecodeError):
            if batch.nbytes <= LONGEST:
                return batch.to_pylist()
        return [_row_of_table(batch.slice(number, 1)) for number in range(batch.num_rows)]


def _row_of_table(row: pyarrow.RecordBatch) -> Fields | str:
    try:
        return too_long("row", LONGEST) if row.nbytes > LONGEST else row.to_pylist()[0]
    except UnicodeDecodeError as wrong:
        return not_utf8(wrong)


def _read_dataset(path: str) -> Found:
    import datasets
    from datasets.utils.file_utils import xopen

    name, _, split = path.removeprefix("datasets:").partition(":")
    too_large = f"the next row takes more than {MEMORY >> 30} GiB"
    parts, number, first = (split or "train").split("+"), 0, 0
    try:
        builder = datasets.load_dataset_builder(name)
        files = builder.config.data_files or {}
        tables = [file for part in parts for file in files.get(part, [""])]
        if not all(file.lower().endswith(".parquet") for file in tables):
            with bounded_memory(MEMORY):  # for a look at the first rows
                rows, tables = iter(builder.as_streaming_dataset(split="+".join(parts))), []
    except MemoryError:
        raise OSError(too_large) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: cannot be read by the datasets library ({error}): check the name, the split and the files") from None
    for table in tables:  # of which the library would hold a row group at a time
        with xopen(table, "rb") as file:
            for number, row in _read_parquet(file, first):
                yield number, row
            first = number
    try:
        while not tables:
            with bounded_memory(MEMORY):
                fields = next(rows, None)
            if fields is None:
                return
            number += 1
            yield number, known(fields)
    except MemoryError:
        raise OSError(too_large) from None
    except (ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise OSError(error) from None


def _read_warc(path: str) -> Found:
    for number, page in read_warc(path):
        if not isinstance(page, Page):
            yield number, page
            continue
        row = {"id": page.id, "url": page.url, "date": page.date}
        if page.is_html:
            html = html_of(page.data, page.charset)
            yield number, html if isinstance(html, str) else row | html
            continue
        try:
            yield number, row | {"text": page.data.decode("utf-8-sig").replace("\0", "")}
        except UnicodeDecodeError as wrong:
            yield number, not_utf8(wrong)


def _read_file(path: str) -> Found:
    """One file, one document."""
    if os.path.getsize(path) > LONGEST:
        yield 0, too_long("file", LONGEST)
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
