"""Raw inputs become documents: WARC and WET archives, HTML pages, text files, JSONL and parquet rows, `datasets:` names.

An input is read as a stream, flat in memory, and what is wrong in it is named by file and line, record or row; `data_prep.row` says what
a row is. HTML stays HTML here (`metadata["html"]` is True); the step `extract` turns it into text.
"""

import glob
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow
from datatrove.data import Document
from pyarrow import parquet

from data_prep.row import KEYS, Fields, fields_of, joined, known, row_of
from data_prep.steps.decode import html_of
from data_prep.steps.warc import Page, Passed, read_warc
from mujina.files import LONGEST, Stream, lines_of, not_utf8, too_long
from mujina.user_input import UserError

PAGES = (".html", ".htm")
ROWS = 64  # of a parquet file at a time
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
            passed(re.split(r"[:(]| [`'\d]", row.lstrip("0123456789, "))[0].strip())


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
