"""The same configuration on a real Slurm and on Ray gives what it gives here, also after a task was killed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.executors import After, prepare
from mujina.user_input import UserError
from tests.cluster import wait_for_job
from tests.data_prep.test_pipeline import ROOT, bytes_of, config, values, write_files

pytest_plugins = ["tests.cluster"]
SLURM = {"partition": "main", "memory_gb": 1, "tokenizer_cpus": 2, "max_array_size": 2}


def command(folder: Path, environment: dict[str, str], **more: object) -> subprocess.CompletedProcess[str]:
    described = values(str(folder / "in/*.jsonl.gz"), folder / "out", **more)
    (folder / "config.yaml").write_text(yaml.safe_dump(described))
    line = [sys.executable, "-m", "data_prep.prepare", str(folder / "config.yaml")]
    return subprocess.run(line, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_slurm(slurm: dict[str, str], tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = write_files(tmp_path / "in", files=3, rows=40)
    prepare(config(documents, tmp_path / "expected", tokenizer=str(tokenizer_folder)))
    more = {"executor": "slurm", "slurm": SLURM, "tokenizer": str(tokenizer_folder)}
    last_job = tmp_path / "out/code/stages/last_slurm_job"

    # A file that goes away between check and read fails its rank; what waits for it is cancelled, and nothing counts as done.
    hidden = tmp_path / "in/1.jsonl.gz"
    content, stat = hidden.read_bytes(), hidden.stat()
    hidden.chmod(0o000) if os.geteuid() else hidden.write_bytes(b"\0" * len(content))
    submitted = command(tmp_path, slurm, **more)
    assert submitted.returncode == 0, submitted.stderr
    assert "stages in the queue" in submitted.stdout
    assert wait_for_job(slurm, last_job.read_text(), timeout=300) == ["CANCELLED"]
    assert not (tmp_path / "out/code/documents").exists() and not (tmp_path / "out/code.json").exists()
    markers = tmp_path / "out/code/stages/02-exact_duplicates-mark/completions"
    before = {path.name: path.stat().st_mtime_ns for path in markers.iterdir()}
    assert before and "00001" not in before

    hidden.write_bytes(content)
    hidden.chmod(stat.st_mode)
    assert command(tmp_path, slurm, **more).returncode == 0
    twice = command(tmp_path, slurm, **more)
    assert twice.returncode == 2 and "is still in the queue" in twice.stderr
    assert wait_for_job(slurm, last_job.read_text(), timeout=300) == ["COMPLETED"]
    assert before == {name: (markers / name).stat().st_mtime_ns for name in before}, "a rank that had ended was run again"
    ours = bytes_of(tmp_path / "out")
    assert ours == bytes_of(tmp_path / "expected")


def test_a_stage_does_not_start_before_the_one_before_has_ended(tmp_path: Path) -> None:
    """Whatever the scheduler says: of several arrays, or after a rank that was lost."""
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions/00000").touch()
    with pytest.raises(UserError, match="1 of 2 tasks have ended"):
        After(str(tmp_path), 2).run(None)
    (tmp_path / "completions/00001").touch()
    assert After(str(tmp_path), 2).run("documents") == "documents"


def test_ray(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Ray starts an actor for each task, which takes seconds: few of them."""
    documents = write_files(tmp_path / "in", files=2, rows=40)
    more = {"source": {"steps": [{"step": "normalise"}]}, "tokenizer": str(tokenizer_folder)}
    prepare(config(documents, tmp_path / "expected", **more))
    done = command(tmp_path, {}, executor="ray", **more)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "expected")
    broken = tmp_path / "in/1.jsonl.gz"
    broken.write_bytes(b"\0" * broken.stat().st_size)
    shutil.rmtree(tmp_path / "out")
    failed = command(tmp_path, {}, executor="ray", **more)
    assert failed.returncode == 2 and "1 of 2 tasks of stage documents failed" in failed.stderr, failed.stderr
