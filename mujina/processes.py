"""What a process owes its children."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """From now on the kernel sends this process signal `number` when its parent is killed, which could not do so itself. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
