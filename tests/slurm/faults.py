"""Runs in jobs on the Slurm of tests/cluster.py, and what a cluster does to them. Shared by tests and benchmarks/faults.py."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from megatron_jobs import config as configuration
from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.config import RunConfig
from slurm import history
from tests.cluster import NODES, Cluster, wait_for, wait_for_job
from tokenization.load import load as load_tokenizer

ROOT = Path(__file__).parents[2]


@dataclass
class Job:
    cluster: Cluster
    run: Path
    number: str

    def wait(self, seconds: float = 900) -> str:
        """The state in which it ends."""
        [state] = wait_for_job(self.cluster.environment, self.number, seconds)
        return state

    def log(self) -> str:
        return (self.run / "job.log").read_text()

    def nodes(self) -> list[str]:
        """Those that it runs on, the supervisor's first."""
        nodes = self.cluster.output("squeue", "-h", "-j", self.number, "-o", "%N").strip()
        return self.cluster.output("scontrol", "show", "hostnames", nodes).split()

    def processes(self) -> list[psutil.Process]:
        """Those of the training."""
        wanted = ["-m", "megatron_jobs.train", str(self.run / "run.yaml")]
        every = psutil.process_iter(["name", "cmdline"])
        return [one for one in every if one.info["name"] != "srun" and (one.info["cmdline"] or [])[-3:] == wanted]


def quickstarts_model(prepared: Path, run: Path, num_steps: int, **train: Any) -> RunConfig:
    """A run of the quickstart's dense model: three quarters of the steps on all sources of `prepared`, the rest on its chat."""
    sources = sorted(path.stem for path in (prepared / "data").glob("*.idx"))
    shape = dict(sequence_length=128, global_batch_size=8)
    phases = [
        dict(name="all", tokens=num_steps * 3 // 4 * 8 * 128, sources={name: 1 / len(sources) for name in sources}),
        dict(name="chat", tokens=(num_steps - num_steps * 3 // 4) * 8 * 128, sources={"chat": 1.0}),
    ]
    for phase in phases:
        phase |= shape | dict(learning_rate=dict(start=1e-3, end=1e-3, shape="linear"))
    vocabulary = load_tokenizer(prepared / "tokenizer").vocab_size
    values = {"run": run, "tokenizer": prepared / "tokenizer", "data.folder": prepared / "data", "model.vocab_size": vocabulary}
    values |= {"phases": json.dumps(phases), "data.max_epochs": 100, **{f"train.{name}": value for name, value in train.items()}}
    return configuration.load(ROOT / "examples/quickstart/dense.yaml", [f"{key}={value}" for key, value in values.items()])


def submit(cluster: Cluster, config: RunConfig, *options: str, tasks_per_node: int = 1, **environment: str) -> Job:
    """Submits slurm/pretrain_8b.sh for 2 nodes without GPUs, if `options` do not say otherwise."""
    config.run.mkdir(parents=True, exist_ok=True)
    path = config.run / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    site = {"MUJINA_PYTHON": sys.executable, "MUJINA_RETRY_SECONDS": "1"}
    size = ["--nodes=2", f"--ntasks-per-node={tasks_per_node}", "--gpus-per-node=0", "--cpus-per-task=2"]
    command = ["sbatch", "--parsable", *size, f"--output={config.run}/job.log", *options, "slurm/pretrain_8b.sh", str(path)]
    environment = os.environ | cluster.environment | site | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    return Job(cluster, config.run, done.stdout.strip())


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl, so far."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def differences(run: Path, undisturbed: Path) -> list[str]:
    """What two runs do not have in common, to the last bit: losses of all steps, ledgers, checkpoints."""
    one, other = (Checkpoint(folder / "checkpoints/latest") for folder in (run, undisturbed))
    pairs: dict[str, tuple[Any, Any]] = {
        "steps": tuple([record["step"] for record in records(folder)] for folder in (run, undisturbed)),
        "losses": tuple([record["loss"] for record in records(folder)] for folder in (run, undisturbed)),
        "tokens": (one.tokens, other.tokens),
        "ledger": (one.ledger, other.ledger),
        "checkpoint": tuple({name: facts["sha256"] for name, facts in found.files.items()} for found in (one, other)),
    }
    return [name for name, (here, there) in pairs.items() if here != there]


def near_the_limit(job: Job) -> None:
    job.cluster.output("scancel", "--batch", "--signal=USR1", job.number)


def steps_told_to_stop(job: Job) -> None:
    job.cluster.output("scancel", "--signal=USR1", job.number)


def requeued_by_hand(job: Job) -> None:
    job.cluster.output("scontrol", "requeue", job.number)


def preempted(job: Job) -> None:
    """By a job that wants all nodes for a second."""
    command = ["sbatch", "--parsable", "-p", "urgent", f"-N{len(NODES)}", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    wait_for_job(job.cluster.environment, job.cluster.output(*command).strip())


def node_without_power(job: Job) -> None:
    _power_failure(job, job.nodes()[-1])


def first_node_without_power(job: Job) -> None:
    _power_failure(job, job.nodes()[0])


def _power_failure(job: Job, node: str) -> None:
    job.cluster.power_off(node)
    job.cluster.power_on(node)


def killed_rank(job: Job) -> None:
    random.choice(job.processes()).kill()


def hung_rank(job: Job) -> None:
    random.choice(job.processes()).send_signal(signal.SIGSTOP)


# What is put in, and how the attempt ends that it meets (slurm/history.py).
FAULTS: dict[Callable[[Job], None], str | None] = {
    near_the_limit: "time",
    steps_told_to_stop: "stopped",
    preempted: "stopped",
    requeued_by_hand: "stopped",
    node_without_power: "stopped",
    first_node_without_power: None,
    killed_rank: "crash",
    hung_rank: "crash",
}


@dataclass
class Struck:
    """A fault and what it cost: seconds until the next attempt began, and until it had trained a step; tokens that were trained again."""

    kind: str
    seconds_to_attempt: float
    seconds_to_step: float
    tokens_lost: int


def soak(job: Job, count: int, seed: int, steps_between: tuple[int, int] = (3, 9)) -> list[Struck]:
    """Strikes a job `count` times, each kind of fault as often as any other, at random moments of its training."""
    draw = random.Random(seed)
    kinds = list(itertools.islice(itertools.cycle(FAULTS), count))
    draw.shuffle(kinds)
    struck = []
    for kind in kinds:
        _, attempt, _ = _goes_on(job, len(struck))
        due = attempt.step + draw.randint(*steps_between)
        wait_for(lambda due=due: records(job.run)[-1]["step"] >= due, 300, f"{job.run}/job.log")
        time.sleep(draw.uniform(0, 1))  # in the middle of a step, or of a save
        at = time.time()
        kind(job)
        again, attempt, tokens_lost = _goes_on(job, len(struck) + 1)
        struck.append(Struck(kind.__name__, attempt.began - at, again - at, tokens_lost))
        print(struck[-1], flush=True)
    return struck


def _goes_on(job: Job, number: int) -> tuple[float, history.Attempt, int]:
    """Waits for the attempt with this number (from 0) to train: when it had trained a step, the attempt, and the tokens lost before."""
    reached = 0

    def began() -> bool:
        nonlocal reached
        reached = max([reached, *(record["tokens"] for record in records(job.run)[-1:])])
        return len(history.attempts(job.run)) > number

    wait_for(began, 300, f"{job.run}/job.log")
    attempt = history.attempts(job.run)[number]

    def trained() -> list[dict[str, Any]]:
        return [record for record in records(job.run) if record["step"] > attempt.step and record["time"] > attempt.began]

    wait_for(lambda: bool(trained()), 300, f"{job.run}/job.log")
    return trained()[0]["time"], attempt, max(0, reached - attempt.tokens)
