"""The scripts as they are, on a cluster like the reference run's: 17 nodes (one is spare) with 96 cores and 8 GPUs each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster import Cluster, slurm_cluster
from tests.conftest import tiny

pytest_plugins = ["tests.cluster"]
ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "pretrain_8b",
    "pretrain_8x8b",
    "upcycle",
    "convert_to_hf",
    "evaluate",
    "preferences",
    "post_train",
    "prepare_data",
    "tokenize",
    "verb",
)


@pytest.fixture(scope="module")
def reference(cluster, tmp_path_factory) -> Cluster:
    """Asks for `cluster`, too, which fails or skips where Slurm is missing."""
    with slurm_cluster(tmp_path_factory.mktemp("large"), [f"node{number}" for number in range(1, 18)], cpus=96) as found:
        yield found


def call(cluster: Cluster, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | cluster.environment | {"MUJINA_PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_sbatch_takes_a_script_unedited(reference, name):
    tried = call(reference, "sbatch", "--test-only", f"slurm/{name}.sh", "RUN.yaml", "train.micro_batch_size=2")
    where = "1536 processors on nodes node[1-16]" if name.startswith("pretrain") else "on nodes node1 in"
    assert tried.returncode == 0 and where in tried.stderr, tried


@pytest.mark.parametrize("name", ["prepare_data", "tokenize"])
@pytest.mark.parametrize(
    ("tasks", "arguments", "told"),
    [
        ("3 0 7 8", [], ["source3"]),
        ("3 3 3 1", ["--share", "array/8"], ["source3"]),
        ("3 3 3 1", [], ["add --share array/N"]),
    ],
    ids=["of all", "again", "of nobody knows how many"],
)
def test_a_task_of_an_array_does_its_share(tmp_path, name, tasks, arguments, told):
    sources = {f"source{n}": {"documents": ["nowhere.jsonl"], "kind": "web", "steps": [{"step": "normalise"}]} for n in range(8)}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "tokenizer": "t", "sources": sources}))
    (tmp_path / "site.sh").write_text(f'mujina() {{ shift; {sys.executable} -m data_prep.prepare "$@"; }}')
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    environment = os.environ | dict(zip(names, tasks.split(), strict=True)) | {"MUJINA_SLURM": str(tmp_path)}
    command = ["bash", f"slurm/{name}.sh", str(tmp_path / "data.yaml"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    # the documents are nowhere: the locks show whose turn it was
    assert done.returncode == 2 and told == [path.name[1:-5] for path in (tmp_path / "out").glob(".*.lock")] or told[0] in done.stderr


def test_a_run_on_128_gpus_and_a_spare_node(reference, prepared, tmp_path):
    phases = [phase.model_dump(mode="json") | dict(global_batch_size=128, tokens=3 * 128 * 32) for phase in tiny(prepared, tmp_path).phases]
    config = tiny(prepared, tmp_path / "run", phases=phases[:1], train=dict(micro_batch_size=1))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    tried = call(reference, sys.executable, "-m", "mujina", "submit", str(tmp_path / "run.yaml"), "--spare", "1", "--dry-run")
    assert tried.returncode == 0, tried
    assert "128 on 16 nodes, and 1 spare" in tried.stdout and "node[1-17]" in tried.stdout
    assert "of 79.0 GiB on the fullest h100" in tried.stdout
