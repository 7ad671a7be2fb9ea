"""The looks at a node that may hang or die. slurm.preflight runs them as children, each under a time limit.

    python -m slurm.probe health          asks NVML (nvidia-ml-py) for the driver and for the state of each GPU of the job
    python -m slurm.probe speed GPUS      measures a matrix product on each GPU and an all-reduce among them

Their output is JSON, one object a line, each written as soon as it is known: what is missing tells who hung. Where torch finds no
CUDA the same probes run, small, on the CPU, in the place of two of the GPUs.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mujina.nvml import TROUBLE, in_words

# Not every GPU, driver and container tells everything; every other error of NVML is a fault ("GPU is lost").
UNTOLD = ("NotSupported", "FunctionNotFound", "NoPermission", "InvalidArgument", "ArgumentVersionMismatch")

MATRIX = {"cuda": 8192, "cpu": 256}  # rows and columns: large enough for a GPU's full speed, and 400 MB in bf16
MESSAGE = {"cuda": 2**28, "cpu": 2**20}  # bytes of an all-reduce, large enough for the links' full bandwidth
REPEATS, PER_REPEAT = 10, {"cuda": 100, "cpu": 2}  # the median of 10; 100 products take an H100 about 0.2 s, in which NVML is asked


def health() -> None:
    import pynvml as nvml

    nvml.nvmlInit()
    numbers = gpu_numbers(nvml)
    say(driver=nvml.nvmlSystemGetDriverVersion(), numbers=numbers)
    idle_questions = {
        "model": nvml.nvmlDeviceGetName,
        "uuid": nvml.nvmlDeviceGetUUID,
        "ecc_uncorrected": lambda gpu: ecc(nvml, gpu, nvml.NVML_VOLATILE_ECC),
        "ecc_uncorrected_ever": lambda gpu: ecc(nvml, gpu, nvml.NVML_AGGREGATE_ECC),
        "rows_remapped": lambda gpu: sum(nvml.nvmlDeviceGetRemappedRows(gpu)[:2]),
        "rows_pending": lambda gpu: nvml.nvmlDeviceGetRemappedRows(gpu)[2],
        "rows_failed": lambda gpu: nvml.nvmlDeviceGetRemappedRows(gpu)[3],
        "pages_pending": nvml.nvmlDeviceGetRetiredPagesPendingStatus,
        "sm_clock_max_mhz": lambda gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "slowdown_c": lambda gpu: nvml.nvmlDeviceGetTemperatureThreshold(gpu, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
        "margin_c": nvml.nvmlDeviceGetMarginTemperature,  # degrees below the slowdown, of GPUs that no longer tell its temperature
        "memory_used_gib": lambda gpu: round(nvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**30, 2),
        "memory_free_gib": lambda gpu: round(nvml.nvmlDeviceGetMemoryInfo(gpu).free / 2**30, 2),
        "processes": lambda gpu: [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses_v3(gpu)],
        "nvlinks": lambda gpu: nvlinks(nvml, gpu),
    }
    for number in numbers:
        say(gpu=number, **ask(nvml, number, idle_questions | _state_questions(nvml)))


def _state_questions(nvml: Any) -> dict[str, Callable[[Any], Any]]:
    """What is asked at rest, and again under load."""
    return {
        "sm_clock_mhz": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "slowdowns": lambda gpu: in_words(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu), TROUBLE),
        "temperature_c": lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    }


def gpu_numbers(nvml: Any) -> list[str]:
    """The GPUs of the job: what Slurm has written into CUDA_VISIBLE_DEVICES (numbers or UUIDs), or all of the node's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(nvml.nvmlDeviceGetCount())]


def ask(nvml: Any, number: str, questions: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """The answers of one GPU by name, without those that it does not tell; `errors` lists what NVML says of a broken one."""
    untold = tuple(getattr(nvml, f"NVMLError_{name}") for name in UNTOLD)
    try:
        gpu = nvml.nvmlDeviceGetHandleByIndex(int(number)) if number.isdigit() else nvml.nvmlDeviceGetHandleByUUID(number)
    except nvml.NVMLError as error:
        return {"errors": [str(error)]}
    answers: dict[str, Any] = {}
    errors: dict[str, None] = {}
    for name, question in questions.items():
        try:
            answers[name] = question(gpu)
        except untold:
            pass
        except nvml.NVMLError as error:
            errors[str(error)] = None  # a dict, since a lost GPU says the same to every question
    return answers | {"errors": list(errors)}


def ecc(nvml: Any, gpu: Any, since: int) -> int:
    return int(nvml.nvmlDeviceGetTotalEccErrors(gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, since))


def nvlinks(nvml: Any, gpu: Any) -> list[bool]:
    """Whether each link is active; [] on a GPU that has none."""
    links = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            links.append(bool(nvml.nvmlDeviceGetNvLinkState(gpu, link)))
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_InvalidArgument):
            break  # the GPU has no more of them
    return links


def speed(gpus: int) -> None:
    start = time.monotonic()
    import torch

    # Neither the import nor this count (which torch takes from NVML) starts CUDA, so that processes may be forked afterwards: torch, on
    # some file systems the better part of the preflight, is imported once a node.
    count = torch.cuda.device_count()
    device, processes = ("cuda", min(count, gpus)) if count else ("cpu", min(2, gpus))
    say(device=device, processes=processes, torch_sees=count, import_torch_seconds=round(time.monotonic() - start, 2))
    in_processes(processes, gemm, device)
    if processes > 1:
        with tempfile.TemporaryDirectory() as folder:
            in_processes(processes, all_reduce, device, processes, Path(folder) / "store")


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """function(rank, *arguments) in `count` processes; ends this process where one failed."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=function, args=(rank, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for rank, process in enumerate(processes):
        if process.exitcode:
            # With exit code 1 Python has written its error; what dies of a signal says nothing itself.
            sys.exit(1 if process.exitcode == 1 else f"process {rank} ended with exit code {process.exitcode}")


def gemm(rank: int, device: str) -> None:
    """The speed of C = A B in bf16 (on a CPU float32), and the GPU's state while it works."""
    import torch

    synchronize, dtype = _on(rank, device)
    size = MATRIX[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    ask_nvml, seconds, loaded = _asker(rank), [], {}
    for repeat in range(1 + REPEATS):  # the first is for warming up
        synchronize()
        start = time.perf_counter()
        for _ in range(PER_REPEAT[device]):
            a @ b
        if repeat == REPEATS:
            loaded = ask_nvml()
        synchronize()
        seconds.append(time.perf_counter() - start)
    tflops = 2 * size**3 * PER_REPEAT[device] / statistics.median(seconds[1:]) / 1e12
    say(rank=rank, gemm_tflops=float(f"{tflops:.4g}"), loaded=loaded)


def all_reduce(rank: int, device: str, count: int, store: Path) -> None:
    """The bus bandwidth of an all-reduce: bytes / seconds · 2 (n - 1) / n, as nccl-tests has it (doc/PERFORMANCE.md)."""
    import torch
    import torch.distributed as dist

    synchronize, dtype = _on(rank, device)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    message = torch.zeros(MESSAGE[device] // dtype.itemsize, device=device, dtype=dtype)
    seconds = []
    for _ in range(1 + REPEATS):
        synchronize()
        start = time.perf_counter()
        dist.all_reduce(message)
        synchronize()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        bandwidth = MESSAGE[device] / statistics.median(seconds[1:]) * 2 * (count - 1) / count / 1e9
        say(all_reduce_gb_per_second=float(f"{bandwidth:.4g}"))
    dist.destroy_process_group()


def _on(rank: int, device: str) -> tuple[Callable[[], None], Any]:
    """Makes `device` this process's own; how to wait for it, and the dtype that it computes in."""
    import torch

    if device == "cuda":
        torch.cuda.set_device(rank)
        return torch.cuda.synchronize, torch.bfloat16
    torch.set_num_threads(1)
    return lambda: None, torch.float32


def _asker(rank: int) -> Callable[[], dict[str, Any]]:
    import pynvml as nvml

    nvml.nvmlInit()
    number = gpu_numbers(nvml)[rank]
    questions = _state_questions(nvml) | {"power_w": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000}
    return lambda: ask(nvml, number, questions)


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "health":
        health()
    else:
        speed(int(sys.argv[2]))
