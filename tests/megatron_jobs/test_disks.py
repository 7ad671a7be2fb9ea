"""Whole runs on file systems as clusters have them: what is missing there, what is torn, and what fails for a while."""

import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from evaluation.report.runs import read_run
from megatron_jobs import failures
from megatron_jobs.config import RunConfig
from slurm import history, status
from tests.conftest import tiny
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("undisturbed")
    run_ranks(2, train_here, tiny(prepared, run))
    return losses(run)


def train_on_a_poor_disk(config: RunConfig, last_step: int | None = None) -> None:
    """Nothing can be synced, linked, locked or removed, answers to renames are lost, each file is stale at the first look, and what is
    only a record cannot be written at every other step."""
    from pathlib import Path

    from torch.utils.tensorboard import SummaryWriter

    from mujina import records
    from mujina.checkpoint_folders import DESCRIPTION

    def refused(number: int) -> Any:
        def refuse(*arguments: Any, **options: Any) -> None:
            raise OSError(number, os.strerror(number))

        return refuse

    replace, read_bytes, append, is_file, seen, count = (
        os.replace,
        Path.read_bytes,
        records.append,
        Path.is_file,
        set[Path](),
        Counter[Path](),
    )

    def answer_is_lost(old: Any, new: Any) -> None:
        replace(old, new)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    def stale(path: Path) -> bytes:
        if path not in seen:
            seen.add(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_bytes(path)

    def stale_description(path: Path) -> bool:
        if path.name == DESCRIPTION:
            stale(path) if path not in seen else None
        return is_file(path)

    def full(path: Path, data: bytes) -> None:
        count[path] += 1
        if count[path] % 2:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        append(path, data)

    os.fsync, os.symlink, fcntl.flock, shutil.rmtree = map(refused, (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EBUSY))  # type: ignore
    os.replace, Path.read_bytes, Path.is_file, records.append = answer_is_lost, stale, stale_description, full  # type: ignore
    SummaryWriter.add_scalar = refused(errno.ENOSPC)  # type: ignore
    train_here(config, last_step)


def test_a_run_on_a_poor_disk_gives_the_same_numbers(prepared: Path, tmp_path: Path, undisturbed: list[float]) -> None:
    """At a path that shells, URLs and patterns read in their own ways; the second attempt comes to it by another one."""
    run = tmp_path / "my [runs]: 100% ラン #1@home?"
    run_ranks(2, train_on_a_poor_disk, tiny(prepared, run, train=dict(keep_checkpoints=1)), 5)
    moved = tmp_path / "moved"
    run.rename(moved)
    run.symlink_to(moved)
    run_ranks(2, train_on_a_poor_disk, tiny(prepared, run, train=dict(keep_checkpoints=1)))
    assert losses(run) == undisturbed
    assert not (run / "checkpoints/latest").is_dir() and history.standing(run)[0] == 10
    assert read_run(run, "run", "red").ledger.phases[1].steps == 4


def tear(run: Path) -> None:
    """What a full disk, a copy that follows links and a hand that cleans up leave of a run folder."""
    for name in ("metrics.jsonl", "events.jsonl", "slurm/attempts.jsonl", "slurm/jobs"):
        first, *others = (run / name).read_bytes().splitlines(keepends=True)
        (run / name).write_bytes(b"".join([first, bytes(100) + b"\n", b'{"step": \xe9}\n', b"[]\n", *others, b'{"ha']))
    (run / "rollbacks.json").write_bytes(bytes(10))
    (run / "config.yaml").write_bytes(bytes(10))
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("no folder")
    shutil.rmtree(run / "logs/attempt-1")
    checkpoints = run / "checkpoints"
    (checkpoints / "latest").unlink()
    shutil.copytree(checkpoints / "step-00000003", checkpoints / "latest")
    shutil.copytree(checkpoints / "step-00000006", checkpoints / "step-00000006 (copy)")
    (checkpoints / "step-00000006/ledger.json").write_bytes(bytes(10))


def test_a_folder_that_is_torn_goes_on(
    prepared: Path, tmp_path: Path, undisturbed: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        failures.new_attempt(run)
    run_ranks(2, train_here, tiny(prepared, run), 7)
    history.ended(run, history.began(run, "17", 0, ["node1"]), "crash", "boom")
    history.submitted(run, "18")
    tear(run)
    for _ in range(2):  # as it lies there, and when it has gone on
        status.main(run)
        assert "crash" in capsys.readouterr().out
        assert history.jobs(run) == ["17", "18"]
        (run / "config.yaml").write_text(json.dumps(tiny(prepared, run).model_dump(mode="json")))
        page = read_run(run, "run", "red")
        assert [step.step for step in page.steps] == list(range(1, len(page.steps) + 1)) and page.ledger.phases
        run_ranks(2, train_here, tiny(prepared, run))
    assert losses(run) == undisturbed
    assert page.left_out == () and (run / "checkpoints/latest").is_symlink()
    assert failures.new_attempt(run).name == "attempt-3"
