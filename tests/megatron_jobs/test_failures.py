"""Runs whose processes die, hang or are told to stop: started by the command that users call, with a fault in one rank."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_jobs import failures, launch
from tests.conftest import tiny
from tests.megatron_jobs.test_kill import wait_for

ROOT = Path(__file__).parents[2]
NUM_STEPS = 60  # more than a run gets to while it is told to stop, on a busy machine as well
FAULTS = {
    "raises": "raise ValueError('the fault of this test')",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "exits": "os._exit(7)",
    "hangs": "time.sleep(1000)",
    "hangs in C": "ctypes.PyDLL(None).sleep(1000)",  # PyDLL keeps the interpreter's lock
    "bad data": "raise UserError('data.folder (x): is empty: fill it')",
}
# Python runs it at the start of every process whose path it is on.
SITECUSTOMIZE = """
import os, sys
if os.environ.get("RANK") == "1":
    import ctypes, signal, threading, time
    from mujina.user_input import UserError
    def fault(): {fault}
    def patch():
        while not hasattr(sys.modules.get("megatron_jobs.engine.passes"), "Passes"): time.sleep(0.01)
        passes, calls = sys.modules["megatron_jobs.engine.passes"].Passes, []
        gradients = passes.gradients
        def faulty(self, *arguments):
            calls.append(1)
            if len(calls) == 3: fault()
            return gradients(self, *arguments)
        passes.gradients = faulty
    threading.Thread(target=patch, daemon=True).start()
"""


def test_a_log_folder_that_is_gone_does_not_stop_the_next_start(tmp_path):
    first, second = failures.new_attempt(tmp_path), failures.new_attempt(tmp_path)
    first.rmdir()
    (tmp_path / "logs/attempt-of-mine").mkdir()
    third = failures.new_attempt(tmp_path)
    assert [path.name for path in failures.attempts(tmp_path)] == [second.name, third.name] == ["attempt-2", "attempt-3"]


def test_what_a_start_writes_of_itself_does_not_stop_it(tmp_path, monkeypatch, capsys):
    """A list of files that lags, and a disk that is full when the first error is told."""
    failures.new_attempt(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(failures, "attempts", lambda run: [])
        attempt = failures.new_attempt(tmp_path)
    assert attempt.name == "attempt-2"
    with monkeypatch.context() as patch:
        patch.setattr(failures.socket, "gethostname", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert failures.claim(attempt, "rank 1", "the error") and "could not be written" in capsys.readouterr().err
    assert not failures.claim(attempt, "rank 0", "a later one") and failures.first_error(attempt) == ""
    assert "rank 1 ended with status 7" in launch._first_error(1, 7, attempt).replace("\n", " ")


def test_life_is_seen_by_change_and_not_by_clocks(tmp_path):
    """Of another node, whose clock is a year ahead, or of a file system that keeps no times."""
    watch = object.__new__(failures.Watchdog)
    watch.attempt, watch.hang_seconds, watch._wait_from = tmp_path, 600.0, lambda moment: None
    other = tmp_path / "alive-1"
    for change in (0, 31_000_000):
        other.write_text(str(change))
        os.utime(other, (time.time() + change, time.time() + change))
        watch._signs = watch._signs_of_life()
        assert not watch._others_live()
        other.write_text("got on")
        os.utime(other, (0, 0))
        assert watch._others_live() and not watch._others_live()


def start(prepared: Path, folder: Path, fault: str | None, **sections) -> subprocess.Popen:
    config = tiny(prepared, folder / "run", **sections)
    (folder / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    if fault:
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(fault=FAULTS[fault]))
    command = [sys.executable, "-m", "megatron_jobs.launch", str(folder / "run.yaml"), "--processes", "2"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("fault", "first", "status"),
    [
        ("raises", "ValueError: the fault of this test", 1),
        ("killed", "was killed by SIGKILL (the kernel does that when memory runs out", 1),
        ("exits", "ended with status 7", 7),
        ("bad data", "error: data.folder (x): is empty: fill it", 2),
    ],
)
def test_a_rank_that_dies_takes_the_run_down_and_is_named(prepared, tmp_path, fault, first, status):
    launched = start(prepared, tmp_path, fault)
    attempt = tmp_path / "run/logs/attempt-1"
    wait_for(lambda: (attempt / "first_error").exists() or launched.poll() is not None, [launched])
    shown, _ = launched.communicate(timeout=300)  # taken down; by itself it would notice in 10 minutes (train.hang_minutes)
    assert launched.returncode == status, shown
    told = (attempt / "first_error").read_text()
    assert told.startswith("rank 1 on ") and first in told and first in shown
    assert shown.count("in faulty\n") == (1 if fault == "raises" else 0), shown
    assert "gloo" not in shown and "Traceback" not in shown.replace(told, ""), shown  # nothing of what only follows from it
    if fault != "bad data":
        block = shown[shown.index("first error: rank 1 on") :]
        assert first in block and f"all ranks' logs: {attempt}" in block
    assert "processes on CPU" in (attempt / "rank-0.log").read_text() and "processes on CPU" not in (attempt / "rank-1.log").read_text()


@pytest.mark.parametrize(("fault", "place"), [("hangs", "in fault (sitecustomize.py:"), ("hangs in C", "without an answer")])
def test_a_hang_ends_the_run_with_the_stacks_of_all_ranks(prepared, tmp_path, fault, place):
    launched = start(prepared, tmp_path, fault, train=dict(hang_minutes=0.5))
    shown, _ = launched.communicate(timeout=300)
    assert launched.returncode == 1, shown
    (line,) = [line for line in shown.splitlines() if line.startswith("hung: ") and "the stacks are in" in line] or [shown]
    assert f"rank 1 {place}" in line, line
    assert re.search(r"rank 0 in \w+ \(distributed_c10d\.py:\d+\), called by \w+ \(\w+\.py:\d+\)", line), line
    for rank in range(2):
        log = (tmp_path / f"run/logs/attempt-1/rank-{rank}.log").read_text()
        assert "most recent call first" in log and "train.py" in log, log
        if rank == 1:
            assert "in fault" in log


TELLING = """
import pathlib, psutil, signal, sys, time
from megatron_jobs import failures
with failures.supervised(pathlib.Path(sys.argv[1]), 0, 1, hang_seconds=60):
    for child in psutil.Process().children():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            child.send_signal(number)
    time.sleep(0.5)
    print("saved", flush=True)
"""


def test_a_signal_to_all_that_a_rank_has_started_does_not_silence_it(tmp_path):
    """Slurm's signals reach every process of a step; what the rank has to say comes after them."""
    attempt = failures.new_attempt(tmp_path)
    told = subprocess.run([sys.executable, "-c", TELLING, str(attempt)], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert told.returncode == 0 and told.stdout == "saved\n" and (attempt / "rank-0.log").read_text() == "saved\n", told


WATCHED = """
import os, pathlib, sys, time
from megatron_jobs import failures
failures.GRACE = 2
attempt, rank, busy = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with failures.supervised(attempt, rank, 2, hang_seconds=4):
    began = time.monotonic()
    while time.monotonic() < began + busy:
        (attempt / f"data-{rank}").write_bytes(bytes(4 << 20))
        time.sleep(0.5)
    print("has written", flush=True)
    time.sleep(1000)
"""


def test_a_rank_that_writes_lives_and_the_others_wait_for_it(tmp_path):
    """Nobody marks anything for three times as long as a hang takes to be told; then both hang."""
    attempt = failures.new_attempt(tmp_path)
    command = [sys.executable, "-c", WATCHED, str(attempt)]
    ranks = [subprocess.Popen([*command, str(rank), "12" if rank else "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "has written" in (attempt / "rank-1.log").read_text()
    assert "hung: nothing got on" in said[0] and "ranks 0, 1 in <module>" in said[0], said


def test_sigterm_saves_after_the_step_and_the_next_start_goes_on(prepared, tmp_path):
    phase = dict(name="web", tokens=NUM_STEPS * 8 * 32, sequence_length=32, global_batch_size=8, sources={"web": 1.0})
    phase |= dict(learning_rate=dict(start=1e-2, end=1e-3))
    sections = dict(train=dict(checkpoint_interval=1000), phases=[phase])
    first = start(prepared, tmp_path, None, **sections)
    metrics = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, [first])
    first.send_signal(signal.SIGTERM)
    shown, _ = first.communicate(timeout=300)
    assert first.returncode == 143 and "first error" not in shown, shown
    done = json.loads((tmp_path / "run/checkpoints/latest/checkpoint.json").read_text())["step"]
    assert 2 <= done < NUM_STEPS and metrics.read_text().count("\n") == done
    assert f"step {done}: stopped: saved in {tmp_path}/run/checkpoints/step-{done:08d}; the same command goes on from there" in shown
    second = start(prepared, tmp_path, None, **sections)
    shown, _ = second.communicate(timeout=300)
    assert second.returncode == 0 and f"goes on at step {done} of {NUM_STEPS}" in shown
    assert [path.name for path in failures.attempts(tmp_path / "run")] == ["attempt-1", "attempt-2"]


def test_only_one_error_is_the_first(tmp_path):
    attempt = failures.new_attempt(tmp_path)
    assert failures.first_rank(attempt) is None
    assert failures.claim(attempt, "rank 3", "one") and not failures.claim(attempt, "rank 0", "another")
    assert (attempt / "first_error").read_text().endswith("\none\n")
    assert failures.first_rank(attempt) == 3
