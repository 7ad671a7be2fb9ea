"""The scripts in a chain, and arrays, on a real Slurm."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_jobs.config import RunConfig
from tests.cluster import Cluster, wait_for, wait_for_job
from tests.conftest import MOE, tiny

pytest_plugins = ["tests.cluster"]
ROOT = Path(__file__).parents[2]
OPTIONS = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=4"


@pytest.fixture
def links(prepared, tmp_path) -> dict[str, Any]:
    """Configurations of the data, of a dense run and of its mixture, whose jobs find one another's output."""
    sources = {
        name: {"documents": [str(prepared / f"{name}.jsonl")], "kind": name, "steps": [{"step": "exact_duplicates"}]}
        for name in ("web", "code")
    }
    sources["chat"] = {"documents": [str(prepared / "chat.jsonl")], "kind": "chat", "origin": "synthetic"}
    data = {"tokenizer": str(prepared / "tokenizer"), "output": str(tmp_path / "data"), "sources": sources, "processes": 1}
    of_run = dict(data=dict(folder=str(tmp_path / "data")))
    dense = tiny(prepared, tmp_path / "dense", **of_run)
    mixture = tiny(prepared, tmp_path / "mixture", moe=MOE, **of_run)
    mixture = mixture.model_copy(update={"train": mixture.train.model_copy(update={"init_from": tmp_path / "mixture/start/latest"})})
    configs = {"data": data, "dense": dense, "mixture": mixture}
    for name, config in configs.items():
        values = config.model_dump(mode="json") if isinstance(config, RunConfig) else config
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return configs


def start_chain(cluster: Cluster, folder: Path) -> list[str]:
    """The numbers of the jobs."""
    arguments = [str(folder / f"{name}.yaml") for name in ("data", "dense", "mixture")] + [str(folder / "hf")]
    site = {"MUJINA_PYTHON": sys.executable, "ARRAY": "2", "SBATCH_OPTIONS": f"{OPTIONS} --output={folder}/%j.log"}
    command = ["bash", "slurm/chain.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | cluster.environment | site, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return [line.split()[1].rstrip(":") for line in done.stdout.splitlines()]


def sbatch(cluster: Cluster, *arguments: str) -> str:
    environment = os.environ | cluster.environment | {"MUJINA_PYTHON": sys.executable}
    command = ["sbatch", "--parsable", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, check=True, stdout=subprocess.PIPE).stdout.strip()


def test_a_chain_ends_with_a_mixture_that_others_can_load(cluster, links, tmp_path):
    jobs = start_chain(cluster, tmp_path)
    states = [wait_for_job(cluster.environment, job, 600) for job in jobs]
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert states == [["COMPLETED"] * 2] * 2 + [["COMPLETED"]] * 4, logs
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.num_local_experts == MOE["num_experts"]

    prompt = {"messages": [{"role": "user", "content": "1 + 1?"}], "answer": "2", "language": "en"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    arguments = ["slurm/evaluate.sh", tmp_path / "hf", "--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "result.json"]
    scored = sbatch(cluster, *OPTIONS.split(), f"--output={tmp_path}/evaluate.log", *map(str, arguments))
    assert wait_for_job(cluster.environment, scored, 120) == ["COMPLETED"], (tmp_path / "evaluate.log").read_text()
    assert json.loads((tmp_path / "result.json").read_text())["num_prompts"] == 1


def test_what_is_behind_a_failed_link_is_cancelled(cluster, links, tmp_path):
    dense = yaml.safe_load((tmp_path / "dense.yaml").read_text())
    dense["phases"][0]["sources"] = {"wiki": 1.0}  # which nobody prepares
    (tmp_path / "dense.yaml").write_text(yaml.safe_dump(dense))
    jobs = start_chain(cluster, tmp_path)
    states = [wait_for_job(cluster.environment, job, 300) for job in jobs]
    assert states == [["COMPLETED"] * 2] * 2 + [["FAILED"]] + [["CANCELLED"]] * 3
    assert "wiki" in (tmp_path / f"{jobs[2]}.log").read_text()
    assert not (tmp_path / "mixture").exists() and not (tmp_path / "hf").exists()


def test_a_task_of_an_array_goes_on_where_it_was_stopped(cluster, links, tmp_path):
    """Requeued in the middle; the documents are those of a run in one go."""
    command = [sys.executable, "-m", "data_prep.prepare", str(tmp_path / "data.yaml"), f"output={tmp_path}/expected"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    options = [*OPTIONS.split(), f"--output={tmp_path}/%a.log", "--array=0-1"]
    array = sbatch(cluster, *options, "slurm/tokenize.sh", str(tmp_path / "data.yaml"))
    wait_for(lambda: (tmp_path / "data/web/stages").exists(), 300, f"{tmp_path}/0.log")
    cluster.output("scontrol", "requeue", f"{array}_0")
    assert wait_for_job(cluster.environment, array, 300) == ["COMPLETED"] * 2
    for name in links["data"]["sources"]:
        for end in (".bin", ".idx"):
            assert (tmp_path / f"data/{name}{end}").read_bytes() == (tmp_path / f"expected/{name}{end}").read_bytes()
