"""Keeps others away from a folder while a command works there."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mujina.disks import discard
from mujina.user_input import UserError

PATIENCE = 5  # seconds for the processes that a killed holder of a lock leaves behind, which end with it
LEASE = 100  # seconds after which NFS (version 4) has let go of the locks of a node that is gone


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Keeps others out while the block runs, by a lock on the file `path`, in which stands who holds it.

    The kernel lets go when the process ends, however it ends. Over a network it holds as far as the file system's flock does: on one
    node only where Lustre is mounted with localflock or NFS with local_lock, and not at all where there is no flock. The lock of a node
    that is gone is held until the server finds out (NFS 3: until the node is back). A job that Slurm has started again for that waits for
    it, and then takes a new file of that name: Slurm has ended what its earlier start has left.
    Raises UserError, naming `what` and the holder, when it is held; BlockingIOError when another task of this very start holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    job, start = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    while True:
        file = path.open("a+")
        holder = _wait_for(file, what)
        of_job = re.search(rf" \(job {job}, start (\d+)\)$", holder) if holder and job else None
        is_lost = of_job is not None and int(of_job[1]) < start
        is_there = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())  # else another has done what follows
        if is_there and not is_lost:
            break
        file.close()
        if is_there:
            print(f"{what}: {holder} was ended by Slurm, and its lock is still there: goes on without it", flush=True)
            discard(path)
    with file:
        if of_job:
            raise BlockingIOError(errno.EAGAIN, f"still held by {holder}: where that node is gone, remove this file", str(path))
        if holder is not None:
            raise UserError(
                f"{what}: {holder or 'another process'} is at work here: wait for it to end, or stop it; where its node is gone, remove "
                f"{path}"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}{f' (job {job}, start {start})' if job else ''}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _wait_for(file: IO[str], what: str) -> str | None:
    """None once this process has the lock; who holds it where waiting does not help."""
    began, is_told = time.monotonic(), False
    while not lock(file):
        file.seek(0)
        holder = file.read()
        elsewhere = (found := re.search(r" on (\S+)", holder)) and found[1] != socket.gethostname()
        if time.monotonic() > began + (LEASE if elsewhere else PATIENCE):
            return holder
        if elsewhere and not is_told:
            print(f"{what}: {holder} is at work here, or its node is gone: waiting {LEASE} seconds to see", flush=True)
            is_told = True
        time.sleep(0.05)
    return None


def lock(file: IO[str] | int) -> bool:
    """Takes the lock of an open file or folder; False where somebody else has it, True also where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True
