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
SCRIPTS = ("pretrain_8b", "pretrain_8x8b", "upcycle", "convert_to_hf", "evaluate", "prepare_data", "tokenize", "verb")


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


def test_a_run_on_128_gpus_and_a_spare_node(reference, prepared, tmp_path):
    phases = [phase.model_dump(mode="json") | dict(global_batch_size=128, tokens=3 * 128 * 32) for phase in tiny(prepared, tmp_path).phases]
    config = tiny(prepared, tmp_path / "run", phases=phases[:1], train=dict(micro_batch_size=1))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    tried = call(reference, sys.executable, "-m", "mujina", "submit", str(tmp_path / "run.yaml"), "--spare", "1", "--dry-run")
    assert tried.returncode == 0, tried
    assert "128 on 16 nodes, and 1 spare" in tried.stdout and "node[1-17]" in tried.stdout
    assert "of 79.0 GiB on the fullest h100" in tried.stdout
