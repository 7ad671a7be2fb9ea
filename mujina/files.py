"""Text files in, whole files out: strict JSONL rows, checksums, and folders that appear only when they are complete.

Every room may import this file; it imports no room.
"""

import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zstandard

from mujina.user_input import UserError

# How compressed files are unpacked, and how many bytes at a time: zstd makes up to 32,000 times as much of them, gzip 1,000 times.
FORMATS: dict[str, tuple[Callable[[], Any], int]] = {
    ".gz": (lambda: zlib.decompressobj(wbits=31), 1 << 13),
    ".zst": (lambda: zstandard.ZstdDecompressor().decompressobj(), 1 << 8),
}


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, row) of a .jsonl, .jsonl.gz or .jsonl.zst file.

    Raises UserError, naming file and line, when a line is not UTF-8, is not a JSON object, or a compressed stream breaks off.
    """
    for number, line in _numbered_lines(Path(path)):
        where = f"{path} line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
            # A lone surrogate is valid JSON ("\ud800") and no text: neither UTF-8 nor a tokenizer can hold it.
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {line[error.start]:#04x} is not UTF-8: convert the file, for example with iconv") from None
        except UnicodeEncodeError:
            raise UserError(f"{where}: holds half of a surrogate pair, which is no character: mend or drop the row") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: is not JSON ({error.msg}): write one JSON object a line") from None
        if not isinstance(row, dict):
            raise UserError(f'{where}: is a JSON {type(row).__name__}, not an object: write rows such as {{"text": "..."}}')
        yield number, row


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes in hex. Raises UserError when the file cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path") from None


def write_parts(path: Path, parts: Iterable[Any]) -> None:
    """Writes bytes, part by part; the file is then safely on the disk. An OSError names the file, of which nothing is left."""
    try:
        with open(path, "wb", buffering=1 << 20) as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)  # on a full disk the half of a file is in the way
        error.filename = str(path)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that a reader finds all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    os.replace(temporary, path)


@contextmanager
def whole_folder(folder: Path, mark: str) -> Iterator[Path]:
    """Gives a temporary folder to fill; it becomes `folder`, in the place of an older one, when the block ends without an error.

    `mark` is a file that every complete folder of this kind holds; a folder without it is somebody else's and is left alone (UserError).
    """
    if folder.exists() and not (folder / mark).exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists, is not empty and holds no {mark}: name another folder, or remove this one")
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    number = 0
    try:
        with open_rows(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path") from None
    except OSError as error:
        raise UserError(f"{path} after line {number}: cannot be read further ({error}): copy or build the file again") from None


def open_rows(path: str | Path) -> io.BufferedReader:
    """The bytes of a .jsonl, .jsonl.gz or .jsonl.zst file; OSError where the file is broken. Raises UserError on any other name."""
    if not str(path).endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        raise UserError(f"{path}: unknown kind of file: give .jsonl, .jsonl.gz or .jsonl.zst")
    return io.BufferedReader(Stream(path), 1 << 20)


class Stream(io.RawIOBase):
    """The content of a plain, .gz or .zst file. Where the file is broken, all that comes before is given, and then OSError is raised.

    position, tail   how many bytes were given, and the last four of them
    """

    def __init__(self, path: str | Path) -> None:
        self._pieces, self._rest = _content(path), memoryview(b"")
        self.position, self.tail = 0, b""

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
            self.tail = (self.tail + piece[-4:])[-4:]
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        self.position += size
        return size


def _content(path: str | Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        if Path(path).suffix not in FORMATS:
            yield from iter(lambda: file.read(1 << 16), b"")
            return
        new, size = FORMATS[Path(path).suffix]
        stream = None
        try:
            while piece := file.read(size):
                while piece:
                    stream = stream or new()
                    yield stream.decompress(piece)
                    piece, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
        except (zlib.error, zstandard.ZstdError) as error:
            raise OSError(f"not {Path(path).suffix[1:]} any more, or never was: {error}") from None
        if stream is not None:
            raise OSError("the file is cut off")
