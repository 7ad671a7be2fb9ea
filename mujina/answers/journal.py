"""Answers that were paid for once, kept in a file: whoever was stopped, or killed at any moment, asks for none of them again.

    with open_journal(Path("runs/preferences/journal.jsonl")) as journal:
        answerer = Journalled(open_answerer("http://node-3:8000/v1#moe"), journal)      # asks as any other Answerer does

A line of the file is written when an answer comes, in whichever order they come:

    {"key": "…", "asked": {…}, "answer": {"text", "finish_reason", "num_prompt_tokens", "num_answer_tokens", "model", "seconds"}}
    {"key": "…", "asked": {…}, "failure": "why there is none"}

    asked     model (a server's name for it, without the URL; of a folder its name and a digest), messages, max_new_tokens, temperature,
              top_p, seed, and number (which of the answers to this conversation)
    key       the first 16 bytes of the SHA-256 of `asked`, as it stands in the line

A failure is asked again by the next process. Half a line at the end, of a process that was killed, is cut off; a line in the middle that
is none is passed over. Both are told. The system has each line when it is written, and the disk 5 seconds later and at the end.
"""

import contextlib
import hashlib
import os
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from mujina.answers.conversation import HALF_A_PAIR, Answer, Answerer, Failure, Request, Session
from mujina.disks import flush
from mujina.exits import STOPPED
from mujina.locks import hold
from mujina.user_input import UserError

SYNC_INTERVAL = 5.0  # seconds
_BEGIN = b'{"key":"'
_NUM_SHARDS = 1 << 16
_PIECE = 1 << 13  # bytes of a line that are read at once


def asked_of(request: Request, model: str) -> bytes:
    """What an answer is an answer to, as it stands in the journal. Raises TypeError where a text holds half of a surrogate pair."""
    sampling = request.sampling
    return orjson.dumps(
        {
            "model": model,
            "messages": [{"role": message.role, "content": message.content} for message in request.conversation.messages],
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "seed": sampling.seed,
            "number": request.number,
        }
    )


def key_of(asked: bytes) -> bytes:
    return hashlib.sha256(asked).digest()[:16]


@contextmanager
def open_journal(path: Path) -> Iterator["Journal"]:
    """The journal at `path`, which is made where there is none; other processes are kept out while the block runs.

    Raises UserError where another process has it, and where the file is something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(path.with_name(f".{path.name}.lock"), str(path)):
        journal = Journal(path)
        try:
            yield journal
            if journal.num_given:
                _say(f"{path}: {journal.num_given:,} answers were there; to have them asked for anew, remove it")
        except SystemExit as error:
            if error.code == STOPPED:
                _say(f"stopped: {path} holds {journal.num_answers:,} answers, and the same command goes on from there")
            raise
        finally:
            journal.close()


class Journal:
    """The file, and where in it which answer is. Who opens it holds its lock.

    num_given   answers that were there when they were asked for
    """

    def __init__(self, path: Path) -> None:
        self.path, self.num_given = path, 0
        self._index = _Index()
        self._file = open(path, "a+b", buffering=0)
        try:
            self._size = self._read()
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    @property
    def num_answers(self) -> int:
        return self._index.num_keys

    def find(self, key: bytes) -> Answer | None:
        for offset in self._index.places(key):
            row = orjson.loads(self._line_at(offset))
            if row["key"] == key.hex():
                self.num_given += 1
                return Answer(**row["answer"])
        return None

    def add(self, asked: bytes, found: Answer | Failure) -> None:
        """The system has the line when this returns. Where it cannot be written (OSError), the file is as it was."""
        key = key_of(asked)
        end = b'"answer":' + orjson.dumps(found) if isinstance(found, Answer) else b'"failure":' + orjson.dumps(found.reason)
        line = b'%b%b","asked":%b,%b}\n' % (_BEGIN, key.hex().encode(), asked, end)
        try:
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
            if time.monotonic() >= self._synced + SYNC_INTERVAL:
                self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            error.filename = str(self.path)
            raise
        if isinstance(found, Answer):
            self._index.add(key, self._size)
        self._size += len(line)

    def close(self) -> None:
        """All is on the disk when this returns; a file into which nothing came is gone."""
        try:
            self._sync()
            if not self._size:
                self.path.unlink()
        finally:
            self._file.close()

    def _sync(self) -> None:
        flush(self._file)
        self._synced = time.monotonic()

    def _read(self) -> int:
        """Fills the index; returns the size of the file once what is torn off has been cut."""
        size, damaged, num_whole, torn = 0, list[int](), 0, b""
        with open(self.path, "rb", buffering=1 << 20) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    torn = line
                    break
                if row := _row_in(line):
                    num_whole += 1
                    if "answer" in row:
                        self._index.add(bytes.fromhex(row["key"]), size)
                else:
                    damaged.append(number)
                size += len(line)
        if (damaged or not _BEGIN.startswith(torn[: len(_BEGIN)])) and not num_whole:
            raise UserError(f"{self.path}: is no journal of answers: name another file, or remove this one")
        if damaged:
            _say(f"{self.path}: {len(damaged):,} lines are damaged, the first is line {damaged[0]}: their answers are asked for again")
        if torn:
            _say(f"{self.path}: the last line is torn off: it is cut, and its answer asked for again")
            self._file.truncate(size)
        return size

    def _line_at(self, offset: int) -> bytes:
        line = b""
        while b"\n" not in line[-_PIECE:]:
            piece = os.pread(self._file.fileno(), _PIECE, offset + len(line))
            assert piece, "a line of the index has an end"
            line += piece
        return line[: line.index(b"\n")]


class Journalled(Answerer):
    """Answers as `answerer` does, which is not asked for what the journal has."""

    def __init__(self, answerer: Answerer, journal: Journal) -> None:
        self._answerer, self._journal, self._model = answerer, journal, answerer.model

    @property
    def model(self) -> str:
        return self._model

    @contextmanager
    def open(self) -> Iterator["_Session"]:
        with self._answerer.open() as inner:
            yield _Session(inner, self._journal, self._model)


class _Session(Session):
    """What is asked for twice at a time is asked once."""

    def __init__(self, inner: Session, journal: Journal, model: str) -> None:
        self._inner, self._journal, self._model = inner, journal, model
        self._waiting: dict[bytes, list[Any]] = {}  # what was asked → the names under which it was
        self._found: deque[tuple[Any, Answer | Failure]] = deque()
        self._num_open = 0

    @property
    def num_open(self) -> int:
        return self._num_open

    @property
    def most(self) -> int:
        return self._inner.most

    @property
    def has_room(self) -> bool:
        return self._num_open < self._inner.most and self._inner.has_room

    def put(self, name: Any, request: Request) -> None:
        self._num_open += 1
        try:
            asked = asked_of(request, self._model)
        except TypeError:
            return self._found.append((name, Failure(HALF_A_PAIR)))
        if asked in self._waiting:
            self._waiting[asked].append(name)
        elif answer := self._journal.find(key_of(asked)):
            self._found.append((name, answer))
        else:
            self._waiting[asked] = [name]
            self._inner.put(asked, request)

    def take(self) -> tuple[Any, Answer | Failure]:
        if not self._found:
            asked, found = self._inner.take()
            self._journal.add(asked, found)
            self._found.extend((name, found) for name in self._waiting.pop(asked))
        self._num_open -= 1
        return self._found.popleft()


class _Index:
    """Where the lines of keys begin: about 15 bytes a key, so that ten million are 150 MB.

    The first 16 bits of a key choose two arrays, of the next 32 bits and of offsets; whoever asks compares the rest.
    """

    def __init__(self) -> None:
        self._begins: list[array[int] | None] = [None] * _NUM_SHARDS
        self._offsets: list[array[int] | None] = [None] * _NUM_SHARDS
        self.num_keys = 0

    def add(self, key: bytes, offset: int) -> None:
        shard = key[0] << 8 | key[1]
        begins, offsets = self._begins[shard], self._offsets[shard]
        if begins is None or offsets is None:
            begins, offsets = self._begins[shard], self._offsets[shard] = array("I"), array("Q")
        begins.append(int.from_bytes(key[2:6]))
        offsets.append(offset)
        self.num_keys += 1

    def places(self, key: bytes) -> Iterator[int]:
        """Of all keys that begin alike."""
        shard = key[0] << 8 | key[1]
        begins, offsets = self._begins[shard], self._offsets[shard]
        if begins is None or offsets is None:
            return
        at, begin = -1, int.from_bytes(key[2:6])
        with contextlib.suppress(ValueError):
            while True:
                at = begins.index(begin, at + 1)
                yield offsets[at]


def _row_in(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None where it is damaged."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        row = orjson.loads(line)
        if line.startswith(_BEGIN) and len(bytes.fromhex(row["key"])) == 16:
            if isinstance(row.get("failure"), str):
                return dict(row)
            Answer(**row["answer"])
            return dict(row)
    return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
