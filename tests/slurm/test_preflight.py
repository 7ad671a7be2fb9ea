"""Planted faults of GPUs are found and named, probes that hang or die are survived, and the best nodes are chosen."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm import preflight
from tests.cluster import NODES

pytest_plugins = ["tests.cluster"]

ROOT = Path(__file__).parents[2]
HEALTHY = {
    "problems": [],
    "driver": "580.95.05",
    "model": "NVIDIA H100 80GB HBM3",
    "nvlinks": 18,
    "device": "cuda",
    "gemm_tflops": {"0": 700.0, "1": 700.0},
    "all_reduce_gb_per_second": 400.0,
}


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Gives node1, which this process then is, the stand-in of NVML with these answers; returns the variables that it takes."""

    def plant(answers, node="node1"):
        (tmp_path / "planted.json").write_text(json.dumps({node: answers}))
        variables = {"PYTHONPATH": str(Path(__file__).parent / "nvml"), "NVML_STAND_IN": str(tmp_path / "planted.json")}
        for name, value in (variables | {"SLURMD_NODENAME": "node1"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return variables

    return plant


def look(folder, gpus=2, limit=300.0):
    preflight.main(folder, gpus, limit)
    return json.loads((folder / "node1.json").read_text())


@pytest.mark.parametrize(
    "function, answer, problem",
    [
        ("nvmlDeviceGetTotalEccErrors 1 1 0", 3, "uncorrectable ECC errors since the last reset (3) must be 0: drain the node and reset"),
        ("nvmlDeviceGetRemappedRows 1", [0, 1, 1, 0], "memory rows to be remapped (1) must be 0: drain the node and reset"),
        (
            "nvmlDeviceGetRemappedRows 1",
            [0, 9, 0, 1],
            "memory rows that could not be remapped (1) must be 0: drain the node and replace",
        ),
        ("nvmlDeviceGetRetiredPagesPendingStatus 1", 1, "memory pages to be retired (1) must be 0: drain the node and reset"),
        (
            "nvmlDeviceGetCurrentClocksEventReasons 1",
            0x8 | 0x4,
            "clock slowdowns at rest (hardware slowdown) must be none: drain",
        ),
        ("nvmlDeviceGetCurrentClocksEventReasons 1", 0x21, "clock slowdowns at rest (thermal slowdown (driver)) must be none"),
        ("nvmlDeviceGetCurrentClocksEventReasons 1", 0x40, "clock slowdowns at rest (thermal slowdown (hardware)) must be none"),
        ("nvmlDeviceGetCurrentClocksEventReasons 1", 0x80, "clock slowdowns at rest (power brake (power supply)) must be none"),
        (
            "nvmlDeviceGetTemperature 1",
            83,
            "°C below the thermal slowdown (7) must be at least 10 at rest: drain the node and see to its cooling",
        ),
        ("nvmlDeviceGetMarginTemperature 1", 4, "°C below the thermal slowdown (4) must be at least 10 at rest: drain the node"),
        ("nvmlDeviceGetNvLinkState 1 7", 0, "inactive NVLinks (7) must be none where other GPUs have more active: drain the node"),
        (
            "nvmlDeviceGetMemoryInfo 1",
            {"used": 9 * 2**30, "free": 2**36},
            "GiB of memory in use already (9.0) must be at most 2.0: end",
        ),
        ("nvmlDeviceGetComputeRunningProcesses_v3 1", [512, 513], "processes that are on it already (512, 513) must be none: end what"),
        ("nvmlDeviceGetClockInfo 1", {"raise": "GPU_IS_LOST"}, "errors of NVML (GPU is lost) must be none: drain the node"),
    ],
)
def test_a_fault_of_a_gpu_is_named_with_its_rule_and_remedy(plant, tmp_path, function, answer, problem):
    # GPU 0 is one that tells little of itself, and is none the worse for it.
    silent = {f"{name} 0": {"raise": "NOT_SUPPORTED"} for name in SELDOM_TOLD}
    plant({function: answer} | silent)
    [found] = look(tmp_path)["problems"]
    assert found.startswith("node1 GPU 1: ") and problem in found


SELDOM_TOLD = [
    "nvmlDeviceGetTotalEccErrors",
    "nvmlDeviceGetRemappedRows",
    "nvmlDeviceGetRetiredPagesPendingStatus",
    "nvmlDeviceGetMaxClockInfo",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetTemperatureThreshold",
    "nvmlDeviceGetMarginTemperature",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetComputeRunningProcesses_v3",
]


def test_fewer_gpus_than_the_job_has_are_named(plant, tmp_path, monkeypatch):
    plant({})
    [problem] = look(tmp_path, gpus=4)["problems"]
    assert "node1: GPUs that NVML sees (2) must be the 4 of --gpus: drain the node" in problem
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-2")  # GPU 2 has fallen off the bus
    problems = look(tmp_path)["problems"]
    assert any("node1 GPU GPU-2: errors of NVML (Invalid Argument) must be" in problem for problem in problems)
    assert any("GPUs that NVML sees (1) must be the 2" in problem for problem in problems)


def test_no_nvml_where_the_job_has_gpus_is_a_problem(plant, tmp_path):
    plant({"nvmlInit": {"raise": "LIBRARY_NOT_FOUND"}})
    [problem] = look(tmp_path)["problems"]
    assert "node1: answers of NVML (exit code 1: " in problem and "NVML Shared Library Not Found) must be " in problem


def test_a_node_on_which_nvml_hangs_answers(plant, tmp_path):
    plant({"nvmlDeviceGetName 1": {"hang": True}})
    [problem] = look(tmp_path, limit=10)["problems"]
    assert "node1: answers of NVML about GPU 1 (no answer within 10 seconds) must be" in problem


def test_a_job_on_cpus_asks_nothing_about_gpus(plant, tmp_path):
    plant({"nvmlInit": {"raise": "LIBRARY_NOT_FOUND"}})
    facts = look(tmp_path, gpus=0)
    assert facts["problems"] == [] and "driver" not in facts and "device" not in facts


def test_a_full_disk_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    monkeypatch.setattr(preflight, "RUN_DISK", 1e9)
    [problem] = look(tmp_path, gpus=0)["problems"]
    assert "node1: free GiB on the file system of the run (" in problem and "must be at least" in problem


def test_a_healthy_node_has_no_problem_and_tells_what_it_measured(plant, tmp_path):
    plant({"nvmlDeviceGetNvLinkState": {"raise": "NOT_SUPPORTED"}})  # no NVLinks on any of its GPUs
    facts = look(tmp_path)
    assert facts["problems"] == []
    assert [gpu["loaded_clock_share"] for gpu in facts["gpus"]] == [0.89, 0.89]
    assert facts["gemm_tflops"].keys() == {"0", "1"} and min(facts["gemm_tflops"].values()) > 0
    assert facts["all_reduce_gb_per_second"] > 0


def test_a_probe_that_dies_names_its_gpu(plant, tmp_path):
    plant({"nvmlDeviceGetPowerUsage 1": {"die": 9}})  # asked under load only
    [problem] = look(tmp_path)["problems"]
    assert "node1: GEMM of GPU 1 (exit code 1: process 1 ended with exit code -9) must be" in problem


def test_what_is_seen_under_load_is_judged():
    gpu = {
        "gpu": "5",
        "model": "H100",
        "loaded_errors": ["GPU is lost"],
        "loaded_slowdowns": ["power brake (power supply)"],
        "loaded_clock_share": 0.4,
    }
    facts = {"node": "node1", "gpus": [gpu], "failures": {}, "run_disk_gib": 99, "tmp_disk_gib": 99, "torch_sees": 1}
    lost, brake, clock = preflight.problems(facts, 1)
    assert lost.startswith("node1 GPU 5: errors of NVML under load (GPU is lost) must be none")
    assert brake.startswith("node1 GPU 5: ") and "under load (power brake (power supply)) must be" in brake
    assert "SM clock under load as a share of its maximum (0.4) must be at least 0.5: release locked clocks" in clock
    [fewer] = preflight.problems(facts | {"gpus": [{"model": "H100"}] * 2}, 2)
    assert fewer.startswith("node1: GPUs that torch sees (1) must be the 2 of --gpus")


def answers(folder, changed, start=10.0):
    """The files of four nodes, started `start` seconds ago; `changed` says by node what is different."""
    now = time.time()
    (folder / "started").write_text(str(now - start))
    for node in NODES:
        facts = HEALTHY | {"node": node, "clock": [now - start + 1, now - 1]} | changed.get(node, {})
        (folder / f"{node}.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "fact, value, reason",
    [
        ("driver", "570.1", "node3: NVIDIA driver (570.1) must be 580.95.05 as on 3 of 4 nodes: install one driver"),
        ("model", "NVIDIA H200", "node3: model of its GPUs (NVIDIA H200) must be NVIDIA H100 80GB HBM3 as on 3 of 4 nodes: ask for"),
        ("nvlinks", 0, "node3: active NVLinks of a GPU (0) must be 18 as on 3 of 4 nodes: start nvidia-fabricmanager"),
        ("device", "cpu", "node3: device that torch finds (cpu) must be cuda as on 3 of 4 nodes: see why CUDA"),
        (
            "gemm_tflops",
            {"0": 700, "1": 629},
            "node3 GPU 1: TFLOP/s of its GEMM (629) must be at least 630, 0.9 of the job's median: drain",
        ),
        ("all_reduce_gb_per_second", 319, "node3: GB/s of its all-reduce (319) must be at least 320, 0.8 of"),
        ("problems", ["node3 GPU 1: as it says"], "node3 GPU 1: as it says"),
    ],
)
def test_a_node_that_differs_is_bad(tmp_path, fact, value, reason):
    answers(tmp_path, {"node3": {fact: value}})
    verdict = preflight.judge(tmp_path, NODES, 3)
    assert verdict.good == ["node1", "node2", "node4"] and verdict.spare == []
    [found] = verdict.bad.pop("node3")
    assert found.startswith(reason) and not verdict.bad


@pytest.mark.parametrize("skew, where", [(60, "ahead of"), (-60, "behind")])
def test_a_clock_that_cannot_be_right_is_found(tmp_path, skew, where):
    now = time.time()
    answers(tmp_path, {"node3": {"clock": [now - 9 + skew, now - 1 + skew]}})
    [[node, [reason]]] = preflight.judge(tmp_path, NODES, 3).bad.items()
    # They took 8 of 10 seconds, and so 2 of the 60 may be waiting.
    assert node == "node3" and f"seconds of its clock {where} the median (at least 58." in reason


def test_a_late_node_is_not_accused_of_its_clock(tmp_path):
    now = time.time()
    answers(tmp_path, {"node3": {"clock": [now - 1, now]}, "node4": {"clock": [now - 60, now - 58]}}, start=60)
    assert preflight.judge(tmp_path, NODES, 3).bad == {}


def test_a_node_that_never_answers_is_bad(tmp_path):
    answers(tmp_path, {})
    (tmp_path / "node1.json").unlink()
    (tmp_path / "node4.json").write_text('{"node": "no')
    verdict = preflight.judge(tmp_path, NODES, 3)
    assert verdict.good == ["node2", "node3"]  # as many as there are
    assert verdict.bad.keys() == {"node1", "node4"} and "node1: file of its preflight (none) must be there" in verdict.bad["node1"][0]


def test_the_best_nodes_are_chosen_by_their_slowest_gpu_and_the_rest_are_spares(tmp_path):
    slowest = {"node1": 690.0, "node2": 700.0, "node3": 660.0, "node4": 700.0}
    answers(tmp_path, {node: {"gemm_tflops": {"0": 710.0, "1": tflops}} for node, tflops in slowest.items()})
    assert preflight.judge(tmp_path, NODES, 3).as_dict() == {"good": ["node2", "node4", "node1"], "spare": ["node3"], "bad": {}}


def test_without_a_majority_nobody_differs(tmp_path):
    answers(tmp_path, {node: {"driver": "570.1"} for node in NODES[:2]})
    assert preflight.judge(tmp_path, NODES, 4).bad == {}


def test_the_speeds_of_cpus_are_not_compared(tmp_path):
    answers(tmp_path, {node: {"device": "cpu", "gemm_tflops": {"0": number}} for number, node in enumerate(NODES)})
    assert preflight.judge(tmp_path, NODES, 4).good == NODES


def test_a_planted_fault_excludes_its_node_of_a_slurm_job(slurm, plant, tmp_path):
    variables = plant({"nvmlDeviceGetTotalEccErrors 1 1 0": 7}, node="node3")
    (tmp_path / "started").write_text(str(time.time()))
    subprocess.run(
        ["srun", "--nodes=4", "--ntasks-per-node=1", "--overlap", "--gpus-per-node=2"]
        + [sys.executable, "-m", "slurm.preflight", str(tmp_path), "--gpus", "2"],
        env=os.environ | slurm | variables,
        cwd=ROOT,
        check=True,
    )
    verdict = preflight.judge(tmp_path, NODES, 3)
    assert verdict.good == ["node1", "node2", "node4"] and verdict.spare == []
    [[node, [reason]]] = verdict.bad.items()
    assert node == "node3" and reason.startswith("node3 GPU 1: ") and "errors since the last reset (7) must be 0" in reason
