"""What a process owes its children, and what the system knows of it."""

import contextlib
import ctypes
import os
import re
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """From now on the kernel sends this process signal `number` when its parent is killed, which could not do so itself. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def bytes_moved() -> int:
    """How many bytes this process has read and written so far, what goes over sockets aside. Linux only; elsewhere 0."""
    try:
        counts = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return sum(map(int, re.findall(r"^[rw]char: (\d+)", counts, re.MULTILINE)))


@contextlib.contextmanager
def bounded_memory(num_bytes: int) -> Iterator[None]:
    """Lets the block take so many bytes more than the process has now; what asks for more is given none: a MemoryError. Linux only.

    What libraries have set aside before, such as Arrow's first GiB, comes on top of it. Other threads of the process feel the bound.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (min([size + num_bytes, *(limit for limit in (soft, hard) if limit >= 0)]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """Is set by the first SIGINT or SIGTERM while the block runs, which then does nothing else; a second one does what it did before.

    Python takes signals in the main thread only: in any other the event is never set.
    """
    came = threading.Event()
    before: dict[int, Any] = {}

    def stop(number: int, frame: Any) -> None:
        came.set()
        restore()
        os.write(2, b"told to stop: waiting for what is under way; once more ends it at once\n")

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup's child, or a handler that is not Python's
                before[number] = signal.signal(number, stop)
    try:
        yield came
    finally:
        restore()
