"""What file systems over a network do, and what is made of it here. Whatever touches a file that other nodes see goes by this table.

    what happens                                           what is done
    EIO, ESTALE, ETIMEDOUT, … (TRANSIENT)                  tried again for PATIENCE seconds; then an error that ends with status 1 and not
                                                           with 2, so that a job is requeued
    a folder, or a file, cannot be synced (FUSE, s3fs)     what the system writes is all there is: goes on
    a rename is told "no such file" though it was made     the names are looked at (NFS repeats a request whose answer was lost)
    a folder cannot be removed (.nfs files, EBUSY)         it gets another name, and is removed with the next one
    no symbolic links                                      `latest` is a file that holds the name (`checkpoint_folders`)
    no flock                                               nobody is kept out (`locks.hold`)
    the lock of a node that is gone                        waited for as long as NFS 4 takes to let go of it; then a job that
                                                           Slurm has started again goes on without it (`locks.hold`)
    sizes and lists of files that lag                      the other ranks are asked, and looked again for a minute (`checkpoint`)
    clocks that differ, times in whole seconds             life is seen by change (`failures`), files that are as young as their stamp are
                                                           read (`files.changed`)
    statvfs that knows nothing                             the room is not checked
    two nodes append to one file                           a torn line counts as not written (`slurm.history`)

Nothing here uses hard links, O_DIRECT, or maps a file that another process may cut. Imports nothing of ours.
"""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

PATIENCE = 20.0  # seconds
# What a file system says that is not well, or not there for the moment; it says nothing about the file.
TRANSIENT = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EAGAIN, errno.EBUSY, errno.ENOLCK),
}
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.ENOTTY}  # of fsync, which is not there


def patiently[T](path: str | Path, action: Callable[[], T]) -> T:
    """What `action` returns, which is called again as long as the file system is not well. Raises what it raises at last, or at once, and
    its OSErrors name `path`: what comes with a read names nothing."""
    end, pause = None, 0.1
    while True:
        try:
            return action()
        except OSError as error:
            end = end or time.monotonic() + PATIENCE
            if error.errno not in TRANSIENT or time.monotonic() > end:
                error.filename = error.filename or str(path)
                raise
        time.sleep(pause)
        pause *= 2


def read(path: str | Path) -> bytes | None:
    """The bytes of a file; None where there is none. (`Path.exists` is no question to ask before: it may be wrong about either.)"""
    try:
        return patiently(path, Path(path).read_bytes)
    except FileNotFoundError:
        return None


def sync(path: Path) -> None:
    """Waits until the bytes of a file, or the names in a folder (what was made, renamed and removed there), are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def flush(file: IO[bytes]) -> None:
    """Waits until all that was written to an open file is on the disk."""
    file.flush()
    _sync(file.fileno())


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def rename(old: Path, new: Path) -> None:
    """Gives a file or folder another name, in the place of a file, or of an empty folder, that has it."""
    before = os.lstat(old)
    try:
        os.replace(old, new)
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(before, os.lstat(new)):
                return
        raise


def discard(path: Path) -> None:
    """Removes a folder, or whatever has the name, which is free afterwards. What cannot go now is told, and goes with the next one that
    is discarded beside it: what is old stops nothing. Raises OSError where it cannot even be renamed."""
    with contextlib.suppress(FileNotFoundError):
        # Renamed first: what is half removed must not look like something whole.
        rename(path, path.with_name(f".removed-{time.time_ns()}-{path.name.removeprefix('.')}"))
    sweep(path.parent)


def sweep(folder: Path) -> None:
    """Removes what `discard` has left in a folder."""
    for left in folder.glob(".removed-*"):
        if re.match(r"\.removed-\d{19}-", left.name):
            try:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink(missing_ok=True)
            except OSError as error:
                print(f"{left}: could not be removed ({error}): tried again later", flush=True)


def free_bytes(path: str | Path) -> int | None:
    """The room on the file system of a folder; None where it does not tell."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return usage.free if usage.total else None
