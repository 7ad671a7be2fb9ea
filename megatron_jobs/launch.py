"""Starts a training run on this machine: everything is checked first, then its processes are started and watched.

    python -m megatron_jobs.launch CONFIG.yaml [key=value …] --processes 2             (what `mujina train` calls)

When one process dies, the others are taken down, and the error that came first is shown last. Ctrl-C or SIGTERM ends the run after its
step with a checkpoint; a second one ends it at once. On a cluster the Slurm scripts start `python -m megatron_jobs.train` themselves.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from megatron_jobs import config as configuration
from megatron_jobs import failures, stability
from megatron_jobs.check import check
from megatron_jobs.config import RunConfig
from megatron_jobs.data import phases
from megatron_jobs.stability import Guard
from mujina.checkpoint_folders import steps
from mujina.exits import MISTAKE, STOPPED
from mujina.processes import end_with_parent
from mujina.user_input import UserError, command_line

TAIL = 15  # lines of a traceback or log that are shown


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.micro_batch_size=2")] = None,
    processes: Annotated[int, typer.Option(min=1, max=1024, help="how many processes: one a GPU, or a few on a CPU")] = 1,
) -> None:
    """Trains to the end of the last phase; a run that was interrupted goes on where its newest whole checkpoint stands."""
    settings, _ = check(configuration.load(config, overrides), processes)
    num_steps = phases.num_steps(settings.phases)
    if _is_done(settings, num_steps):
        print(f"{settings.run}: all {num_steps} steps are done")
        return
    before = failures.attempts(settings.run)
    with held_port() as port:
        ranks = _start([sys.executable, "-m", "megatron_jobs.train", str(config), *(overrides or [])], processes, port)
        stopping = _forward_signals(ranks)
        failed = _first_to_fail(ranks)
    if failed is None:
        return
    attempt = next((path for path in failures.attempts(settings.run) if path not in before), None)
    first = failures.first_rank(attempt) if attempt else None
    if first is not None and ranks[first].poll():  # others may have ended because of it in the same moment
        failed = first
    status = ranks[failed].returncode
    if stopping.is_set() and status < 0:  # before it could save, or at the second signal
        status = STOPPED
    is_told = status in (MISTAKE, STOPPED)  # a mistake stands on the console in one line
    # Before the others are taken down: they wait for this, or would take their lost connections for the first error.
    block = None if is_told else _first_error(failed, status, attempt)
    _take_down(ranks)
    if block:
        print(block, file=sys.stderr)
    sys.exit(status if status > 0 else 1)


def _is_done(config: RunConfig, num_steps: int) -> bool:
    """Whether the newest whole checkpoint is that of this run's last step. Raises UserError when no step of the run was trained."""
    folder = config.run / "checkpoints"
    if max(steps(folder), default=0) < num_steps:
        return False  # the trainer looks at it

    from megatron_jobs.checkpoints.checkpoint import newest_whole

    newest, guard = newest_whole(folder), Guard(config.stability, stability.read_rollbacks(config.run))
    if newest is None or newest.step < num_steps or not guard.agrees(newest.step, newest.ledger.interventions):
        return False  # the last one is damaged, or was rolled back
    guard.from_ledger(newest.ledger.interventions)
    if guard.left_out_all(newest.step):
        raise UserError(guard.never_updated(config.run, newest.step))
    return True


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A TCP port for MASTER_PORT that nobody else is given while the block runs, from before rank 0 listens on it.

    It is bound and does not listen: the kernel then lets those listen who ask for SO_REUSEADDR and this very port, as torch's store does.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))  # at every address, as the store will be
        yield holder.getsockname()[1]


def _start(command: list[str], processes: int, port: int) -> list[subprocess.Popen[bytes]]:
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // processes))
    environments = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [
        # In sessions of their own: Ctrl-C reaches the launcher alone, which passes it on as SIGTERM.
        subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in env.items()}, start_new_session=True, preexec_fn=end_with_parent)
        for env in environments
    ]


def _forward_signals(ranks: list[subprocess.Popen[bytes]]) -> threading.Event:
    """Ctrl-C and SIGTERM reach the processes as SIGTERM, and as SIGKILL from the second time on; the event tells that one came."""
    stopping = threading.Event()

    def forward(number: int, frame: object) -> None:
        for process in ranks:
            process.send_signal(signal.SIGKILL if stopping.is_set() else signal.SIGTERM)
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    return stopping


def _first_to_fail(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Waits for all to end well (None), or for the first one that does not."""
    while True:
        states = [process.poll() for process in ranks]
        for rank, state in enumerate(states):
            if state not in (None, 0):
                return rank
        if None not in states:
            return None
        time.sleep(0.1)


def _take_down(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Gives the processes that are left a moment to save their last words, then kills them."""
    deadline = time.monotonic() + failures.GRACE
    for process in ranks:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _first_error(rank: int, status: int, attempt: Path | None) -> str:
    """The block that ends a failed run on the console: what came first, and where the rest is."""
    if attempt is None:
        return f"rank {rank} {_how(status)}, before its log began"
    log = attempt / f"rank-{rank}.log"
    lines = log.read_text(errors="replace").splitlines()[-TAIL:] if log.exists() else []
    told = "\n".join([_how(status), *lines])
    failures.claim(attempt, f"rank {rank}", told)
    first, *rest = (failures.first_error(attempt) or f"rank {rank}\n{told}").splitlines()
    line = "-" * 100
    return "\n".join([line, f"first error: {first}", *rest[-TAIL:], "", f"all ranks' logs: {attempt}", line])


def _how(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL (the kernel does that when memory runs out: see dmesg); the end of its log:"
    if status == -signal.SIGBUS:
        return "was killed by SIGBUS (a file that it had mapped was cut, replaced or cannot be read any more); the end of its log:"
    return f"was killed by {signal.Signals(-status).name}; the end of its log:" if status < 0 else f"ended with status {status}; its log:"


if __name__ == "__main__":
    command_line(main)
