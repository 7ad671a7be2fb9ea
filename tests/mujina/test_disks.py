"""What file systems over a network do to what we write and read: each fault is put into the system's own functions."""

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_jobs.checkpoints.checkpoint import newest_whole, write_weights
from megatron_jobs.checkpoints.weights import InitialWeights
from megatron_jobs.data.ledger import Ledger
from mujina import disks, files, locks
from mujina.checkpoint_folders import point_latest_at, resolved
from mujina.disks import free_bytes
from mujina.files import changed, rename_folder, sha256_of, stamp, whole_folder, write_stamps, write_whole
from mujina.records import Record, append
from mujina.user_input import UserError, command_line, read_text
from tests.conftest import tiny

Patch = pytest.MonkeyPatch


def fails(patch: Patch, module: Any, name: str, number: int, times: int = 10**9, where: Callable[[Any], bool] = lambda path: True) -> None:
    """A function of the system fails with an error number, `times` times, where its first argument is that."""
    function, left = getattr(module, name), [times]

    def faulty(*arguments: Any, **options: Any) -> Any:
        if left[0] > 0 and where(arguments[0]):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return function(*arguments, **options)

    patch.setattr(module, name, faulty)


def write_all(folder: Path) -> None:
    """Once, and once more in the place of the first."""
    for content in (b"old", b"new"):
        write_whole(folder / "file", content)
        append(folder / "lines", content + b"\n")
        with whole_folder(folder / "made", mark="mark") as partial:
            (partial / "mark").write_bytes(content)
        (folder / "partial").mkdir()
        rename_folder(folder / "partial", folder / f"renamed-{content.decode()}")
    assert (folder / "file").read_bytes() == (folder / "made/mark").read_bytes() == b"new"
    assert (folder / "lines").read_bytes() == b"old\nnew\n"


def answers_are_lost(patch: Patch) -> None:
    """The server has made the rename, and is asked again."""
    replace = os.replace

    def twice(old: Path, new: Path) -> None:
        replace(old, new)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(old))

    patch.setattr(os, "replace", twice)


FAULTS: dict[str, Callable[[Patch], None]] = {
    "folders cannot be synced": lambda patch: fails(
        patch, os, "fsync", errno.EINVAL, where=lambda file: os.path.isdir(f"/proc/self/fd/{file}")
    ),
    "nothing can be synced": lambda patch: fails(patch, os, "fsync", errno.ENOTSUP),
    "answers to renames are lost": answers_are_lost,
    "folders cannot be removed": lambda patch: fails(patch, shutil, "rmtree", errno.EBUSY),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_written_is_there(tmp_path: Path, monkeypatch: Patch, fault: str) -> None:
    FAULTS[fault](monkeypatch)
    write_all(tmp_path)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".removed-")}
    assert left == {"file", "lines", "made", "renamed-old", "renamed-new"}
    monkeypatch.undo()
    with whole_folder(tmp_path / "made", mark="mark") as partial:
        (partial / "mark").touch()
    assert not list(tmp_path.glob(".*"))  # what could not be removed goes with the next one


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.ENOSPC])
def test_what_did_not_reach_the_disk_is_an_error(tmp_path: Path, monkeypatch: Patch, number: int) -> None:
    write_whole(tmp_path / "file", b"old")
    append(tmp_path / "lines", b"old\n")
    fails(monkeypatch, os, "fsync", number)
    for write in (lambda: write_whole(tmp_path / "file", b"new"), lambda: append(tmp_path / "lines", b"new\n")):
        with pytest.raises(OSError, match=os.strerror(number)):
            write()
    assert (tmp_path / "file").read_bytes() == b"old" and (tmp_path / "lines").read_bytes() == b"old\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_rename_of_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with pytest.raises(FileNotFoundError):
        disks.rename(tmp_path / "none", tmp_path / "other")


def test_a_record_stops_nothing_and_loses_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    said: list[str] = []
    record = Record(tmp_path / "record.jsonl", said.append)
    record.add('{"a": 1}')
    with monkeypatch.context() as patch:
        fails(patch, os, "fsync", errno.ENOSPC)
        record.add('{"a": 2}')
        record.add('{"a": 3}')
    with record.path.open("a") as file:
        file.write('{"ha')  # by whoever else
    record.add('{"a": 4}')
    assert len(said) == 1 and "could not be written" in said[0]
    lines = ['{"a": 1}', '{"a": 2}', '{"a": 3}', '{"a": 4}']
    assert record.tidy(lambda rows: [line for line, _ in rows]) == lines == record.path.read_text().splitlines()
    with monkeypatch.context() as patch:
        patch.setattr(disks, "PATIENCE", 0.0)
        fails(patch, Path, "read_bytes", errno.EIO)
        assert record.tidy(lambda rows: []) == []
    assert record.path.read_text().splitlines() == lines  # what cannot be read is not taken for nothing


READERS: dict[str, Callable[[Path], Any]] = {"read_text": read_text, "sha256_of": sha256_of, "read": disks.read}


@pytest.mark.parametrize("reader", READERS)
def test_a_disk_that_is_not_well_is_asked_again_and_is_no_mistake(tmp_path: Path, monkeypatch: Patch, reader: str, capsys: Any) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    right = READERS[reader](path)
    monkeypatch.setattr(disks, "PATIENCE", 0.3)
    for times in (2, 10**9):
        with monkeypatch.context() as patch:
            for module, name in ((files, "open"), (sys.modules["mujina.user_input"], "open")):
                patch.setattr(module, name, open, raising=False)
                fails(patch, module, name, errno.ESTALE, times)
            fails(patch, Path, "read_bytes", errno.ESTALE, times)
            if times == 2:
                assert READERS[reader](path) == right
                continue
            with pytest.raises(OSError, match="Stale"):
                READERS[reader](path)

            def main() -> None:
                READERS[reader](path)

            patch.setattr(sys, "argv", ["main"])
            with pytest.raises(SystemExit) as ended:
                command_line(main)
            assert ended.value.code == 1 and f"error: {path}: stale file handle" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_latest_without_links(tmp_path: Path, monkeypatch: Patch, number: int) -> None:
    """Where there are none, in a copy that has followed them, and where what it leads to is gone."""
    for name in ("step-00000002", "step-00000004", "step-00000006", "step-00000008.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").touch()
    latest = tmp_path / "latest"
    shutil.copytree(tmp_path / "step-00000002", latest)
    point_latest_at(tmp_path / "step-00000006")
    assert latest.is_symlink() and latest.resolve().name == "step-00000006" and resolved(latest) == latest
    shutil.rmtree(tmp_path / "step-00000006")
    assert resolved(latest) == tmp_path / "step-00000004"
    fails(monkeypatch, os, "symlink", number)
    point_latest_at(tmp_path / "step-00000004")
    assert latest.exists() and resolved(latest) == tmp_path / "step-00000004"
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000004", "step-00000008.bak", "latest"}


def test_a_checkpoint_that_was_copied_as_latest_is_none_to_begin_anew_without(prepared: Path, tmp_path: Path) -> None:
    config = tiny(prepared, tmp_path)
    source = InitialWeights(config.model, None, config.seed)
    whole = write_weights(tmp_path, config, source, source.shapes, Ledger(), "saving")
    (tmp_path / "latest").unlink()
    whole.rename(tmp_path / "latest")
    found = newest_whole(tmp_path)
    assert found and found.folder == whole and (tmp_path / "latest").is_symlink()


def test_links_stay_and_a_group_can_read(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    for name in ("file", "made"):
        (tmp_path / name).symlink_to(tmp_path / "big" / name)
    before = os.umask(0o002)
    try:
        write_all(tmp_path)
    finally:
        os.umask(before)
    for name, mode in (("file", 0o664), ("made", 0o775), ("made/mark", 0o664)):
        assert (tmp_path / "big" / name).stat().st_mode & 0o777 == mode
    assert (tmp_path / "file").is_symlink() and (tmp_path / "made").is_symlink()


def test_times_in_whole_seconds_do_not_hide_a_write(tmp_path: Path, monkeypatch: Patch) -> None:
    stat = os.stat

    def coarse(path: Any, **options: Any) -> Any:
        found = stat(path, **options)
        return SimpleNamespace(st_size=found.st_size, st_mtime_ns=1_700_000_000 * 10**9, st_ctime_ns=0, st_mode=found.st_mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", coarse)
        (tmp_path / "data").write_text("one")
        write_stamps(tmp_path / "record", {"data": stamp(tmp_path / "data")})
        before = changed(tmp_path / "record", tmp_path)
        (tmp_path / "data").write_text("two")
        after = changed(tmp_path / "record", tmp_path)
    assert (before, after) == ([], ["data"])


def test_room_that_nobody_tells_is_not_none(tmp_path: Path, monkeypatch: Patch) -> None:
    assert free_bytes(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    assert free_bytes(tmp_path) is None
    fails(monkeypatch, shutil, "disk_usage", errno.ENOSYS)
    assert free_bytes(tmp_path) is None


def test_checkpoints_on_a_disk_that_is_not_well_are_no_mistake(prepared: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """A run that begins anew for it, or a job that is not requeued, would be one."""
    config = tiny(prepared, tmp_path)
    source = InitialWeights(config.model, None, config.seed)
    whole = write_weights(tmp_path, config, source, source.shapes, Ledger(), "saving")
    monkeypatch.setattr(disks, "PATIENCE", 0.0)
    with monkeypatch.context() as patch:
        fails(patch, files.hashlib, "file_digest", errno.EIO)
        with pytest.raises(OSError, match="the disk is not well"):
            newest_whole(tmp_path)
    found = newest_whole(tmp_path)
    assert found and found.folder == whole


HOLDER = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"


def test_the_lock_of_a_node_that_is_gone(tmp_path: Path, monkeypatch: Patch) -> None:
    """NFS lets go of it in its time. The job that Slurm has started again because of it goes on without."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(locks, "LEASE", 0)
    monkeypatch.setattr(locks, "PATIENCE", 0)
    path = tmp_path / ".lock"
    path.write_text("process 3 on gone1 (job 17, start 1)")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdin
        holder.stdout.readline()
        for job, error, message in (
            ("17", BlockingIOError, "remove this file"),
            ("18", UserError, "process 3 on gone1 .job 17, start 1. is at work"),
        ):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            with pytest.raises(error, match=message), locks.hold(path, "run"):
                pass
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        with pytest.raises(UserError, match="is at work"), locks.hold(path, "run"):  # of job 18
            pass
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        with locks.hold(path, "run"):
            assert path.read_text().endswith("(job 17, start 2)")
            with pytest.raises(BlockingIOError, match="start 2"), locks.hold(path, "run"):
                pass
        assert [one.name for one in tmp_path.iterdir()] == [".lock"]
        monkeypatch.setenv("SLURM_JOB_ID", "18")
        monkeypatch.setattr(locks, "LEASE", 60)
        holder.stdin.close()
    with locks.hold(path, "run"):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()} (job 18, start 2)"
