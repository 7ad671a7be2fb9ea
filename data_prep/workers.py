"""Processes that share one stream of tasks; their results come back in the order of the tasks."""

import functools
import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from data_prep.blocks import Block
from mujina.processes import end_with_parent
from mujina.user_input import SHOWN, UserError, explain

AHEAD = 3


class Workers:
    """`processes` forks of this process. Opened before threads start, because a fork copies only the one that calls it.

    An error that nobody expected is told in one line; what Python has to say of it is appended to the file `log`.
    """

    def __init__(self, processes: int, log: Path) -> None:
        context = multiprocessing.get_context("fork")
        self._processes: dict[Connection, Any] = {}
        for _ in range(processes):
            ours, theirs = context.Pipe()
            # A worker that held a copy of our ends would not notice that we were killed, and would wait for ever.
            # No daemon, which might not have children: a step may give up a page only in a process of its own.
            process = context.Process(target=_serve, args=(theirs, [*self._processes, ours], log))
            process.start()
            theirs.close()
            self._processes[ours] = process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
            process.join()

    def map(self, work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], ahead: float = AHEAD) -> Iterator[Any]:
        """Yields work(*task) for every task, in order. `work` is a module's function; its UserError is raised here, at its turn.

        ahead   tasks for each process that are given out or finished before the oldest result is taken: bounds the memory
        """
        numbered, ready, busy = enumerate(tasks), dict[int, Any](), dict[Connection, int]()
        idle, taken, upcoming = list(self._processes), 0, next(numbered, None)
        while True:
            # Tasks first, then results: what the caller does with a result must not keep a process waiting.
            while upcoming is not None and idle and len(ready) + len(busy) < ahead * len(self._processes):
                (number, task), connection = upcoming, idle.pop()
                self._talk(connection, functools.partial(connection.send, (work, task)))
                busy[connection] = number
                upcoming = next(numbered, None)
            while taken in ready:
                result = ready.pop(taken)
                if isinstance(result, UserError):
                    raise result
                taken += 1
                yield result
            if not busy and upcoming is None:
                return
            # None may be busy: all that was given out may have come back before the oldest result was taken.
            for answered in multiprocessing.connection.wait(list(busy)) if busy else ():
                assert isinstance(answered, Connection)  # wait() would take sockets as well
                ready[busy.pop(answered)] = self._talk(answered, answered.recv)
                idle.append(answered)

    def _talk(self, connection: Connection, say: Callable[[], Any]) -> Any:
        try:
            return say()
        except (EOFError, ConnectionError):
            process = self._processes[connection]
            process.join()
            raise UserError(f"a worker process {_end_of(process.exitcode, len(self._processes))}") from None


def _end_of(status: int, processes: int) -> str:
    """How a worker ended, and what to do about it."""
    if status >= 0:
        return f"ended with status {status}: what it wrote above says why; start again once that is mended"
    name = signal.Signals(-status).name
    if status != -signal.SIGKILL:
        return f"was ended by {name}: what it wrote above may say why; start again"
    fewer = f"set `processes` below {processes}" if processes > 1 else "work on a machine with more of it"
    return f"was killed ({name}): unless somebody did so, the kernel for want of memory (`dmesg` tells): {fewer}, and start again"


def unexpected(error: Exception, where: str, log: Path) -> UserError:
    """What to tell the user of an error that is no mistake of theirs; the file `log` has its traceback."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN]
    return UserError(f"{where}: ended with an error that nobody expected ({what}): report it, with what {log} has of it")


def _told(task: tuple[Any, ...]) -> str:
    """What a worker was at: names, files and lines."""
    return ", ".join(str(part) for part in task if isinstance(part, str | int | Path | Block)) or "a task"


def _serve(connection: Connection, others: list[Connection], log: Path) -> None:
    end_with_parent()  # the next run must not find us still writing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us all; the parent says what happened, and ends us
    for other in others:
        other.close()
    while True:
        try:
            work, task = connection.recv()
        except EOFError:
            return
        try:
            result = work(*task)
        except UserError as error:
            result = error
        except OSError as error:
            error.filename = error.filename or "a file of the output"  # a write does not know its file's name
            result = UserError(explain(error) or f"a file cannot be read or written ({error}): start again")
        except MemoryError:
            result = UserError(f"{_told(task)}: takes more memory than there is: set `processes` lower, or cut the input into files")
        except Exception as error:
            with log.open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            result = unexpected(error, _told(task), log)
        connection.send(result)
