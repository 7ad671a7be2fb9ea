"""The scripts in a chain, and arrays, on a real Slurm."""

import json
import os
import re
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


def chain(cluster: Cluster, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """slurm/chain.yaml, for a small cluster."""
    values = {name: folder / f"{name}.yaml" for name in ("data", "dense", "mixture")}
    values |= {"hf": folder / "hf", "prompts": folder / "prompts.jsonl", "tasks": 2, "sbatch": json.dumps(OPTIONS.split())}
    command = [sys.executable, "-m", "mujina", "chain", "slurm/chain.yaml", *(f"{key}={value}" for key, value in values.items())]
    return subprocess.run([*command, *options], cwd=ROOT, env=os.environ | cluster.environment, text=True, capture_output=True)


def submitted(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """{station: number of its job}"""
    assert done.returncode == 0, done
    return {name: job for job, name in re.findall(r"^job (\d+): ([\w ]+): sbatch", done.stdout, re.MULTILINE)}


def sbatch(cluster: Cluster, *arguments: str) -> str:
    environment = os.environ | cluster.environment | {"MUJINA_PYTHON": sys.executable}
    command = ["sbatch", "--parsable", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, check=True, stdout=subprocess.PIPE).stdout.strip()


def test_a_chain_stops_at_a_failed_link_and_goes_on_from_there_to_a_mixture_that_others_can_load(cluster, links, tmp_path):
    whole = (tmp_path / "dense.yaml").read_text()
    dense = yaml.safe_load(whole)
    dense["phases"][0]["sources"] = {"wiki": 1.0}  # which nobody prepares
    (tmp_path / "dense.yaml").write_text(yaml.safe_dump(dense))
    prompt = {"messages": [{"role": "user", "content": "1 + 1?"}], "answer": "2", "language": "en"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    logs = tmp_path / "mixture/chain/logs"

    jobs = submitted(chain(cluster, tmp_path, "--slurm"))
    assert list(jobs) == ["documents", "tokens", "dense", "upcycling", "mixture", "Hugging Face", "evaluation"]
    again = chain(cluster, tmp_path, "--slurm")
    assert submitted(again) == {} and "in the queue" in again.stdout  # nothing twice
    here = chain(cluster, tmp_path)
    assert here.returncode == 2 and "is in the queue: wait for it" in here.stderr
    states = [wait_for_job(cluster.environment, job, 300) for job in jobs.values()]
    assert states == [["COMPLETED"] * 2] * 2 + [["FAILED"]] + [["CANCELLED"]] * 4, logs
    assert "wiki" in (logs / f"dense-{jobs['dense']}.log").read_text()
    assert not (tmp_path / "hf").exists()

    shown = chain(cluster, tmp_path, "--slurm", "--dry-run").stdout
    assert "--- tokens: is done" in shown and f"--- dense: job {jobs['dense']} ended with status 2 (a mistake): see {logs}" in shown
    (tmp_path / "dense.yaml").write_text(whole)
    jobs = submitted(chain(cluster, tmp_path, "--slurm"))
    assert list(jobs) == ["dense", "upcycling", "mixture", "Hugging Face", "evaluation"]  # and what was done before is not done again
    states = [wait_for_job(cluster.environment, job, 600) for job in jobs.values()]
    assert states == [["COMPLETED"]] * 5, "\n".join(path.read_text() for path in sorted(logs.glob("*.log")))

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.num_local_experts == MOE["num_experts"]
    assert json.loads((tmp_path / "mixture/evaluation.json").read_text())["num_prompts"] == 1

    here = chain(cluster, tmp_path)  # on this machine the same chain is done, too
    assert here.returncode == 0 and here.stdout.count("is done") == 7, here
    stations = json.loads((tmp_path / "mixture/chain/summary.json").read_text())["stations"]
    assert all(row["state"] == "done" and row["job"] and row["seconds"] > 0 for row in stations)


def test_a_job_that_is_cancelled_before_it_could_say_so_runs_again(cluster, tmp_path):
    stations = [{"name": name, "run": "plan examples/quickstart/dense.yaml --gpus 2"} for name in ("one", "two")]
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump({"name": "short", "folder": str(tmp_path), "sbatch": OPTIONS.split(), "stations": stations}))

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mujina", "chain", str(path), "--slurm", *options]
        return subprocess.run(command, cwd=ROOT, env=os.environ | cluster.environment, text=True, capture_output=True)

    jobs = submitted(call("sbatch=[--hold, --cpus-per-task=1]"))
    cluster.output("scancel", jobs["one"])
    assert [wait_for_job(cluster.environment, job) for job in jobs.values()] == [["CANCELLED"]] * 2
    assert f"--- one: job {jobs['one']} ended without a word" in call("--dry-run").stdout
    jobs = submitted(call())
    assert [wait_for_job(cluster.environment, job, 300) for job in jobs.values()] == [["COMPLETED"]] * 2
    assert submitted(call()) == {} and "parameters" in (tmp_path / f"logs/two-{jobs['two']}.log").read_text()


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
