"""Looks a node over before a job trains on it, and judges all nodes of the job by what they found.

    srun --ntasks-per-node=1 --overlap python -m slurm.preflight FOLDER --gpus 8

writes FOLDER/<node>.json on each node: what was measured, and as `problems` what is wrong with the node by itself. judge() reads the
files and adds what only a comparison of nodes shows. What may hang on a broken GPU runs in children with a time limit (slurm/probe.py).
"""

import json
import operator
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from files import write_whole
from user_input import run

TIME_LIMIT = 120.0  # seconds for a look that takes about ten; first contact with a GPU and with torch on a cold file system is slow
THERMAL_MARGIN = 10  # °C below the slowdown, at rest: data center GPUs rest at 30 to 50 °C and slow down at about 90
MEMORY_IN_USE = 2.0  # GiB; the driver itself keeps up to about one
CLOCK_SHARE = 0.5  # of the maximum under load; NVML: a hardware slowdown halves the clocks, or worse. The power cap takes less than that
RUN_DISK, TEMPORARY_DISK = (
    5.0,
    1.0,
)  # GiB: room for logs and for compiled kernels (what checkpoints need is asked before the job is submitted)
CLOCK_SKEW = 2.0  # seconds from the median clock: NTP keeps milliseconds, and logs are put in order by these clocks
GEMM_SHARE = 0.9  # of the median GPU: equal GPUs under an equal power cap differ by a few per cent, and a step waits for the slowest
ALL_REDUCE_SHARE = 0.8  # of the median node: one link of 18 lost shows less than that, a fall back to PCIe takes nine tenths

RESET = "drain the node and reset the GPU (nvidia-smi --gpu-reset)"


@dataclass(frozen=True)
class Check:
    """A rule about one fact of a GPU; a fact that the GPU does not tell is not checked."""

    fact: str
    what: str
    holds: Callable[[Any], bool]
    rule: str
    remedy: str


CHECKS = (
    Check("errors", "NVML's answer", operator.not_, "without an error", "drain the node, look for Xid in its kernel's log, and reboot it"),
    Check("ecc_uncorrected", "the number of uncorrectable ECC errors since the last reset", operator.not_, "0", RESET),
    Check("rows_pending", "the flag of memory rows that wait to be remapped", operator.not_, "0", f"{RESET}, which remaps them"),
    Check("rows_failed", "the flag of memory rows that could not be remapped", operator.not_, "0", "drain the node and replace the GPU"),
    Check("pages_pending", "the flag of memory pages that wait to be retired", operator.not_, "0", f"{RESET}, which retires them"),
    Check(
        "margin_c",
        "the distance to the temperature that slows it down (°C)",
        lambda degrees: degrees >= THERMAL_MARGIN,
        f"at least {THERMAL_MARGIN} at rest",
        "drain the node and see to its cooling",
    ),
    Check("slowdowns", "the cause of a lower clock", operator.not_, "none", "drain the node and see to its cooling and power supply"),
    Check(
        "loaded_slowdowns",
        "the cause of a lower clock under load",
        operator.not_,
        "none",
        "drain the node and see to its cooling and power",
    ),
    Check(
        "loaded_clock_share",
        "the share of the maximal SM clock under load",
        lambda share: share >= CLOCK_SHARE,
        f"at least {CLOCK_SHARE}",
        "release locked clocks (nvidia-smi --reset-gpu-clocks), or drain the node",
    ),
    Check(
        "memory_used_gib",
        "the memory in use (GiB)",
        lambda used: used <= MEMORY_IN_USE,
        f"at most {MEMORY_IN_USE}",
        "end the processes that an earlier job left (nvidia-smi shows them), or reset the GPU",
    ),
    Check("nvlinks_down", "the list of inactive NVLinks", operator.not_, "empty where others have more", f"{RESET}, or replace it"),
)
# What must be the same on all nodes.
AGREEMENTS = {
    "driver": ("the NVIDIA driver", "install one driver on all nodes"),
    "model": ("the model of its GPUs", "ask for nodes of one kind (sbatch --constraint)"),
    "nvlinks": ("the number of active NVLinks a GPU", "start nvidia-fabricmanager, or drain the node"),
    "device": ("the device that torch finds", "see why CUDA does not start there: python -c 'import torch; torch.cuda.init()'"),
}


def main(
    folder: Annotated[Path, typer.Argument(help="where <node>.json is written; all nodes see it")],
    gpus: Annotated[int, typer.Option(help="GPUs that the job has on each node; 0: a job on CPUs")] = 0,
    limit: Annotated[float, typer.Option(help="seconds for each of the two looks at the GPUs")] = TIME_LIMIT,
) -> None:
    """Measures this node and writes FOLDER/<node>.json, whole or not at all."""
    start, clock = time.monotonic(), time.time()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"node": node, "gpus": [], "failures": {}, "run_disk_gib": _free(folder), "temporary_disk_gib": _free("/tmp")}
    if gpus:
        _add_health(facts, limit)
    if gpus and not problems(facts, gpus):  # a broken GPU is not worth the wait for a probe that hangs on it
        _add_speed(facts, limit, gpus)
    seconds = round(time.monotonic() - start, 2)
    facts |= {"problems": problems(facts, gpus), "clock": [clock, time.time()], "seconds": seconds}
    write_whole(folder / f"{node}.json", json.dumps(facts, indent=1).encode())


def problems(facts: dict[str, Any], num_gpus: int) -> list[str]:
    """What is wrong with a node by itself: sentences with node, GPU, value, rule and remedy."""
    node = facts["node"]
    found = [_sentence(node, what, value, "without error", remedy) for what, (value, remedy) in facts["failures"].items()]
    for fact, what, least in (
        ("run_disk_gib", "the free space on the file system of the run (GiB)", RUN_DISK),
        ("temporary_disk_gib", "the free space in /tmp (GiB)", TEMPORARY_DISK),
    ):
        if facts[fact] < least:
            found.append(_sentence(node, what, facts[fact], f"at least {least}", "remove files there"))
    if num_gpus and not facts["failures"]:
        answering = sum("model" in gpu for gpu in facts["gpus"])
        # Where torch sees none at all it runs on the CPU; judge() knows whether it does so on the other nodes too.
        for who, count in (("NVML", answering), ("torch", facts.get("torch_sees") or num_gpus)):
            if count < num_gpus:
                remedy = "drain the node and look for Xid in its kernel's log"
                found.append(_sentence(node, f"the number of GPUs that {who} sees", count, f"{num_gpus} (--gpus)", remedy))
    for gpu in facts["gpus"]:
        for check in CHECKS:
            value = gpu.get(check.fact)
            if value is not None and not check.holds(value):
                shown = ", ".join(map(str, value)) if isinstance(value, list) else value
                found.append(_sentence(f"{node} GPU {gpu['gpu']}", check.what, shown, check.rule, check.remedy))
    return found


@dataclass(frozen=True)
class Verdict:
    """Nodes by name: the best, those that may stand in for them, and the unfit with the reasons, one sentence each."""

    good: list[str]
    spare: list[str]
    bad: dict[str, list[str]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(folder: Path, nodes: list[str], needed: int) -> Verdict:
    """Chooses `needed` nodes (fewer where fewer are healthy) by the files in `folder`, those whose slowest GPU is fastest first.

    Clocks are compared where `folder` holds `started`, with the time (seconds since 1970) at which the preflight was started; call this
    as soon as it has ended.
    """
    answers, bad = {}, {node: [] for node in nodes}
    for node in nodes:
        try:
            answers[node] = json.loads((folder / f"{node}.json").read_bytes())
            bad[node] += answers[node]["problems"]
        except (OSError, ValueError):
            bad[node].append(
                _sentence(node, "its preflight", "no answer", "a file of its own", "see the job's log, and drain the node if it hangs")
            )
    for reasons in (_disagreements(answers), _slow(answers), _skewed(answers, folder)):
        for node, sentence in reasons:
            bad[node].append(sentence)
    slowest_gpu = {node: min(speeds.values()) for node, speeds in _on_gpus(answers, "gemm_tflops").items() if speeds}
    healthy = sorted((node for node in nodes if not bad[node]), key=lambda node: -slowest_gpu.get(node, 0))
    return Verdict(healthy[:needed], healthy[needed:], {node: reasons for node, reasons in bad.items() if reasons})


def _disagreements(answers: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for fact, (what, remedy) in AGREEMENTS.items():
        told = {node: answer[fact] for node, answer in answers.items() if fact in answer}
        usual, count = Counter(told.values()).most_common(1)[0] if told else (None, 0)
        if 2 * count > len(told):  # without a majority nobody can say who is wrong
            rule = f"{usual} as on {count} of {len(told)} nodes"
            found += [(node, _sentence(node, what, value, rule, remedy)) for node, value in told.items() if value != usual]
    return found


def _slow(answers: dict[str, Any]) -> list[tuple[str, str]]:
    """GPUs and nodes well below the median. CPUs are not compared: what else runs on them is felt more than what they are."""
    gemms = {
        (node, f"{node} GPU {gpu}"): tflops for node, speeds in _on_gpus(answers, "gemm_tflops").items() for gpu, tflops in speeds.items()
    }
    all_reduces = {(node, node): bandwidth for node, bandwidth in _on_gpus(answers, "all_reduce_gb_per_second").items()}
    found = []
    for speeds, what, share, remedy in (
        (gemms, "its GEMM (TFLOP/s)", GEMM_SHARE, "drain the node and see to its cooling and power supply"),
        (all_reduces, "the bus bandwidth of its all-reduce (GB/s)", ALL_REDUCE_SHARE, "drain the node and see to its NVLinks and PCIe"),
    ):
        median = statistics.median(speeds.values()) if speeds else 0
        rule = f"at least {share * median:.4g}, {share} of the job's median"
        found += [(node, _sentence(who, what, speed, rule, remedy)) for (node, who), speed in speeds.items() if speed < share * median]
    return found


def _skewed(answers: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Nodes whose clocks cannot be right, whatever the delays: by the caller's clock all looked at theirs between `started` and now.

    So no node is accused falsely, and a skew is found that is larger than the limit and the time that the node waited for others.
    """
    if not answers or not (folder / "started").exists():
        return []
    elapsed = time.time() - float((folder / "started").read_text())
    starts, ends = ({node: answer["clock"][index] for node, answer in answers.items()} for index in (0, 1))
    first, last = statistics.median(starts.values()), statistics.median(ends.values())
    found = []
    for node in answers:
        ahead, behind = ends[node] - first - elapsed, last - starts[node] - elapsed
        if (skew := max(ahead, behind)) > CLOCK_SKEW:
            what = f"its clock's distance {'ahead of' if ahead > behind else 'behind'} the median (seconds)"
            found.append((node, _sentence(node, what, f"at least {skew:.1f}", f"at most {CLOCK_SKEW}", "start chrony or ntpd there")))
    return found


def _on_gpus(answers: dict[str, Any], fact: str) -> dict[str, Any]:
    """A measurement of each node that made it on GPUs."""
    return {node: answer[fact] for node, answer in answers.items() if answer.get("device") == "cuda" and fact in answer}


def _add_health(facts: dict[str, Any], limit: float) -> None:
    lines, end = _child(limit, "health")
    if end:
        facts["failures"]["the answer of NVML"] = (end, "drain the node and see whether nvidia-smi answers there")
        return
    facts["driver"], facts["gpus"] = lines[0]["driver"], (gpus := lines[1:])
    facts["model"] = " and ".join(sorted({gpu["model"] for gpu in gpus if "model" in gpu}))
    facts["nvlinks"] = most = max((sum(gpu.get("nvlinks", [])) for gpu in gpus), default=0)
    for gpu in gpus:
        if "margin_c" not in gpu and {"slowdown_c", "temperature_c"} <= gpu.keys():
            gpu["margin_c"] = gpu["slowdown_c"] - gpu["temperature_c"]
        links = gpu.get("nvlinks", [])
        gpu["nvlinks_down"] = [link for link, active in enumerate(links) if not active] if sum(links) < most else []


def _add_speed(facts: dict[str, Any], limit: float, num_gpus: int) -> None:
    lines, end = _child(limit, "speed", str(num_gpus))
    ranks = {line["rank"]: line for line in lines if "rank" in line}
    for line in lines:
        facts |= {} if "rank" in line else line
    names = [gpu["gpu"] for gpu in facts["gpus"]]
    facts["gemm_tflops"] = {names[rank]: line["gemm_tflops"] for rank, line in ranks.items()}
    for rank, gpu in enumerate(facts["gpus"]):
        gpu |= {f"loaded_{name}": value for name, value in ranks.get(rank, {}).get("loaded", {}).items()}
        if {"loaded_sm_clock_mhz", "sm_clock_max_mhz"} <= gpu.keys():
            gpu["loaded_clock_share"] = round(gpu["loaded_sm_clock_mhz"] / gpu["sm_clock_max_mhz"], 2)
    if end:
        missing = [names[rank] for rank in range(facts.get("processes", 0)) if rank not in ranks]
        probe = f"the end of the GEMM probe of GPU {', '.join(missing)}" if missing else "the end of the all-reduce probe"
        remedy = "see the job's log and the kernel's (Xid), and drain the node"
        facts["failures"][probe if "processes" in facts else "the start of torch"] = (end, remedy)


def _child(limit: float, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """The lines of a look, and how it failed ("" where it did not)."""
    environment = os.environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # the order of NVML's numbers
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "slurm.probe", *arguments], stdout=output, stderr=errors, env=environment, process_group=0
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and not waited for: what hangs in the driver does not die
        output.seek(0), errors.seek(0)
        lines = [json.loads(line) for line in output.read().splitlines()]
        if code == 0:
            return lines, ""
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    return lines, f"no answer within {limit:.0f} seconds" if code is None else f"exit code {code}: {''.join(last)}"


def _sentence(who: str, what: str, value: Any, rule: str, remedy: str) -> str:
    return f"{who}: {what} is {value}, must be {rule}: {remedy}"


def _free(path: str | Path) -> float:
    return round(shutil.disk_usage(path).free / 2**30, 1)


if __name__ == "__main__":
    run(main)
