"""Workers give results in order and do not outlive the process that gave them work."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.workers import Workers
from mujina.user_input import UserError

ROOT = Path(__file__).parents[2]
NO_LOG = Path("/dev/null")


def late(number: int) -> int:
    time.sleep(random.random() / 100)
    if number == 70:
        raise UserError("seventy")
    return number


def test_all_results_come_when_none_may_be_ahead():
    """All that was given out is back, and nobody is busy, while tasks are left."""
    with Workers(2, NO_LOG) as workers:
        assert list(workers.map(abs, [(-n,) for n in range(20)], ahead=0.5)) == list(range(20))


def test_results_come_in_order_and_a_mistake_at_its_turn() -> None:
    given, taken = [], []
    with Workers(3, NO_LOG) as workers, pytest.raises(UserError, match="seventy"):
        for result in workers.map(late, ((given.append(n) or n,) for n in range(100))):
            taken.append(result)
            assert len(given) - len(taken) <= 3 * 3 + 1, "more is read ahead than the memory is meant for"
    assert taken == list(range(70))


KILLED = """
import time
from pathlib import Path
from data_prep.workers import Workers
with Workers(1, Path("none")) as workers:
    print("ready", flush=True)
    list(workers.map(time.sleep, [(60,)]))
"""


def test_a_worker_in_the_middle_of_a_task_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    (worker,) = psutil.Process(parent.pid).children()
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 120
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:  # which only waits for init
        assert time.monotonic() < deadline, "it goes on writing what the next run will write"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "processes, work, argument, told",
    [
        (1, signal.raise_signal, signal.SIGTERM, r"was ended by SIGTERM: .*; start again$"),
        (1, os._exit, 3, r"ended with status 3: what it wrote above says why; start again once that is mended$"),
        (
            1,
            signal.raise_signal,
            signal.SIGKILL,
            r"was killed \(SIGKILL\): .*want of memory .*: work on a machine with more of it",
        ),
        (2, signal.raise_signal, signal.SIGKILL, r"was killed \(SIGKILL\): .*: set `processes` below 2, and start again$"),
        (1, open, "missing", r"missing: no such file or directory: check the path$"),
    ],
)
def test_how_a_worker_ended_is_told_with_what_helps(processes, work, argument, told) -> None:
    with Workers(processes, NO_LOG) as workers, pytest.raises(UserError, match=told):
        list(workers.map(work, [(argument,)]))


def wrong(name: str, number: int, error: type[Exception]) -> None:
    raise error("of a\nlibrary")


def test_an_error_that_nobody_expected_is_one_line_and_a_log(tmp_path: Path) -> None:
    for error, told in (
        (IndexError, rf"^web, 7: ended with an error that nobody expected \(IndexError: of a library\): report it, .*{tmp_path}/log has"),
        (MemoryError, "^web, 7: takes more memory than there is: set `processes` lower"),
    ):
        with Workers(1, tmp_path / "log") as workers, pytest.raises(UserError, match=told):
            list(workers.map(wrong, [("web", 7, error)]))
    assert "Traceback" in (tmp_path / "log").read_text() and "in wrong" in (tmp_path / "log").read_text()
