"""Chains of verbs on this machine, as processes; the verbs are stand-ins (verbs/), which write down that they were called."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mujina import sbatch
from mujina.chain import Journal, Row
from mujina.exits import MISTAKE, STOPPED
from mujina.stations import read_chain
from mujina.user_input import UserError
from tests.cluster import wait_for

VERBS = Path(__file__).parent / "verbs"
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{VERBS}:{ROOT}"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(stations: list[dict[str, Any]], **fields: Any) -> None:
    values = {"name": "test", "folder": "state", "stations": stations} | fields
    Path("chain.yaml").write_text(yaml.safe_dump(values))


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mujina", "chain", "chain.yaml", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True)


def lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def journal() -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines("state/chain.jsonl")]


THREE: list[dict[str, Any]] = [
    {"name": "one", "run": "write one {text}", "outputs": ["one"]},
    {"name": "two", "run": "write two {text}", "outputs": ["two"]},
    {"name": "three", "run": "write three {text}"},
]
VARIABLES: dict[str, Any] = {"text": "x"}


def test_a_failed_station_ends_the_chain_which_goes_on_there(folder):
    write(THREE, variables=VARIABLES)
    Path("two.fails").write_text("7")
    failed = call("text=x y")
    assert failed.returncode == 7 and lines("one") == ["x y"] and not Path("three").exists()
    assert failed.stderr.splitlines()[-1] == (
        "error: chain test ended at station two with status 7; to go on from there: mujina chain chain.yaml 'text=x y'"
    )
    Path("two.fails").unlink()
    done = call("text=x y")
    assert done.returncode == 0 and "--- one: is done" in done.stdout and lines("one") == ["x y"] and lines("three") == ["x y"]
    assert [(row["station"], row["status"]) for row in journal()] == [("one", 0), ("two", 7), ("two", 0), ("three", 0)]
    assert all(row["seconds"] > 0 for row in journal())

    summary = json.loads(Path("state/summary.json").read_text())
    assert [row["state"] for row in summary["stations"]] == ["done"] * 3
    two = sum(row["seconds"] for row in journal() if row["station"] == "two")  # both calls
    assert summary["stations"][1]["seconds"] == round(two, 1)

    assert call("text=x y").stdout.count("is done") == 3 and len(journal()) == 4


def test_a_mistake_ends_the_chain_with_the_status_of_mistakes(folder):
    write(THREE, variables=VARIABLES)
    Path("two.fails").write_text(str(MISTAKE))
    ended = call()
    assert ended.returncode == MISTAKE and "ended at station two with status 2 (a mistake)" in ended.stderr


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda: None, []),
        (lambda: Path("two").unlink(), ["two", "three"]),
        (lambda: write([THREE[0] | {"run": "write one {text} more"}, *THREE[1:]], variables=VARIABLES), ["one", "two", "three"]),
        (lambda: write([*THREE[:2], THREE[2] | {"needs": ["one"]}], variables=VARIABLES), []),
        (lambda: write([*THREE[:2], THREE[2] | {"needs": ["one"], "run": "write three y"}], variables=VARIABLES), ["three"]),
    ],
    ids=["nothing", "an output is gone", "another command", "other needs", "the last command"],
)
def test_what_runs_again_when_something_has_changed(folder, change, again):
    write(THREE, variables=VARIABLES)
    assert call().returncode == 0
    change()
    assert call().returncode == 0
    assert [row["station"] for row in journal()[3:]] == again


def test_a_file_that_the_configuration_names_makes_it_run_again(folder):
    Path("configs").mkdir()
    Path("configs/run.yaml").write_text("extends: base.yaml\n")
    Path("configs/base.yaml").write_text("phases: configs/phases.yaml\n")
    Path("configs/phases.yaml").write_text("tokens: 1\n")
    write([{"name": "one", "run": "write one configs/run.yaml"}, {"name": "two", "run": "write two"}])
    call()
    assert "is done" in call().stdout and len(journal()) == 2
    for number, name in enumerate(("run", "base", "phases"), start=2):
        with Path(f"configs/{name}.yaml").open("a") as file:
            file.write("more: 1\n")
        assert f"--- one: configs/{name}.yaml has changed" in call("--dry-run").stdout
        call()
        assert len(lines("one")) == len(lines("two")) == number


def test_a_station_that_left_no_output_is_not_done(folder):
    write([{"name": "one", "run": "write one x", "outputs": ["elsewhere"]}, {"name": "two", "run": "write two x"}])
    ended = call()
    assert ended.returncode == MISTAKE and "left no elsewhere" in ended.stderr and not Path("two").exists()


def test_what_needs_a_station_that_has_run_again_runs_again_even_in_a_later_call(folder):
    write(THREE, variables=VARIABLES)
    call()
    Path("one").unlink()
    write(THREE[:1], variables=VARIABLES)  # as if the call that ran it again had been killed before the second
    call()
    write(THREE, variables=VARIABLES)
    assert "--- two: one has run again" in call("--dry-run").stdout
    assert call().returncode == 0
    assert [row["station"] for row in journal()[3:]] == ["one", "two", "three"]


def test_a_dry_run_does_nothing(folder):
    write(THREE, variables=VARIABLES)
    shown = call("--dry-run", "text=a b")
    assert shown.returncode == 0 and "--- one: has not run yet\nmujina write one 'a b'" in shown.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["chain.yaml"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_station_once_and_the_chain_ends_as_it_does(folder, number):
    write([{"name": "one", "run": "linger saved"}, {"name": "two", "run": "write two x"}])
    command = [sys.executable, "-m", "mujina", "chain", "chain.yaml"]
    # A group of processes of its own, which is signalled as a terminal does it
    chain = subprocess.Popen(command, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: lines("saved") == ["began"], 60, "the station")
    os.killpg(chain.pid, number)
    _, told = chain.communicate(timeout=60)
    assert chain.returncode == STOPPED and lines("saved") == [f"saved after {int(signal.SIGTERM)}"]
    assert "ended at station one with status 143 (it was told to stop)" in told and not Path("two").exists()
    assert call().returncode == 0 and lines("two") == ["x"]


def test_a_chain_that_is_killed_outright_stops_its_station_and_leaves_nothing_behind(folder):
    write([{"name": "one", "run": "linger saved"}])
    chain = subprocess.Popen([sys.executable, "-m", "mujina", "chain", "chain.yaml"], env=ENVIRONMENT)
    wait_for(lambda: lines("saved") == ["began"], 60, "the station")
    refused = call()
    assert refused.returncode == MISTAKE and "chain state: process" in refused.stderr
    chain.kill()
    chain.wait()
    wait_for(lambda: lines("saved") == [f"saved after {int(signal.SIGTERM)}"], 60, "the station")
    assert call().returncode == 0


def test_half_a_line_of_the_journal_is_as_if_it_were_not_there(folder):
    write(THREE, variables=VARIABLES)
    call()
    whole = Path("state/chain.jsonl").read_bytes()
    Path("state/chain.jsonl").write_bytes(whole[:-10])
    assert call().returncode == 0
    assert [row["station"] for row in journal()] == ["one", "two", "three"] and lines("three") == ["x", "x"]


def plan_of(stations: list[dict[str, Any]], *overrides: str, **fields: Any) -> Any:
    write(stations, **fields)
    return read_chain(Path("chain.yaml"), list(overrides))


def test_for_each_makes_a_station_of_every_combination_and_needs_find_them(folder):
    made = plan_of(
        [
            {"name": "start", "run": "plan x"},
            {"name": "train {kind} {seed}", "for_each": {"kind": ["a", "b"], "seed": [1, 2]}, "run": "train {kind} {seed}"},
            {"name": "score {kind} 1", "for_each": {"kind": ["a", "b"]}, "needs": ["train {kind} 1"], "run": "evaluate {kind}"},
            {"name": "report", "needs": ["score *", "train b ?"], "run": ["report", "{runs}", "--title", "{title} 1"]},
        ],
        variables={"runs": ["r1", "r 2"], "title": "a b", "unused": True},
    ).stations
    needs = {station.name: station.needs for station in made}
    assert needs["train a 2"] == ["start"] and needs["score b 1"] == ["train b 1"]
    assert needs["report"] == ["train b 1", "train b 2", "score a 1", "score b 1"]
    assert made[-1].command == ["report", "r1", "r 2", "--title", "a b 1"] and made[1].command == ["train", "a", "1"]


def test_rounds_run_one_after_the_other(folder):
    made = plan_of(
        [
            {"name": "start", "run": "convert a out-0"},
            {"name": "pairs {round}", "rounds": "{rounds}", "run": "preferences x answers.model=out-{before}"},
            {"name": "dpo {round} {seed}", "rounds": "{rounds}", "for_each": {"seed": [1, 2]}, "run": "train x run=out-{round}"},
            {"name": "report", "needs": ["dpo *"], "run": "report"},
        ],
        "rounds=2",
        variables={"rounds": 3},
    ).stations
    assert [station.name for station in made] == ["start", "pairs 1", "dpo 1 1", "dpo 1 2", "pairs 2", "dpo 2 1", "dpo 2 2", "report"]
    assert made[4].command == ["preferences", "x", "answers.model=out-1"] and made[4].needs == ["dpo 1 1", "dpo 1 2"]
    assert made[1].needs == ["start"] and made[5].command[-1] == "run=out-2"


def test_the_chain_of_rounds_hands_each_round_s_model_to_the_next():
    files = [f"{name}=examples/rounds/{name}.yaml" for name in ("preferences", "data", "dpo")]
    made = read_chain(ROOT / "slurm/rounds.yaml", [*files, "start=runs/sft/checkpoints/latest", "prompts=held_out.jsonl", "rounds=2"])
    stations = {station.name: station for station in made.stations}
    kinds = ("preferences", "pairs", "training", "model", "evaluation")
    assert list(stations) == ["model 0", "evaluation 0", *(f"{kind} {number}" for number in (1, 2) for kind in kinds)]
    assert stations["preferences 2"].needs == ["model 1"] and "answers.model=runs/rounds/round-1/hf" in stations["preferences 2"].command
    training = stations["training 2"]
    assert {"train.init_from=runs/rounds/round-1/hf", "run=runs/rounds/round-2", "data.folder=runs/rounds/round-2/data"} < set(
        training.command
    )
    assert [stations[f"{kind} 1"].script.name for kind in kinds] == [
        *("preferences.sh", "verb.sh", "post_train.sh", "convert_to_hf.sh", "evaluate.sh"),
    ]


def test_variables_hold_one_another_and_keys_of_the_files_that_they_name(folder):
    Path("base.yaml").write_text("run: runs/a\ntrain: {processes: 2}\n")
    Path("dense.yaml").write_text("extends: base.yaml\n")
    stations = [{"name": "x", "run": "convert {path}/latest out {config.train.processes} {wiki: 1}", "outputs": ["{path}/{out}"]}]
    variables = {"config": None, "path": "{config.run}/checkpoints", "out": "hf"}
    [station] = plan_of(stations, "config=dense.yaml", "out=true", variables=variables).stations
    assert station.command == ["convert", "runs/a/checkpoints/latest", "out", "2", "{wiki:", "1}"]
    assert station.outputs == [Path("runs/a/checkpoints/true")]


@pytest.mark.parametrize(
    ("stations", "overrides", "message"),
    [
        ([{"name": "a", "run": "trian x"}], [], "no such verb: trian: did you mean train?"),
        ([{"name": "a", "run": "train {confg}"}], [], "station a: run: no such variable: {confg}: did you mean config?"),
        ([{"name": "a", "run": "train {several}x"}], [], "{several} has several values"),
        ([{"name": "a", "run": "train {config.rum}"}], ["config=run.yaml"], "run.yaml has no rum"),
        ([{"name": "a", "run": "train x"}], ["cofig=y"], "no variable cofig: did you mean config?"),
        ([{"name": "a", "run": "train x"}], ["must="], "variables.config is not set"),
        ([{"name": "a", "run": "train x", "need": ["b"]}], [], "unknown key stations.0.need: did you mean needs?"),
        ([{"name": "a", "run": "train x", "needs": ["b"]}, {"name": "b", "run": "plan"}], [], "no station before it is called b"),
        ([{"name": "a", "run": "train x", "for_each": {"n": [1, 2]}}], [], "two stations have this name"),
        ([{"name": "a", "run": "train x", "slurm": {"script": "evalute.sh"}}], [], "did you mean evaluate.sh?"),
        ([{"name": "a", "run": "train x", "slurm": {"array": "many"}}], [], "slurm.array (many) must be a number of tasks"),
        ([{"name": "a {round}", "run": "train x", "rounds": 0}], [], "rounds (0) must be a number from 1 to 1000"),
        ([{"name": "a", "run": "train x", "rounds": 2}], [], "two stations have this name"),
        ([{"name": "a {round}", "run": "train x"}], [], "no such variable: {round}"),
        ([], [], "stations"),
    ],
)
def test_a_mistake_in_a_chain_is_named(folder, stations, overrides, message):
    Path("run.yaml").write_text("run: x\n")
    with pytest.raises(UserError) as error:
        plan_of(stations, *([] if overrides == ["must="] else ["config=c", *overrides]), variables={"config": None, "several": ["a", "b"]})
    assert message in str(error.value)


def test_a_variable_is_not_called_like_a_field(folder):
    with pytest.raises(UserError, match="folder is a field of the chain"):
        plan_of([{"name": "a", "run": "plan x"}], variables={"folder": "x"})


@pytest.mark.parametrize("chain", ["examples/quickstart/chain.yaml", "slurm/chain.yaml"])
def test_the_chains_of_the_project_fit(chain, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {
        "data": "d.yaml",
        "dense": "examples/quickstart/dense.yaml",
        "mixture": "examples/quickstart/moe.yaml",
        "hf": "x",
        "prompts": "p",
    }
    made = read_chain(Path(chain), [f"{key}={value}" for key, value in names.items()] if "slurm" in chain else [])
    assert len({station.name for station in made.stations}) == len(made.stations) >= 7


def test_a_job_that_ends_while_the_queue_is_asked_has_ended(folder, monkeypatch):
    """squeue answers when it is over, and its end was not there yet when the journal was opened."""
    journal = Journal(folder, read_only=False)
    journal.add(Row("one", ["write", "one"], {}, 0.0, job="7"))

    def ends_first() -> set[str]:
        (folder / "jobs").mkdir()
        (folder / "jobs/7_0").write_text("began 5\nended 9 0\n")
        return set()

    monkeypatch.setattr(sbatch, "in_queue", ends_first)
    [row] = Journal(folder, read_only=True).rows
    assert (row.status, row.seconds, row.is_queued) == (0, 4.0, False)
