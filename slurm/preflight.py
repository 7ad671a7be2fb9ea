"""Looks a node over before a job trains on it, and judges all nodes of the job by what they found.

    srun --ntasks-per-node=1 --overlap python -m slurm.preflight FOLDER --gpus 8

writes FOLDER/<node>.json on each node: what was measured, and as `problems` what is wrong with the node by itself. judge() reads the
files and adds what only a comparison of nodes shows. What may hang on a broken GPU runs in children with a time limit (slurm/probe.py).
"""

import json
import operator
import os
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

from mujina import disks
from mujina.disks import free_bytes
from mujina.files import write_whole
from mujina.user_input import command_line

TIME_LIMIT = 120.0  # seconds for a look that takes about ten; first contact with a GPU and with torch on a cold file system is slow
THERMAL_MARGIN = 10  # °C below the slowdown, at rest: data center GPUs rest at 30 to 50 °C and slow down at about 90
MEMORY_USED = 2.0  # GiB, before the job has started; the driver itself keeps less than one
CLOCK_SHARE = 0.5  # of the maximum, under load: a hardware slowdown halves the clock at least (NVML), the power cap takes less
RUN_DISK = 5.0  # GiB: logs; what the checkpoints need is asked before the job is submitted
TMP_DISK = 1.0  # GiB: compiled kernels, sockets
CLOCK_SKEW = 2.0  # seconds from the median clock: NTP keeps milliseconds, and the logs of a job are put in order by these clocks
GEMM_SHARE = 0.9  # of the median GPU: equal GPUs under an equal power cap differ by a few per cent, and a step waits for the slowest
ALL_REDUCE_SHARE = 0.8  # of the median node: it varies more than a GEMM, and what is wrong with links costs more

RESET = "drain the node and reset the GPU (nvidia-smi --gpu-reset)"
COOLING = "drain the node and see to its cooling and power supply"
KERNEL_LOG = "drain the node and look for Xid in its kernel's log"


@dataclass(frozen=True)
class Check:
    """A rule about a fact of a GPU. A fact that the GPU does not tell is not checked; one without `holds` has to be 0 or empty."""

    fact: str
    what: str
    remedy: str
    rule: str = "0"
    holds: Callable[[Any], bool] = operator.not_


CHECKS = (
    Check("errors", "errors of NVML", KERNEL_LOG, "none"),
    Check("loaded_errors", "errors of NVML under load", KERNEL_LOG, "none"),
    Check("ecc_uncorrected", "uncorrectable ECC errors since the last reset", RESET),
    Check("rows_pending", "memory rows to be remapped", f"{RESET}, which remaps them"),
    Check("rows_failed", "memory rows that could not be remapped", "drain the node and replace the GPU"),
    Check("pages_pending", "memory pages to be retired", f"{RESET}, which retires them"),
    Check("margin_c", "°C below the thermal slowdown", COOLING, f"at least {THERMAL_MARGIN} at rest", lambda c: c >= THERMAL_MARGIN),
    Check("slowdowns", "clock slowdowns at rest", COOLING, "none"),
    Check("loaded_slowdowns", "clock slowdowns under load", COOLING, "none"),
    Check(
        "loaded_clock_share",
        "SM clock under load as a share of its maximum",
        "release locked clocks (nvidia-smi --reset-gpu-clocks), or drain the node",
        f"at least {CLOCK_SHARE}",
        lambda share: share >= CLOCK_SHARE,
    ),
    Check("processes", "processes that are on it already", "end what an earlier job has left", "none"),
    Check(
        "memory_used_gib",
        "GiB of memory in use already",
        "end what an earlier job has left, or reset the GPU",
        f"at most {MEMORY_USED}",
        lambda used: used <= MEMORY_USED,
    ),
    Check("nvlinks_down", "inactive NVLinks", f"{RESET}, or replace it", "none where other GPUs have more active"),
)
# What must be the same on all nodes.
AGREEMENTS = {
    "driver": ("NVIDIA driver", "install one driver on all nodes"),
    "model": ("model of its GPUs", "ask for nodes of one kind (sbatch --constraint)"),
    "nvlinks": ("active NVLinks of a GPU", "start nvidia-fabricmanager, or drain the node"),
    "device": ("device that torch finds", "see why CUDA does not start there (python -c 'import torch; torch.cuda.init()')"),
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
    facts: dict[str, Any] = {"node": node, "gpus": [], "failures": {}, "run_disk_gib": _free(folder), "tmp_disk_gib": _free("/tmp")}
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
    found = [_sentence(node, what, value, "free of errors", remedy) for what, (value, remedy) in facts["failures"].items()]
    for what, free, least in (
        ("free GiB on the file system of the run", facts["run_disk_gib"], RUN_DISK),
        ("free GiB in /tmp", facts["tmp_disk_gib"], TMP_DISK),
    ):
        if free is not None and free < least:
            found.append(_sentence(node, what, free, f"at least {least}", "remove files there"))
    if num_gpus and not facts["failures"]:
        answering = sum("model" in gpu for gpu in facts["gpus"])
        # Where torch sees none at all it computes on the CPU; judge() knows whether it does so on the other nodes too.
        for who, count in (("NVML", answering), ("torch", facts.get("torch_sees") or num_gpus)):
            if count < num_gpus:
                found.append(_sentence(node, f"GPUs that {who} sees", count, f"the {num_gpus} of --gpus", KERNEL_LOG))
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

    `folder` is a new one for each preflight. Clocks are compared where it holds a file `started` with the time (seconds since 1970)
    before the preflight was started; judge as soon as that has ended.
    """
    answers: dict[str, dict[str, Any]] = {}
    bad: dict[str, list[str]] = {node: [] for node in nodes}
    for node in nodes:
        try:
            answers[node] = json.loads(disks.read(folder / f"{node}.json") or b"")
            bad[node] += answers[node]["problems"]
        except (OSError, ValueError):
            bad[node].append(_sentence(node, "file of its preflight", "none", "there", "see the job's log, and drain the node if it hangs"))
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
        (gemms, "TFLOP/s of its GEMM", GEMM_SHARE, COOLING),
        (all_reduces, "GB/s of its all-reduce", ALL_REDUCE_SHARE, "drain the node and see to its NVLinks and PCIe"),
    ):
        median = statistics.median(speeds.values()) if speeds else 0
        rule = f"at least {share * median:.4g}, {share} of the job's median"
        found += [(node, _sentence(who, what, speed, rule, remedy)) for (node, who), speed in speeds.items() if speed < share * median]
    return found


def _skewed(answers: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Nodes whose clocks cannot be right: they looked at them after `started` and before now, by the clock of the one who asks.

    Whatever the delays, no node is accused falsely; a skew is found where it exceeds the limit by more than the time that the nodes
    waited, to start and for the slowest.
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
            what = f"seconds of its clock {'ahead of' if ahead > behind else 'behind'} the median"
            found.append((node, _sentence(node, what, f"at least {skew:.1f}", f"at most {CLOCK_SKEW}", "start chrony or ntpd there")))
    return found


def _on_gpus(answers: dict[str, Any], fact: str) -> dict[str, Any]:
    """A measurement of each node that made it on GPUs."""
    return {node: answer[fact] for node, answer in answers.items() if answer.get("device") == "cuda" and fact in answer}


def _add_health(facts: dict[str, Any], limit: float) -> None:
    lines, end = _child(limit, "health")
    if end:
        waiting = lines[0]["numbers"][len(lines) - 1 :] if lines else []
        what = "answers of NVML" + (f" about GPU {waiting[0]}" if waiting else "")
        facts["failures"][what] = (end, "drain the node and see whether nvidia-smi answers there")
        return
    facts["driver"], facts["gpus"] = lines[0]["driver"], (gpus := lines[1:])
    facts["model"] = " and ".join(sorted({gpu["model"] for gpu in gpus if "model" in gpu})) or "unknown"
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
        probe = f"GEMM of GPU {', '.join(missing)}" if missing else "all-reduce"
        facts["failures"][probe if "processes" in facts else "import of torch"] = (end, f"see the job's log, {KERNEL_LOG}")


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
        lines = [json.loads(line) for line in output.read().splitlines() if line.startswith(b"{")]  # NCCL_DEBUG writes there, too
        if code == 0:
            return lines, ""
        log = errors.read().decode(errors="replace").strip()
    print(log, file=sys.stderr)
    return lines, f"no answer within {limit:g} seconds" if code is None else f"exit code {code}: {log.rpartition('\n')[2]}"


def _sentence(who: str, what: str, value: Any, rule: str, remedy: str) -> str:
    return f"{who}: {what} ({value}) must be {rule}: {remedy}"


def _free(path: str | Path) -> float | None:
    free = free_bytes(path)
    return None if free is None else round(free / 2**30, 1)


if __name__ == "__main__":
    command_line(main)
