"""Jobs of the pretraining script on a real Slurm: sick nodes, mistakes, and what is said of them. test_soak.py has the faults."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_jobs.config import RunConfig
from slurm import history
from slurm.supervisor import FIRST_PORT, NUM_PORTS
from tests.cluster import NODES, wait_for
from tests.conftest import tiny
from tests.slurm import faults
from tests.slurm.faults import ROOT, Job, records, submit

pytest_plugins = ["tests.cluster"]
NUM_STEPS = 16
FAULTY = Path(__file__).parent / "faulty.py"


def config_of(prepared: Path, run: Path, **sections: Any) -> RunConfig:
    """A run of 10 and 6 steps with a checkpoint every 3 steps."""
    phases = [phase.model_dump(mode="json") for phase in tiny(prepared, run).phases]
    phases[0] |= dict(tokens=10 * 8 * 32)
    phases[1] |= dict(tokens=6 * 4 * 64)
    train = dict(micro_batch_size=1, checkpoint_interval=3) | sections.pop("train", {})
    return tiny(prepared, run, phases=phases, train=train, **sections)


def wait_for_step(job: Job, step: int) -> None:
    wait_for(lambda: len(records(job.run)) >= step, 300, f"{job.run}/job.log")


@pytest.fixture(scope="module")
def undisturbed(cluster, prepared, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    job = submit(cluster, config_of(prepared, tmp_path_factory.mktemp("undisturbed") / "run"))
    assert job.wait() == "COMPLETED", job.log()
    assert [record["step"] for record in records(job.run)] == list(range(1, NUM_STEPS + 1))
    return job.run


def test_the_quickstarts_model_on_four_nodes(cluster, prepared, tmp_path):
    config = config_of(prepared, tmp_path / "run")
    phases = json.dumps([phase.model_dump(mode="json") for phase in config.phases])
    values = dict(tokenizer=config.tokenizer, phases=phases) | {"data.folder": config.data.folder, "train.micro_batch_size": 1}
    values |= {"run": tmp_path / "run", "model.vocab_size": config.model.vocab_size}
    command = ["sbatch", "--parsable", f"--nodes={len(NODES)}", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=2"]
    command += [f"--output={tmp_path}/run/job.log", "slurm/pretrain_8b.sh", "examples/quickstart/dense.yaml"]
    command += [f"{key}={value}" for key, value in values.items()]
    environment = os.environ | cluster.environment | {"MUJINA_PYTHON": sys.executable}
    (tmp_path / "run").mkdir()
    number = subprocess.run(command, cwd=ROOT, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()
    job = Job(cluster, tmp_path / "run", number)
    assert job.wait() == "COMPLETED", job.log()
    losses = [record["loss"] for record in records(job.run)]
    assert len(losses) == NUM_STEPS and losses[-1] < losses[0]
    [attempt] = history.attempts(job.run)
    assert attempt.nodes == NODES and attempt.outcome == "done"
    assert sorted(path.name for path in (job.run / "logs/attempt-1").glob("rank-*")) == [f"rank-{rank}.log" for rank in range(4)]


def test_a_cancelled_job_saves_and_does_not_come_back(cluster, prepared, tmp_path):
    job = submit(cluster, config_of(prepared, tmp_path / "run"), tasks_per_node=2)
    wait_for_step(job, 4)
    cluster.output("scancel", job.number)
    assert job.wait() == "CANCELLED"
    [attempt] = history.attempts(job.run)
    assert history.standing(job.run)[0] >= 4, job.log()
    assert cluster.output("squeue", "-h", "-j", job.number, "-t", "all", "-o", "%T").strip() == "CANCELLED"


@pytest.mark.parametrize(
    ("sections", "python", "message"),
    [
        (dict(parallel=dict(pipeline=3)), [], "parallel.context (3) must divide the number of processes (2)"),
        (dict(stability=dict(max_rollbacks=0)), [sys.executable, FAULTY, "nan", 5], "step 5 of phase web"),
        ({}, ["prlimit", "--fsize=100000", sys.executable], "make space on the disk"),  # as a full one, for large files
    ],
    ids=["configuration", "NaN", "full disk"],
)
def test_what_would_come_again_is_not_requeued(cluster, prepared, tmp_path, sections, python, message):
    config = config_of(prepared, tmp_path / "run", **sections)
    job = submit(cluster, config, **({"MUJINA_TASK_PYTHON": " ".join(map(str, python))} if python else {}))
    assert job.wait() == "FAILED"
    assert message in job.log()
    [attempt] = history.attempts(job.run)
    assert attempt.outcome == "mistake" and message in attempt.reason


def test_the_same_crash_for_the_third_time_is_diagnosed(cluster, prepared, tmp_path):
    job = submit(cluster, config_of(prepared, tmp_path / "run"), MUJINA_TASK_PYTHON=f"{sys.executable} {FAULTY} crash 5")
    assert job.wait(900) == "FAILED"
    assert [attempt.outcome for attempt in history.attempts(job.run)] == ["crash"] * 3
    assert "not requeued: 3 attempts ended after step 4 in the same way" in job.log() and "RuntimeError: planted" in job.log()


def test_a_port_that_is_taken_costs_one_attempt_and_is_the_reason(cluster, prepared, tmp_path):
    job = submit(cluster, config_of(prepared, tmp_path / "run"), "--hold")
    with socket.create_server(("", FIRST_PORT + int(job.number) % NUM_PORTS)):
        cluster.output("scontrol", "release", job.number)
        assert job.wait() == "COMPLETED", job.log()
    crash, done = history.attempts(job.run)
    assert (crash.outcome, done.outcome) == ("crash", "done") and "EADDRINUSE" in crash.reason, crash


def test_what_no_node_can_do_is_no_nodes_fault(cluster, prepared, tmp_path):
    """A container that is not there, for example."""
    job = submit(cluster, config_of(prepared, tmp_path / "run"), MUJINA_TASK_PYTHON="false")
    assert job.wait() == "FAILED"
    assert [attempt.outcome for attempt in history.attempts(job.run)] == ["crash"] * 3 and not history.excluded(job.run)
    assert "not requeued: 3 attempts ended before the first step in the same way" in job.log()
    assert "no node passed the preflight" in job.log()


def test_an_end_by_sigterm_before_anything_is_saved_is_a_crash(cluster, prepared, tmp_path):
    """As srun gives it to the other ranks when the first has failed: nobody has told the job to stop."""
    python = f"""sh -c 'case "$*" in *megatron_jobs.train*) kill -TERM $$;; esac; exec "$@"' sh {sys.executable}"""
    job = submit(cluster, config_of(prepared, tmp_path / "run"), MUJINA_TASK_PYTHON=python)
    assert job.wait() == "FAILED"
    assert [attempt.outcome for attempt in history.attempts(job.run)] == ["crash"] * 3
    assert "first error: none was written down" in job.log() and "before the first step in the same way" in job.log()


def test_time_limits_too_short_to_save_are_diagnosed(cluster, prepared, tmp_path):
    job = submit(cluster, config_of(prepared, tmp_path / "run"))
    for number in (1, 2, 3):
        wait_for(lambda number=number: len(history.attempts(job.run)) == number and job.processes(), 300, f"{job.run}/job.log")
        faults.near_the_limit(job)
    assert job.wait() == "FAILED"
    assert [attempt.outcome for attempt in history.attempts(job.run)] == ["time"] * 3
    assert "not requeued: 3 time limits in a row came before a step was trained and saved" in job.log()


@pytest.mark.parametrize("spare", [0, 2])
def test_a_node_that_fails_the_preflight_is_left_out(cluster, prepared, undisturbed, tmp_path, spare):
    """Requeued without it; with spare nodes the job starts at once, and again when its time is over, on all nodes that there are."""
    (tmp_path / "planted.json").write_text(json.dumps({"node1": {"nvmlDeviceGetTotalEccErrors 0 1 0": 7}}))
    variables = {"PYTHONPATH": str(Path(__file__).parent / "nvml"), "NVML_STAND_IN": str(tmp_path / "planted.json")}
    options = [f"--nodes={2 + spare}", "--gpus-per-node=1"]
    job = submit(cluster, config_of(prepared, tmp_path / "run"), *options, MUJINA_SPARE_NODES=str(spare), **variables)
    if spare:
        wait_for_step(job, 5)
        faults.near_the_limit(job)
    assert job.wait(900) == "COMPLETED", job.log()
    assert faults.differences(job.run, undisturbed) == []
    attempts = history.attempts(job.run)
    assert [attempt.outcome for attempt in attempts] == ["time" if spare else "preflight", "done"]
    assert "node1" not in attempts[-1].nodes and len(attempts[-1].nodes) == 2
    [[node, about]] = history.excluded(job.run).items()
    assert node == "node1" and "errors since the last reset (7) must be 0" in about["reason"]


def test_a_signal_during_the_preflight_says_nothing_about_the_nodes(cluster, prepared, tmp_path):
    job = submit(cluster, config_of(prepared, tmp_path / "run"), MUJINA_TASK_PYTHON="sh -c 'sleep 3; exec \"$@\"' sh " + sys.executable)
    wait_for(lambda: bool(history.attempts(job.run)), 300, f"{job.run}/job.log")
    faults.near_the_limit(job)
    wait_for(lambda: len(history.attempts(job.run)) == 2, 300, f"{job.run}/job.log")
    cluster.output("scancel", job.number)
    assert history.attempts(job.run)[0].outcome == "time" and not history.excluded(job.run), job.log()


def test_a_job_with_too_few_nodes_left_says_so(cluster, prepared, tmp_path):
    """Not requeued to wait for ever."""
    lost = {"nvmlDeviceGetTotalEccErrors 0 1 0": 7}
    (tmp_path / "planted.json").write_text(json.dumps({node: lost for node in NODES[:2]}))
    variables = {"PYTHONPATH": str(Path(__file__).parent / "nvml"), "NVML_STAND_IN": str(tmp_path / "planted.json")}
    job = submit(cluster, config_of(prepared, tmp_path / "run"), "--nodes=4", "--gpus-per-node=1", **variables)
    assert job.wait() == "FAILED"
    assert "not requeued: 2 of the 4 nodes of partition main are left out, and the job needs 4" in job.log()


def test_submit_checks_first(cluster, prepared, tmp_path):
    config = config_of(prepared, tmp_path / "run")
    config.run.mkdir()
    path = config.run / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    script = tmp_path / "two.sh"  # the project's script, for a smaller cluster
    text = (ROOT / "slurm/pretrain_8b.sh").read_text()
    for of_project, here in (
        ("nodes=16", "nodes=2"),
        ("gpus-per-node=8", "gpus-per-node=0"),
        ("tasks-per-node=8", "tasks-per-node=2"),
        ("cpus-per-task=12", "cpus-per-task=2"),
    ):
        assert of_project in text
        text = text.replace(of_project, here)
    script.write_text(text.replace("%x-%j.log", f"{config.run}/job.log"))

    def verb(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | cluster.environment | {"MUJINA_PYTHON": sys.executable}
        command = [sys.executable, "-m", "mujina", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)

    for arguments, message in (
        (["optimizer.lr=1"], "unknown key optimizer.lr"),
        (["parallel.pipeline=3"], "(3) must divide the number of processes (4)"),
        (["phases.0.sources={wiki: 1}"], ""),
        (["train.init_from=nowhere/hf"], "train.init_from (nowhere/hf): no such folder"),
        (["--spare", "3"], "sbatch refuses"),
        (["--time", "soon"], "sbatch refuses"),
    ):
        refused = verb("submit", str(path), "--script", str(script), *arguments)
        assert refused.returncode == 2 and message in refused.stderr, refused
    script.write_text(script.read_text().replace("gpus-per-node=0", "gpus-per-node=h100:2"))
    large = [str(path), "--script", str(script), "model.hidden_size=16384", "model.ffn_hidden_size=65536", "model.num_layers=32"]
    refused = verb("submit", *large)
    assert refused.returncode == 2 and "GiB on the fullest GPU, and --gpu (h100) has 79.0: see `mujina plan`" in refused.stderr, refused
    script.write_text(script.read_text().replace("gpus-per-node=h100:2", "gpus-per-node=0"))
    tried = verb("submit", str(path), "--script", str(script), "--dry-run")
    assert tried.returncode == 0 and "not submitted" in tried.stdout and "4 on 2 nodes" in tried.stdout, tried
    assert cluster.output("squeue", "-h", "-n", "mujina-8b", "-t", "pending,running") == ""
    submitted = verb("submit", str(path), "--script", str(script))
    job = submitted.stdout.split("submitted as job ")[1].split(":")[0]
    assert f"job {job} " in (said := verb("status", str(path)).stdout) and "no step is trained yet" in said, said
    assert Job(cluster, config.run, job).wait() == "COMPLETED", (config.run / "job.log").read_text()
    assert f"step {NUM_STEPS} in phase chat" in (said := verb("status", str(config.run)).stdout) and "done" in said, said
    assert f"job {job} COMPLETED, exit status 0:0" in said, said
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in verb("logs", str(config.run)).stdout
