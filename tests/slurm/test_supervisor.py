"""When a run that keeps ending is given up, how long it waits before it is tried again, and what its log is to those who watch."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm import history
from slurm.history import Attempt
from slurm.preflight import Verdict
from slurm.supervisor import LONGEST_PAUSE, MAX_CRASHES, Supervisor, pause_before_next, without_prospect
from tests.cluster import NODES, wait_for
from tests.conftest import tiny

ROOT = Path(__file__).parents[2]


def attempts(*outcomes: str | None, tokens: tuple[int, ...] = (), reason: str = "boom", **facts: Any) -> list[Attempt]:
    """One after the other; tokens[i] is where attempt i begins, and tokens[i + 1] where it ends: 0 all the way if not said."""
    tokens = tokens or (0,) * (len(outcomes) + 1)
    made = []
    for number, outcome in enumerate(outcomes):
        one = Attempt("7", number, ["node1", "node2"], 0.0, tokens[number], tokens[number], reason=f"{reason} {number}")
        if outcome:
            one.ended, one.outcome, one.step_after, one.tokens_after = 1.0, outcome, tokens[number + 1], tokens[number + 1]
        made.append(one)
    for name, value in facts.items():
        for one in made:
            setattr(one, name, value)
    return made


@pytest.mark.parametrize("outcome", ["crash", "preflight"])
def test_attempts_without_a_token_are_capped(outcome):
    assert without_prospect(attempts(*[outcome] * (MAX_CRASHES - 1))) is None
    assert f"{MAX_CRASHES} attempts in a row gained no token" in without_prospect(attempts(*[outcome] * MAX_CRASHES))
    gained = (0,) * 4 + (5,) * (MAX_CRASHES - 3)
    assert without_prospect(attempts(*[outcome] * MAX_CRASHES, tokens=gained)) is None


def test_nodes_that_lose_power_again_and_again_do_not_stop_a_run_that_gets_on():
    """Attempts without a last word: what they have gained is seen by the next one."""
    getting_on = attempts(*[None] * 20, "crash", tokens=tuple(range(22)))
    assert without_prospect(getting_on) is None and pause_before_next(getting_on) == 30
    standing = attempts(*[None] * 20, "crash")
    assert "gained no token" in without_prospect(standing)


def test_preempted_work_does_not_count_towards_giving_up():
    """However often it came to save nothing, and between how many crashes."""
    mixed = [*["crash", "stopped"] * (MAX_CRASHES - 1), *["stopped"] * 20]
    assert without_prospect(attempts(*mixed)) is None
    assert pause_before_next(attempts("crash", *["stopped"] * 5)) == pause_before_next(attempts("crash"))
    assert "gained no token" in without_prospect(attempts(*mixed, "crash"))


def test_the_same_crash_is_diagnosed_with_the_nodes_that_were_always_there():
    same = attempts("crash", "crash", "crash", tokens=(0, 3, 3, 3))  # the first has saved something, and came no farther
    for one, nodes in zip(same, (["node1", "node2"], ["node2", "node3"], ["node2", "node4"]), strict=True):
        one.nodes, one.reason, one.extra = nodes, "CUDA error: out of luck", {"reached": 4}
    said = without_prospect(same)
    assert said == (
        "3 attempts ended after step 4 in the same way, always with node2: try without (sbatch --exclude): CUDA error: out of luck"
    )
    same[0].nodes = ["node5"]
    assert without_prospect(same) == "3 attempts ended after step 4 in the same way: CUDA error: out of luck"
    same[0].extra = {"reached": 3}  # taken down before rank 0 had written down step 4
    assert without_prospect(same).startswith("3 attempts ended after step 4 in the same way")
    same[0].extra = {"reached": 2}
    assert without_prospect(same) is None
    same[0].extra, same[1].reason = {"reached": 4}, "another"
    assert without_prospect(same) is None


def test_a_torn_record_is_none_and_stops_nothing(tmp_path):
    """Half a line, as a full disk leaves it, with the next one behind it; garbage in each of the files."""
    one, two = (history.began(tmp_path, "7", restart, ["node1"]) for restart in (0, 1))
    history.ended(tmp_path, one, "crash", "boom")
    path = tmp_path / "slurm/attempts.jsonl"
    with path.open("a") as file:
        file.write('{"job": "7", "restart": 1, "no')
    history.ended(tmp_path, two, "done", "")
    assert [(one.restart, one.outcome) for one in history.attempts(tmp_path)] == [(0, "crash"), (1, "done")]
    history.record_nodes(tmp_path, {}, {"node1": "sick"})
    assert list(history.excluded(tmp_path)) == ["node1"]
    for name in ("attempts.jsonl", "nodes.json", "jobs"):
        (tmp_path / "slurm" / name).write_bytes(b'\xff[]\n{"excluded": 3}\n')
    (tmp_path / "checkpoints/step-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000003/checkpoint.json").write_text('{"step": 3, "tokens": 30}')
    (tmp_path / "checkpoints/step-00000006").mkdir()
    (tmp_path / "checkpoints/step-00000006/checkpoint.json").write_text('{"step": 6, "tok')
    (tmp_path / "checkpoints/latest").symlink_to("step-00000006")
    assert not history.attempts(tmp_path) and not history.excluded(tmp_path) and not history.jobs(tmp_path)
    assert history.standing(tmp_path) == (3, 30)


def test_a_record_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "slurm").write_text("a file, where a folder should be")
    attempt = history.began(tmp_path, "7", 0, ["node1"])
    history.ended(tmp_path, attempt, "done", "")
    assert "the run goes on without this record" in capsys.readouterr().out


def test_time_limits_too_short_to_save():
    assert without_prospect(attempts("time", "time", "time", tokens=(0, 0, 1, 1))) is None
    assert "raise --time" in without_prospect(attempts("time", "time", "time"))


def test_pauses_double_up_to_half_an_hour(monkeypatch):
    monkeypatch.setenv("MUJINA_RETRY_SECONDS", "20")
    pauses = [pause_before_next(attempts(*["crash"] * count)) for count in range(1, MAX_CRASHES + 1)]
    assert pauses == [20, 40, 80, 160, 320, 640, 1280, LONGEST_PAUSE]
    assert pause_before_next(attempts("crash", "crash", tokens=(0, 0, 1))) == 20


@pytest.fixture
def supervisor(prepared, tmp_path, monkeypatch) -> Iterator[Supervisor]:
    """Of a job on node1 to node3, one of which is spare; Slurm is asked nothing."""
    for name, value in (("JOB_ID", "7"), ("JOB_NODELIST", "node[1-3]"), ("JOB_PARTITION", "main")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MUJINA_SPARE_NODES", "1")
    monkeypatch.setattr("slurm.supervisor._hostnames", lambda nodes: {"node[1-3]": NODES[:3], "node[1,4]": ["node1", "node4"]}[nodes])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield Supervisor(tiny(prepared, tmp_path / "run"), [])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def slurm_says(supervisor, tmp_path, monkeypatch):
    """Puts stand-ins of Slurm's commands on the path: srun is a line of shell, squeue's answer is given. The nodes are healthy."""

    def commands(srun: str, squeue: str = "RUNNING N/A") -> None:
        (tmp_path / "bin").mkdir()
        for name, line in (("srun", srun), ("squeue", f"echo {squeue}"), ("scontrol", "exit 1"), ("scancel", "exit 1")):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / "bin" / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(supervisor, "_preflight", lambda attempt: {})
    return commands


@pytest.mark.parametrize(
    ("squeue", "outcome"),
    [
        ("RUNNING 2026-01-31T12:00:00", "stopped"),  # in its time of grace
        ("COMPLETING 2026-01-31T12:00:20", "stopped"),  # over
        ("COMPLETING N/A", "stopped"),  # requeued, or a node was lost: this process will be told after its steps
        ("RUNNING N/A", "crash"),
        ("", "crash"),  # Slurm does not know
    ],
)
@pytest.mark.parametrize("status", [143, 137, 1])
def test_what_slurm_ends_is_no_crash_though_it_came_not_to_save(supervisor, slurm_says, squeue, outcome, status):
    """143: ended by SIGTERM, perhaps before it was ready for it; 137: killed while it saved; 1: as a rank whose neighbour is gone."""
    slurm_says(f"exit {status}", squeue)
    supervisor.run()
    [attempt] = history.attempts(supervisor.folder)
    assert attempt.outcome == outcome and attempt.tokens_after == 0
    assert ("preempted at 2026" in attempt.reason) == ("2026" in squeue)


@pytest.mark.parametrize("status", [0, 1, 143])
def test_after_sigterm_no_status_is_a_crash_or_the_end(supervisor, slurm_says, status):
    slurm_says(f"kill -TERM $PPID; exit {status}")
    assert supervisor.run() == 143
    [attempt] = history.attempts(supervisor.folder)
    assert attempt.outcome == "stopped"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{node}-ib0", "node2-ib0"),
        ("node1-ib0.cluster", "node2-ib0.cluster"),  # of the first node of the job, which may not be the first that is trained on
        ("node12-ib0", "node2-ib0"),
        ("fast-node1", "fast-node2"),
        ("node123", "node123"),  # none of the job's
        ("10.1.2.3", "10.1.2.3"),
        ("localhost", "127.0.0.12"),  # a shell's, and no place where two nodes meet
        ("", "127.0.0.12"),
    ],
)
def test_where_the_ranks_meet(supervisor, slurm_says, monkeypatch, tmp_path, given, expected):
    slurm_says("exit 0")
    (tmp_path / "bin/scontrol").write_text('#!/bin/sh\necho "NodeName=$3 Arch=x86_64\n   NodeAddr=127.0.0.1${3#node} NodeHostName=vm"\n')
    supervisor.nodes = ["node1", "node2", "node12"]
    monkeypatch.setenv("MASTER_ADDR", given)
    assert supervisor._address("node2") == expected


def test_each_attempt_meets_at_another_port(supervisor, slurm_says, tmp_path):
    """One that is taken may stay so."""
    slurm_says(f"echo $MASTER_PORT >> {tmp_path}/ports")
    for number in range(10):
        supervisor._train(["node1"], number)
    assert len(set((tmp_path / "ports").read_text().split())) == 10


def test_sigterm_is_written_down_before_anything_else(supervisor):
    """It may be all that there is time for."""
    supervisor.attempt = history.began(supervisor.folder, "7", 0, supervisor.nodes)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert history.attempts(supervisor.folder)[0].outcome is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert history.attempts(supervisor.folder)[0].outcome == "stopped"


def test_preemption_in_the_preflight_says_nothing_about_the_nodes(supervisor, monkeypatch):
    """The probes are ended as the training would be, and tell nothing."""
    monkeypatch.setattr(supervisor, "_wait", lambda step, seconds: 0)
    monkeypatch.setattr("subprocess.Popen", lambda command: None)
    answer = "RUNNING 2026-01-31T12:00:00"
    monkeypatch.setattr("slurm.supervisor._slurm", lambda *command: subprocess.CompletedProcess(command, 0, answer, ""))
    assert supervisor._preflight(history.began(supervisor.folder, "7", 0, supervisor.nodes)) == {}
    assert supervisor.is_told_to_stop and not history.excluded(supervisor.folder)


def test_the_first_node_in_slurms_order_has_rank_0(supervisor, monkeypatch):
    """However fast the others are: the processes meet there."""
    monkeypatch.setattr(supervisor, "_wait", lambda step, seconds: 0)
    monkeypatch.setattr(supervisor, "_slurms_doing", lambda: None)
    monkeypatch.setattr("subprocess.Popen", lambda command: None)
    monkeypatch.setattr("slurm.preflight.judge", lambda *arguments: Verdict(["node3", "node1"], [], {"node2": ["slow"]}))
    attempt = history.began(supervisor.folder, "7", 0, supervisor.nodes)
    assert supervisor._preflight(attempt) == {"node2": "slow"}
    assert attempt.nodes == ["node1", "node3"]


@pytest.mark.parametrize(
    ("in_partition", "sick", "expected"),
    [
        (5, [], {"node4"}),
        (5, ["node2"], {"node4", "node2"}),  # node4 by the user
        (4, ["node2"], {"node4"}),  # the three that are left have a spare one among them
        (4, ["node1", "node2"], "2 of the 3 nodes of partition main are left out, and the job needs 2"),
    ],
)
def test_who_is_excluded(supervisor, monkeypatch, in_partition, sick, expected):
    nodes = [f"node{number}" for number in range(1, in_partition + 1)]
    answers = {"squeue": "node[1,4]", "sinfo": "\n".join(nodes)}
    monkeypatch.setattr("slurm.supervisor._slurm", lambda command, *_: subprocess.CompletedProcess(command, 0, answers[command], ""))
    history.record_nodes(supervisor.folder, {}, dict.fromkeys(["node1", *sick], "old"))
    path = supervisor.folder / "slurm/nodes.json"
    known = json.loads(path.read_text())
    if "node1" not in sick:
        known["excluded"]["node1"]["since"] -= history.EXCLUDED_SECONDS  # its day is over
    path.write_text(json.dumps(known))
    excluded, lack = supervisor._to_exclude()
    if isinstance(expected, str):
        assert lack.startswith(expected)
    else:
        assert lack is None and excluded == expected


def test_attempts_are_read_back(tmp_path):
    one = history.began(tmp_path, "7", 0, ["node1", "node2"])
    assert history.attempts(tmp_path) == [one] and one.ended is None
    one.nodes = ["node2"]
    history.ended(tmp_path, one, "crash", "boom")
    two = history.began(tmp_path, "7", 1, ["node2"])
    assert history.attempts(tmp_path) == [one, two]


def test_logs_follow_a_run_into_its_next_attempt(tmp_path):
    first, second = (tmp_path / f"logs/attempt-{number}" for number in (9, 10))
    first.mkdir(parents=True)
    (first / "rank-3.log").write_text("one\ntwo\nthree\n")
    command = [sys.executable, "-m", "slurm.logs", str(tmp_path), "--follow", "--rank", "3", "--lines", "2"]
    with (tmp_path / "out").open("w") as out, subprocess.Popen(command, cwd=ROOT, stdout=out) as logs:
        try:
            wait_for(lambda: "three" in (tmp_path / "out").read_text(), 30, "the log")
            with (first / "rank-3.log").open("a") as file:
                file.write("four\n")
            wait_for(lambda: "four" in (tmp_path / "out").read_text(), 30, "the log")
            second.mkdir()
            (second / "rank-3.log").write_text("five\n")
            wait_for(lambda: "five" in (tmp_path / "out").read_text(), 30, "the log")
        finally:
            logs.terminate()
    assert (tmp_path / "out").read_text().splitlines() == [
        f"==> {first}/rank-3.log <==", "two", "three", "four", f"==> {second}/rank-3.log <==", "five"
    ]  # fmt: skip
