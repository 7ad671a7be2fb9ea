"""Text files in, whole files out: strict JSONL rows, checksums, and files and folders that appear only when they are complete.

What has its name is on the disk: the bytes before the rename that shows them, the rename before anything that relies on it. So neither a
kill nor a power cut leaves a half, or a manifest without what it describes.

Every room may import this file; it imports no room.
"""

import codecs
import contextlib
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import pydantic_core
import zstandard

from mujina import disks
from mujina.disks import TRANSIENT, discard, flush, rename, sync
from mujina.locks import lock
from mujina.user_input import UserError

LONGEST = 64 << 20  # bytes of a line of somebody else's file; what is longer is no row
COARSE = 2 * 10**9  # nanoseconds: the step of the times that some file systems keep
# How compressed files are unpacked, and how many bytes at a time: zstd makes up to 32,000 times as much of them, gzip 1,000 times.
FORMATS: dict[str, tuple[Callable[[], Any], int]] = {
    ".gz": (lambda: zlib.decompressobj(wbits=31), 1 << 13),
    ".zst": (lambda: zstandard.ZstdDecompressor().decompressobj(), 1 << 8),
}
PACKED = {b"\x1f\x8b\x08": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # what its first bytes are


def read_rows(path: str | Path, longest: int = LONGEST) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, row) of a .jsonl, .jsonl.gz or .jsonl.zst file.

    Raises UserError, naming file and line, when a line is not UTF-8, is not a JSON object, has more than `longest` bytes, or a compressed
    stream breaks off.
    """
    for number, line in read_lines(path, longest, open_rows):
        if line.strip():
            row = parse_row(line)
            if isinstance(row, str):
                raise UserError(f"{path} line {number}: {row}")
            yield number, row


def read_lines(
    path: str | Path, longest: int = LONGEST, opened: Callable[[str | Path], io.BufferedReader] = lambda path: open(path, "rb")
) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) of a file. Raises UserError when it cannot be read, or a line has more than `longest` bytes; OSError
    when its disk is not well."""
    number = 0
    try:
        with opened(path) as stream:
            for number, line in lines_of(stream, longest):
                if line is None:
                    raise UserError(f"{path} line {number}: {too_long('line', longest)}")
                yield number, line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path") from None
    except OSError as error:
        if error.errno in TRANSIENT:
            raise
        after = f"{path} after line {number}" if number else path
        raise UserError(f"{after}: cannot be read further ({error}): copy or build the file again") from None


def read_texts(path: str | Path) -> Iterator[str]:
    """The lines of a text in UTF-8, without their ends. Raises UserError as `read_lines` does, and where it is none."""
    for number, line in read_lines(path):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as wrong:
            raise UserError(f"{path} line {number}: {not_utf8(wrong)}") from None


def lines_of(stream: io.BufferedReader, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number from 1, line), with None for one of more than `longest` bytes, which are passed over in pieces."""
    number = 0
    while part := stream.readline(1 << 20):
        number, size, parts = number + 1, len(part), [part]
        while not part.endswith(b"\n") and (part := stream.readline(1 << 20)):
            size += len(part)
            parts = [*parts, part] if size <= longest else []
        yield number, b"".join(parts) if size <= longest else None


def too_long(what: str, longest: int) -> str:
    """What to tell the user of a row, or a part of one, that has more than so many bytes."""
    return f"the {what} is longer than {longest >> 20} MiB: cut it into documents, or leave it out"


def parse_row(line: bytes) -> dict[str, Any] | str:
    """The object of a line of JSONL, or what is wrong with the line. A byte order mark before it, as the first line may have, is none."""
    line = line.removeprefix(codecs.BOM_UTF8)
    try:
        row = pydantic_core.from_json(line)
    except ValueError as error:
        return _why_not_json(line, error)
    return row if isinstance(row, dict) else f'is a JSON {type(row).__name__}, not an object: write rows such as {{"text": "..."}}'


def not_utf8(error: UnicodeDecodeError) -> str:
    """What to tell the user about bytes that are no text."""
    for begins, ending in PACKED.items():
        if error.object.startswith(begins):
            return f"holds packed bytes, and its name does not say so: let it end in {ending}"
    return f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8: convert the file, for example with iconv"


def _why_not_json(line: bytes, error: ValueError) -> str:
    try:
        # A lone surrogate is valid JSON ("\ud800") and no text: neither UTF-8 nor a tokenizer can hold it.
        json.dumps(json.loads(line.decode()), ensure_ascii=False).encode()
    except UnicodeDecodeError as wrong:
        return not_utf8(wrong)
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character: mend or drop the row"
    except (ValueError, RecursionError):
        pass
    return f"is not JSON ({error}): write one JSON object a line"


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes in hex. Raises UserError when the file cannot be read, OSError when its disk is not well."""
    try:
        return disks.patiently(path, lambda: _sha256_of(path))
    except OSError as error:
        if error.errno in TRANSIENT:
            raise
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path") from None


def _sha256_of(path: str | Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Stamp(NamedTuple):
    """A file as it was: what a write changes, so that one look tells that there was none, and what was in it (None: unreadable)."""

    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str | None


def stamp(path: str | Path) -> Stamp:
    """The stamp of a file. Taken before the file is read, it tells later whether that is what was read."""
    status = os.stat(path)
    try:
        digest = sha256_of(path)
    except (UserError, OSError):
        digest = None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest)


def write_stamps(record: Path, stamps: Mapping[str, Stamp]) -> None:
    """Puts down the stamps of files, for `changed`."""
    write_whole(record, json.dumps(stamps).encode())


def changed(record: Path, folder: Path = Path()) -> list[str]:
    """The files of a record (their paths are relative to `folder`) that are gone or hold something else now; a record that is damaged.

    A file that was touched, or copied, and holds the same has not changed: it is read for that once, and its new stamp put down.
    """
    try:
        before = {name: Stamp(*values) for name, values in json.loads(record.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError):
        return [str(record.absolute())]
    stamped, is_old = record.stat().st_mtime_ns, True
    now = dict[str, Stamp | None]()
    for name, old in before.items():
        try:
            status = os.stat(folder / name)
            times = status.st_mtime_ns, status.st_ctime_ns
            # Times in whole seconds do not tell a write in the same moment as the stamp.
            is_young = not any(time % 10**9 for time in times) and max(times) > stamped - COARSE
            is_old &= not is_young
            looks_same = (status.st_size, *times) == old[:3] and not is_young
            now[name] = old if looks_same else stamp(folder / name)
        except OSError:
            now[name] = None
    different = [name for name, new in now.items() if new is None or new.sha256 != before[name].sha256]
    if (now != before or not is_old) and not different:
        write_whole(record, json.dumps(now).encode())
    return different


def write_parts(path: Path, parts: Iterable[Any]) -> None:
    """Writes bytes, part by part; the file is then safely on the disk. An OSError names the file, of which nothing is left."""
    try:
        with open(path, "wb", buffering=1 << 20) as file:
            file.writelines(parts)
            flush(file)
    except OSError as error:
        path.unlink(missing_ok=True)  # on a full disk the half of a file is in the way
        error.filename = str(path)
        raise


def _led_to(path: Path) -> Path:
    """What a symbolic link leads to; any other path as it was given, for errors name it."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that a reader finds all of it, or the older one, or none; it is on the disk when this returns.

    A symbolic link stays, and what it leads to is written.
    """
    path = _led_to(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    write_parts(temporary, [data])
    _show(temporary, path)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """`write_whole` of what the block writes into the file that it is given; nothing is left when the block ends with an error."""
    path = _led_to(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            flush(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _show(temporary, path)


def rename_folder(partial: Path, folder: Path) -> None:
    """Gives a folder its name once all that is in it is on the disk, however it was written; the name then is, too."""
    _sync_all(partial)
    _show(partial, folder)


def _sync_all(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for file in (Path(path) / name for name in names):
            if not file.is_symlink():
                sync(file)
        sync(Path(path))


def _show(temporary: Path, path: Path) -> None:
    rename(temporary, path)
    sync(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextmanager
def whole_folder(folder: Path, mark: str) -> Iterator[Path]:
    """Gives a temporary folder to fill; it becomes `folder`, in the place of an older one, when the block ends without an error.

    All that is in it is then on the disk, however it was written.
    `mark` is a file that every complete folder of this kind holds; a folder without it is somebody else's and is left alone (UserError).
    One process at a time writes it, as far as `hold` holds.
    """
    folder = Path(os.path.realpath(folder))  # what is written beside it has its name and its disk, which `.`, `..` and links do not tell
    if folder.exists() and not (folder / mark).exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists, is not empty and holds no {mark}: name another folder, or remove this one")
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    with _alone(partial, f"{folder}: another process writes it (into {partial})"):
        try:
            yield partial
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.filename is None:  # it came with a write
                error.filename = str(folder)
            raise
        _sync_all(partial)  # takes its time, in which the older one is still there
        discard(old)  # of a process that was killed here
        if folder.exists():
            rename(folder, old)
        _show(partial, folder)
        discard(old)


@contextmanager
def _alone(partial: Path, told: str) -> Iterator[None]:
    """Makes the empty folder anew, in the place of what a killed process has left, unless one that lives fills it (UserError)."""
    with contextlib.ExitStack() as held:
        if partial.is_dir():
            _lock_folder(partial, held, told)
            discard(partial)
        partial.mkdir(parents=True)
        _lock_folder(partial, held, told)
        yield


def _lock_folder(folder: Path, held: contextlib.ExitStack, told: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)  # the lock is on the folder, whatever it is renamed to
    held.callback(os.close, descriptor)
    if not lock(descriptor):
        raise UserError(f"{told}: wait for it to end, or stop it")


def open_rows(path: str | Path) -> io.BufferedReader:
    """The bytes of a .jsonl, .jsonl.gz or .jsonl.zst file; OSError where the file is broken. Raises UserError on any other name."""
    if not str(path).lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        raise UserError(f"{path}: unknown kind of file: give .jsonl, .jsonl.gz or .jsonl.zst")
    return io.BufferedReader(Stream(path), 1 << 20)


class Stream(io.RawIOBase):
    """The content of a plain, .gz or .zst file. Where the file is broken, all that comes before is given, and then OSError is raised."""

    def __init__(self, path: str | Path) -> None:
        self._pieces, self._rest = _content(path), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _content(path: str | Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        ending = Path(path).suffix.lower()
        if ending not in FORMATS:
            yield from iter(lambda: file.read(1 << 16), b"")
            return
        new, size = FORMATS[ending]
        stream = None
        try:
            while piece := file.read(size):
                while piece := piece if stream or ending != ".gz" else piece.lstrip(b"\0"):  # with which some tools fill a file up
                    stream = stream or new()
                    yield stream.decompress(piece)
                    piece, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
        except (zlib.error, zstandard.ZstdError) as error:
            raise OSError(f"not {ending[1:]} any more, or never was: {error}") from None
        if stream is not None:
            raise OSError("the file is cut off")
