"""Files of lines to which a command adds what has happened, and which others read later: a record stops nothing."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mujina import disks
from mujina.disks import flush
from mujina.files import parse_row, write_whole


def append(path: Path, data: bytes) -> None:
    """Adds whole lines to a record; they are on the disk when this returns. Behind half a line, of a disk that was full, they begin anew.

    Where that fails with OSError, the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        begin = b"\n" if size and file.read(1) != b"\n" else b""
        try:
            file.write(begin + data)
            flush(file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise


class Record:
    """A file of lines that others read later. What cannot be written is told once, kept, and written with what comes: it stops nothing."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self._say, self._waiting = path, say, b""

    def lines(self) -> list[str]:
        """Those that have an end."""
        return ((disks.read(self.path) or b"") + self._waiting).decode(errors="replace").split("\n")[:-1]

    def tidy(self, kept: Callable[[list[tuple[str, dict[str, Any]]]], list[str]]) -> list[str]:
        """Leaves those of the lines that `kept` returns, which is given those that are JSON objects; returns them."""
        wanted = list[str]()
        try:
            wanted = kept([(line, row) for line in self.lines() if isinstance(row := parse_row(line.encode()), dict)])
            data = "".join(line + "\n" for line in wanted).encode()
            if data != disks.read(self.path):
                write_whole(self.path, data)
            self._waiting = b""
        except OSError as error:
            self._say(f"{self.path}: could not be tidied ({error}): it stays as it is")
        return wanted

    def add(self, *lines: str) -> None:
        """Adds lines; without any, those that could not be written yet are."""
        is_new, self._waiting = not self._waiting, self._waiting + "".join(line + "\n" for line in lines).encode()
        if not self._waiting:
            return
        try:
            append(self.path, self._waiting)
            self._waiting = b""
        except OSError as error:
            if is_new:
                self._say(f"{self.path}: could not be written ({error}): its lines are kept until it can be")
