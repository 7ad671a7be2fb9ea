"""Stands in for nvidia-ml-py on a machine without GPUs, with faults that a test plants. Its folder is put on PYTHONPATH.

NVML_STAND_IN names a JSON file: by node ("*": all nodes), by function and, where they matter, by its first arguments, of which the first of
all is the number of the GPU, what is answered in the place of a healthy H100's answer:

    {"*": {"nvmlDeviceGetCount": 8}, "node2": {"nvmlDeviceGetTotalEccErrors 5": 3, "nvmlDeviceGetPowerUsage 7": {"raise": "GPU_IS_LOST"}}}

{"raise": NAME} raises NVML_ERROR_<NAME>, {"hang": true} never answers, {"die": 9} kills the process with that signal. All else (the
constants, the errors, the functions' signatures) is nvidia-ml-py's own.
"""

import importlib.metadata
import importlib.util
import inspect
import json
import os
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

_spec = importlib.util.spec_from_file_location("nvidia_ml_py", importlib.metadata.distribution("nvidia-ml-py").locate_file("pynvml.py"))
_real = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _real  # it looks itself up there
_spec.loader.exec_module(_real)
globals().update({name: value for name, value in vars(_real).items() if not name.startswith("_")})

# A healthy H100 at rest, and what it says while it works.
_ANSWERS = {
    "nvmlInit": None,
    "nvmlSystemGetDriverVersion": "580.95.05",
    "nvmlDeviceGetCount": 2,
    "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
    "nvmlDeviceGetTotalEccErrors": 0,
    "nvmlDeviceGetRemappedRows": [0, 0, 0, 0],
    "nvmlDeviceGetRetiredPagesPendingStatus": {"raise": "NOT_SUPPORTED"},  # since Ampere rows are remapped instead
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetClockInfo": 1755,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x1 | 0x4,  # idle, and at the power cap
    "nvmlDeviceGetTemperature": 34,
    "nvmlDeviceGetTemperatureThreshold": 90,
    "nvmlDeviceGetMarginTemperature": {"raise": "FUNCTION_NOT_FOUND"},  # an older driver
    "nvmlDeviceGetPowerUsage": 71_000,
    "nvmlDeviceGetMemoryInfo": {"total": 80 * 2**30, "used": 600 * 2**20, "free": 79 * 2**30},
    "nvmlDeviceGetComputeRunningProcesses_v3": [],
    "nvmlDeviceGetNvLinkState": 1,
}
_NUM_NVLINKS = 18


def _answer(function, *arguments):
    inspect.signature(getattr(_real, function)).bind(*arguments)
    planted = json.loads(Path(os.environ["NVML_STAND_IN"]).read_text())
    answers = _ANSWERS | planted.get("*", {}) | planted.get(os.environ.get("SLURMD_NODENAME") or socket.gethostname(), {})
    keys = (" ".join([function, *map(str, arguments[:length])]) for length in range(len(arguments), -1, -1))
    answer = answers[next(key for key in keys if key in answers)]
    if not isinstance(answer, dict):
        return [SimpleNamespace(pid=pid) for pid in answer] if function.endswith("Processes_v3") else answer
    if "raise" in answer:
        raise _real.NVMLError(getattr(_real, f"NVML_ERROR_{answer['raise']}"))
    if "hang" in answer:
        time.sleep(3600)
    if "die" in answer:
        os.kill(os.getpid(), answer["die"])
    return SimpleNamespace(**answer)


globals().update({function: partial(_answer, function) for function in _ANSWERS})


def nvmlDeviceGetHandleByIndex(index):
    if index >= _answer("nvmlDeviceGetCount"):
        raise _real.NVMLError(_real.NVML_ERROR_INVALID_ARGUMENT)
    return index


def nvmlDeviceGetHandleByUUID(uuid):
    return nvmlDeviceGetHandleByIndex(int(uuid.removeprefix("GPU-")))


def nvmlDeviceGetUUID(handle):
    return f"GPU-{handle}"


def nvmlDeviceGetNvLinkState(device, link):
    if link >= _NUM_NVLINKS:
        raise _real.NVMLError(_real.NVML_ERROR_INVALID_ARGUMENT)
    return _answer("nvmlDeviceGetNvLinkState", device, link)
