"""Runs the training inside a Slurm job: preflight, start, and what follows from the way it ends.

    python -m slurm.supervisor CONFIG.yaml [key=value …]         (what the pretraining scripts start, once, on the first node of the job)

    how the training ended                       what follows
    all steps done                               the job ends well, and what depends on it starts
    USR1: the time limit is near                 saved, and requeued at once; so after a signal to the steps alone
    SIGTERM: scancel, requeue, preemption,       saved where there is time; Slurm starts the job again, but for scancel. However the
    another node was lost                        processes ended then: what Slurm ends is no crash, and none of those that are counted
    an error of the user's, NaN (status 2)       not requeued: it would come again
    a crash, a killed or hung rank               requeued, later and later, up to MAX_CRASHES in a row without a token gained
    the same crash at the same step, the third   not requeued: a diagnosis in its place
    the first node died                          without a word; Slurm starts the job again on other nodes
    too few healthy nodes                        requeued without the others; where no node passes, all are kept and it counts as a crash
    time limits too short to save                not requeued from the third on: raise them, or save more often

What counts as progress are the tokens of the newest checkpoint. RUN/slurm keeps the history (history.py). Needs no torch.

From the environment: MUJINA_SPARE_NODES (nodes of the job that are not trained on), MUJINA_RETRY_SECONDS (after a crash),
MUJINA_SRUN_OPTIONS (for every srun, such as Pyxis' --container-image), MUJINA_TASK_PYTHON (what the tasks run, such as "apptainer exec --nv
mujina.sif python"; else this Python), MASTER_ADDR (where the ranks meet, with {node} for the first node trained on: {node}-ib0; else
Slurm's address of that node), MASTER_PORT (else one that is another at each attempt).
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from megatron_jobs import config as configuration
from megatron_jobs import failures
from megatron_jobs.config import RunConfig
from megatron_jobs.planning import layouts
from mujina import sbatch
from mujina.exits import MISTAKE, STOPPED
from mujina.files import write_whole
from mujina.user_input import UserError, command_line
from slurm import history, preflight
from slurm.history import Attempt

SAME_CRASHES = 3  # at one step
MAX_CRASHES = 8  # in a row, without a token gained
TOO_SHORT = 3  # time limits in a row, without a token gained
LONGEST_PAUSE = 1800  # seconds before a crashed job may start again
PREFLIGHT_SECONDS = 300  # for all of it on all nodes
CONTROLLER_SECONDS = 300  # for Slurm's controller to answer
FIRST_PORT, NUM_PORTS = 20_000, 10_000  # below those that the system gives to whoever asks for any
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # what a shell has left over from training on one machine
SIGNAL_SECONDS = 10  # between two signals to a step, which may not have begun when the first one came


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.micro_batch_size=2")] = None,
) -> None:
    """Trains in this Slurm job, and requeues it or not when the training has ended."""
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "SLURM_JOB_ID is not set: this runs inside a job; submit one with `mujina submit`, or train here with `mujina train`"
        )
    settings = configuration.load(config, overrides)
    status = Supervisor(settings, ["-m", "megatron_jobs.train", str(config), *(overrides or [])]).run()
    sbatch.record_end(status)
    sys.exit(status)


class Supervisor:
    def __init__(self, config: RunConfig, command: list[str]) -> None:
        self.config, self.folder, self.command = config, config.run, command
        self.job, self.restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.nodes = _hostnames(os.environ["SLURM_JOB_NODELIST"])
        self.tasks_per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
        self.needed = len(self.nodes) - int(os.environ.get("MUJINA_SPARE_NODES", 0))
        self.came: set[int] = set()  # signals
        self.is_told_to_stop = False
        self.attempt: Attempt | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._signalled)

    def run(self) -> int:
        """One attempt; returns the exit status of the job."""
        before = history.attempts(self.folder)
        if before and before[-1].ended is None:
            _say(f"the attempt before this one (job {before[-1].job}) ended without a word: a node lost power, or Slurm ended it")
        self.attempt = attempt = history.began(self.folder, self.job, self.restart, self.nodes)
        if signal.SIGTERM in self.came:
            self._stopped()
        try:
            layouts.check(self.config, self.needed * self.tasks_per_node)
        except UserError as error:
            history.ended(self.folder, attempt, "mistake", str(error))
            raise
        bad = self._preflight(attempt)
        if len(bad) == len(self.nodes) > 1:  # what all nodes have in common is no fault of theirs: a container, a file system
            return self._again("crash", f"no node passed the preflight: {next(iter(bad.values()))}")
        if len(attempt.nodes) < self.needed and not self.is_told_to_stop:
            return self._again("preflight", "too few healthy nodes")
        attempt.extra["preflight_seconds"] = round(time.time() - attempt.began, 1)
        _say(f"attempt {len(before) + 1}, job {self.job}: {len(attempt.nodes)} nodes × {self.tasks_per_node}, from step {attempt.step:,}")
        logs_before = failures.attempts(self.folder)
        status = STOPPED if self.is_told_to_stop else self._train(attempt.nodes, number=len(before))
        attempt.extra["reached"] = (history.last_step(self.folder) or {}).get("step")
        logs = [path for path in failures.attempts(self.folder) if path not in logs_before]
        attempt.extra["logs"] = [path.name for path in logs]
        first_error = next(filter(None, map(failures.first_error, logs)), "")
        if signal.SIGTERM in self.came:  # whatever the status: that of an srun which gave its tasks up at last is 0
            self._stopped()
            return STOPPED
        if status == 0:
            history.ended(self.folder, attempt, "done", "")
            return 0
        if signal.SIGUSR1 in self.came and status == STOPPED:
            return self._again("time", "the time limit is near")
        if status != MISTAKE and (slurms_doing := self._slurms_doing()):
            return self._again("stopped", slurms_doing)
        # What srun ends after a crash has the same status, but has not saved.
        if status == STOPPED and not first_error and history.standing(self.folder)[0] > attempt.step:
            return self._again("stopped", "its steps were told to stop")
        written = first_error or "none was written down: see what srun says above"
        _say(f"{'-' * 100}\nfirst error: {written}\n\nall ranks' logs: {self.folder}/logs\n{'-' * 100}")
        if status == MISTAKE:
            history.ended(self.folder, attempt, "mistake", first_error)
            return MISTAKE
        return self._again("crash", _essence(first_error) or f"srun ended with status {status}")

    def _preflight(self, attempt: Attempt) -> dict[str, str]:
        """Sets attempt.nodes to those to train on, the best of the healthy (too few, where there are no more); returns what ails others."""
        folder = self.folder / "slurm/preflight" / f"{self.job}-{self.restart}"
        # With --exclusive a node's GPUs are all there (SLURM_GPUS_ON_NODE), whatever the job has asked for ("8" or "h100:8").
        gpus = int((os.environ.get("SLURM_GPUS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE", "0")).rpartition(":")[2])
        write_whole(folder / "started", str(time.time()).encode())
        # --overlap: a probe that hangs in a GPU's driver keeps its step for minutes, and must not keep the nodes from the training.
        command = [*_srun(self.nodes, 1), "--overlap", "--kill-on-bad-exit=0", *_python(), "-m", "slurm.preflight", str(folder)]
        self._wait(subprocess.Popen([*command, "--gpus", str(gpus)]), PREFLIGHT_SECONDS)
        if self.is_told_to_stop:  # so were the probes: that they are silent says nothing about their nodes
            return {}
        verdict = preflight.judge(folder, self.nodes, self.needed)
        if verdict.bad and self._slurms_doing():
            self.is_told_to_stop = True
            return {}
        bad = {node: "; ".join(reasons) for node, reasons in verdict.bad.items()}
        for reasons in bad.values():
            _say(f"preflight failed: {reasons}")
        if verdict.spare:
            _say(f"preflight: spare: {', '.join(verdict.spare)}")
        if len(bad) < len(self.nodes) or len(self.nodes) == 1:
            history.record_nodes(self.folder, verdict.as_dict(), bad)
        attempt.nodes = sorted(verdict.good, key=self.nodes.index)  # Slurm's order, in which the first has rank 0
        return bad

    def _train(self, nodes: list[str], number: int) -> int:
        """Starts one process a task and waits for all; returns the first bad exit status. `number` counts the run's attempts."""
        # One that is taken is taken in the next attempt as well: by a process that was left over, or by something else that stays.
        port = os.environ.get("MASTER_PORT") or str(FIRST_PORT + (int(self.job) + 1_009 * number) % NUM_PORTS)
        environment = os.environ | {"MASTER_ADDR": self._address(nodes[0]), "MASTER_PORT": port}
        command = [*_srun(nodes, self.tasks_per_node), "--kill-on-bad-exit=1", "--wait=60", *_python(), *self.command]
        return self._wait(subprocess.Popen(command, env=environment))

    def _address(self, node: str) -> str:
        """Where the ranks find the first one. A script that wrote down its first node's name, say node1-ib0, means that of any node."""
        given = os.environ.get("MASTER_ADDR", "")
        if given and (given not in LOOPBACK or len(self.nodes) == 1):
            return re.sub(rf"(?<!\w)({'|'.join(map(re.escape, self.nodes))})(?!\w)", node, given.replace("{node}", node))
        found = re.search(r"\bNodeAddr=(\S+)", _slurm("scontrol", "show", "node", node).stdout)
        return found[1] if found else node

    def _wait(self, step: subprocess.Popen[bytes], seconds: float = float("inf")) -> int:
        """Waits for a job step; a signal to this process reaches its tasks as SIGTERM."""
        deadline, next_signal = time.monotonic() + seconds, 0.0
        while step.poll() is None:
            if self.came and time.monotonic() > next_signal:
                next_signal = time.monotonic() + SIGNAL_SECONDS
                # The steps, and not this process: that would need --batch. It fails where Slurm has ended the job itself.
                subprocess.run(["scancel", "--signal=TERM", self.job], stderr=subprocess.DEVNULL)
            if time.monotonic() > deadline:
                step.terminate()  # srun ends its tasks then
                deadline = float("inf")
            time.sleep(0.2)
        status = step.returncode if step.returncode >= 0 else 128 - step.returncode
        self.is_told_to_stop = bool(self.came) or status == STOPPED
        return status

    def _signalled(self, number: int, frame: object) -> None:
        self.came.add(number)
        if number == signal.SIGTERM and self.attempt and self.attempt.ended is None:
            self._stopped()  # before anything else: Slurm ends this process when its time (KillWait) is over

    def _slurms_doing(self) -> str | None:
        """Why the steps ended, where Slurm ends the job; None where it does not, or does not answer.

        With a time of grace, preemption tells the steps only, and this process when that time is over. A requeue and the loss of a node
        tell the steps first.
        """
        state, preempted = [*_slurm("squeue", "-h", "-j", self.job, "-O", "State,PreemptTime").stdout.split(), "", ""][:2]
        if preempted not in ("", "N/A"):
            return f"preempted at {preempted}"
        return None if state in ("", "RUNNING") else f"Slurm is ending the job ({state})"

    def _stopped(self) -> None:
        assert self.attempt is not None
        history.ended(self.folder, self.attempt, "stopped", "SIGTERM: scancel, scontrol requeue, preemption, or another node was lost")

    def _again(self, outcome: str, reason: str) -> int:
        """Ends the attempt and requeues the job, unless that has no prospect; returns the exit status."""
        assert self.attempt is not None
        history.ended(self.folder, self.attempt, outcome, reason)
        # Those of this job: who submits a run anew thinks that it is worth it.
        attempts = [one for one in history.attempts(self.folder) if one.job == self.job and one.restart < self.restart]
        attempts.append(self.attempt)  # which a full disk may have kept from being written down
        excluded, lack = self._to_exclude()
        if diagnosis := without_prospect(attempts) or lack:
            self.attempt.extra["diagnosis"] = diagnosis
            history.ended(self.folder, self.attempt, outcome, reason)
            _say(f"not requeued: {diagnosis}")
            return 1
        if (state := _slurm("squeue", "-h", "-j", self.job, "-o", "%T").stdout.strip()) != "RUNNING":
            _say(f"not requeued by itself: Slurm is at it already ({state or 'gone'}): {reason}")
            return STOPPED
        pause = 0 if outcome in ("time", "stopped") else pause_before_next(attempts)
        _say(f"requeued{f', to start in {pause} seconds' if pause else ''}: {reason}")
        # Slurm ends this process once the job is requeued, KillWait seconds after SIGTERM: what is left to be said has to be quick.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        changes = [] if excluded is None else [f"ExcNodeList={','.join(sorted(excluded))}"]
        changes += [f"StartTime=now+{pause}"] if pause else []
        if _slurm("scontrol", "requeue", self.job).returncode == 0:
            if changes:
                _slurm("scontrol", "update", f"JobId={self.job}", *changes)
            time.sleep(600)
        return 1

    def _to_exclude(self) -> tuple[set[str] | None, str | None]:
        """The nodes that the job should stay away from from now on (None: as it is), and why it would wait for ever, if it would."""
        ever, left_out = history.ever_excluded(self.folder), set(history.excluded(self.folder))
        if not ever:
            return None, None
        now = set(_hostnames(_slurm("squeue", "-h", "-j", self.job, "-o", "%x").stdout.strip().replace("(null)", "")))
        by_the_user = now - ever  # sbatch --exclude
        partition = os.environ["SLURM_JOB_PARTITION"]
        nodes = set(_slurm("sinfo", "-h", "-N", "-p", partition, "-o", "%N").stdout.split()) - by_the_user
        if len(nodes - left_out) >= len(self.nodes):
            return by_the_user | left_out, None
        if len(nodes - left_out) >= self.needed:  # with the spare ones: the preflight leaves the sick out again
            return by_the_user, None
        return None, (
            f"{len(nodes & left_out)} of the {len(nodes)} nodes of partition {partition} are left out, and the job needs {self.needed}: "
            f"mend them and remove {self.folder}/slurm/nodes.json, which says what each one lacks, or submit for fewer"
        )


def without_prospect(attempts: list[Attempt]) -> str | None:
    """Why the last of these attempts should not be followed by another; None when it should."""
    last = attempts[-1]
    fruitless = _since_tokens_were_gained(attempts)
    # A rank that fails at a step may take the run down before rank 0 has written down the step before: one more or less is the same.
    same = [one for one in attempts if (one.outcome, one.reason) == ("crash", last.reason) and abs(_reached(one) - _reached(last)) <= 1]
    if last.outcome == "crash" and len(same) >= SAME_CRASHES:
        nodes = set.intersection(*(set(one.nodes) for one in same))
        where = f", always with {', '.join(sorted(nodes))}: try without (sbatch --exclude)" if nodes else ""
        reached = max(map(_reached, same))
        step = f"after step {reached:,}" if reached else "before the first step"
        return f"{len(same)} attempts ended {step} in the same way{where}: {last.reason}"
    if _failures(fruitless) >= MAX_CRASHES:
        return f"{MAX_CRASHES} attempts in a row gained no token, the last one because: {last.reason}"
    if sum(one.outcome == "time" for one in fruitless) >= TOO_SHORT:
        return (
            f"{TOO_SHORT} time limits in a row came before a step was trained and saved: raise --time, or the seconds in --signal, or save "
            "more often (train.checkpoint_interval)"
        )
    return None


def _reached(attempt: Attempt) -> int:
    """The last step that it has trained, as far as rank 0 came to write it down; 0 before the first."""
    return attempt.extra.get("reached") or 0


def pause_before_next(attempts: list[Attempt]) -> int:
    """Seconds: MUJINA_RETRY_SECONDS (30), doubled with every failure since the last attempt that gained tokens."""
    first = int(os.environ.get("MUJINA_RETRY_SECONDS", 30))
    pause: int = first * 2 ** max(0, _failures(_since_tokens_were_gained(attempts)) - 1)
    return min(LONGEST_PAUSE, pause)


def _failures(attempts: list[Attempt]) -> int:
    """How many count towards giving up: not those that Slurm or the time limit ended, whether or not they came to save."""
    return sum(one.outcome in ("crash", "preflight", None) for one in attempts)


def _since_tokens_were_gained(attempts: list[Attempt]) -> list[Attempt]:
    """Newest first. What an attempt that ended without a word has gained is seen by where the next one began."""
    fruitless: list[Attempt] = []
    tokens = attempts[-1].tokens_after
    assert tokens is not None
    for attempt in reversed(attempts):
        if tokens > attempt.tokens:
            break
        fruitless.append(attempt)
        tokens = attempt.tokens
    return fruitless


def _essence(first_error: str) -> str:
    """The last line of a traceback, which is the same when the same happens again on another node at another time."""
    return first_error.splitlines()[-1].strip() if first_error else ""


def _srun(nodes: list[str], tasks_per_node: int) -> list[str]:
    options = shlex.split(os.environ.get("MUJINA_SRUN_OPTIONS", ""))
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # which srun does not take from the job by itself
        options.append(f"--cpus-per-task={cpus}")
    tasks = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", f"--ntasks={len(nodes) * tasks_per_node}"]
    return ["srun", *tasks, f"--ntasks-per-node={tasks_per_node}", *options]


def _python() -> list[str]:
    return shlex.split(os.environ.get("MUJINA_TASK_PYTHON", sys.executable))


def _hostnames(nodes: str) -> list[str]:
    """node[1-3] → node1, node2, node3"""
    return _slurm("scontrol", "show", "hostnames", nodes).stdout.split() if nodes else []


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Asks again while Slurm's controller does not answer: it may be restarted beside a job that has trained for days."""
    deadline = time.monotonic() + CONTROLLER_SECONDS
    while True:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done
        _say(f"{shlex.join(command)} failed: {done.stderr.strip()}")
        if not re.search("timed out|contact|connect", done.stderr, re.IGNORECASE) or time.monotonic() > deadline:
            return done
        time.sleep(5)


def _say(text: str) -> None:
    print(f"[{time.strftime('%F %T')}] {text}", flush=True)


if __name__ == "__main__":
    command_line(main)
