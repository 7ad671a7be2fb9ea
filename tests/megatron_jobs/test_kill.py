"""Runs that are killed outright, at any moment, and started again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.config import RunConfig
from megatron_jobs.launch import held_port
from mujina import locks
from mujina.user_input import UserError
from tests.conftest import tiny
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks, start_ranks


def train_unhurried(config: RunConfig) -> None:
    """Steps that last long enough for this test to come in time, on a busy machine as well."""
    from megatron_jobs.engine.passes import Passes

    gradients = Passes.gradients
    Passes.gradients = lambda *arguments: (time.sleep(0.2), gradients(*arguments))[1]
    train_here(config)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_killed_at_any_moment(prepared, tmp_path, asynchronous):
    """SIGKILL before the first step, within steps and within saves: nothing differs from an undisturbed run."""
    train = dict(checkpoint_interval=1, asynchronous_save=asynchronous)
    whole, parts = (tiny(prepared, tmp_path / run, train=train, parallel=dict(tensor=2)) for run in ("whole", "parts"))
    run_ranks(2, train_here, whole)
    draw = random.Random(1)
    saving = tmp_path / "parts/checkpoints"
    for moment in ("start", "step", "save", "step", "save", None):
        before = newest_step(saving)
        with held_port() as port:
            ranks = start_ranks(2, port, train_unhurried, parts)
            if moment == "start":
                time.sleep(0.3)
            elif moment == "step":
                wait_for(lambda: newest_step(saving) > before, ranks)  # noqa: B023
                time.sleep(draw.uniform(0, 0.1))
            elif moment == "save":
                wait_for(lambda: newest_step(saving) > before and any(saving.glob(".step-*")), ranks)  # noqa: B023
            for process in ranks:
                if moment:
                    assert process.is_alive()
                    process.kill()
                process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, other = (Checkpoint(tmp_path / run / "checkpoints/latest") for run in ("whole", "parts"))
    assert one.ledger == other.ledger and one.files == other.files  # sizes and checksums of every rank's file


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    from megatron_jobs import ranks

    monkeypatch.setattr(locks, "PATIENCE", 0)
    with ranks.hold(tmp_path), pytest.raises(UserError, match=r"run .*process \d+ on .* is at work here"), ranks.hold(tmp_path):
        pass
    with ranks.hold(tmp_path):
        pass


def newest_step(checkpoints: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)


def test_launcher_killed_and_started_again(prepared, tmp_path):
    """The command that users call. Killing only the launcher must not leave processes that go on training."""
    phases = [
        dict(
            name="web",
            tokens=60 * 8 * 32,
            sequence_length=32,
            global_batch_size=8,
            sources={"web": 0.7, "code": 0.3},
            learning_rate=dict(start=1e-2, end=1e-3),
        )
    ]
    config = tiny(prepared, tmp_path / "run", phases=phases, train=dict(checkpoint_interval=5))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "megatron_jobs.launch", str(tmp_path / "run.yaml"), "--processes", "2"]
    first = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    wait_for(lambda: (tmp_path / "run/checkpoints/latest").exists(), [first])
    children = psutil.Process(first.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    psutil.wait_procs(children, timeout=120)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    done = json.loads((tmp_path / "run/checkpoints/latest/checkpoint.json").read_text())["step"]
    assert 0 < done < 60

    second = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert f"goes on at step {done} of 60" in second.stdout
    third = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert third.returncode == 0 and "all 60 steps are done" in third.stdout

    run_ranks(2, train_here, tiny(prepared, tmp_path / "whole", phases=phases, train=dict(checkpoint_interval=5)))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def wait_for(condition, processes: list, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(is_alive(process) for process in processes), "the run ended, or did not get this far"
        time.sleep(0.001)


def is_alive(process) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
