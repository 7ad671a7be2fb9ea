"""What the ranks tell of themselves after each step: the wait for data, who is slow, their memory, and the health of their GPUs.

The health comes from NVML (nvidia-ml-py). NVML and the memory are asked every ten seconds, since each question costs some time; the
exchange between the ranks is one small all-gather a step.
"""

import math
import socket
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_jobs import ranks
from mujina.nvml import TROUBLE, in_words

INTERVAL = 10.0  # seconds between two looks at memory and GPU
# A rank that takes so much longer than its peers for its own part of a step, in the median of so many steps, slows all down.
STRAGGLER_SHARE, STRAGGLER_STEPS = 1.2, 20


@dataclass(frozen=True)
class Vitals:
    """What rank 0 knows of all ranks after a step."""

    fields: dict[str, Any]  # for the step's record; the worst of all ranks in each
    warnings: list[tuple[str, str]]  # what is new since the last look: ("gpu" or "straggler", what people read)


class Watch:
    """This rank's part in it. `pynvml` is the module of that name where there is a GPU, else None."""

    def __init__(self, pynvml: Any = None, uuid: str = "", num_stages: int = 1) -> None:
        self._nvml, self._uuid, self._num_stages = pynvml, uuid, num_stages
        self._hosts: list[str] = []  # of the ranks
        self._seconds: deque[list[float]] = deque(maxlen=STRAGGLER_STEPS)  # of each rank, in the last steps
        self._stragglers: set[int] = set()  # that were told of
        self._asked, self._sample = -math.inf, [math.nan] * 7
        self._errors: dict[int, float] = {}  # uncorrectable ECC errors of each rank when last looked at
        self._troubled: set[int] = set()  # the ranks whose GPUs were slowed down when last looked at

    @classmethod
    def of_this_process(cls, num_stages: int) -> "Watch":
        """`num_stages` of the pipeline: only ranks of one stage have equal work."""
        if not torch.cuda.is_available():
            return cls(num_stages=num_stages)
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"  # the number would be another under CUDA_VISIBLE_DEVICES
        return cls(pynvml, uuid, num_stages)

    def vitals(self, data_seconds: float, compute_seconds: float) -> Vitals:
        """Every rank calls this after a step, with the seconds that it waited for data, and those until its gradients were there (the wait
        for those of other ranks comes behind).

        `gpu` is told when rank 0 has just looked.
        """
        self._hosts = self._hosts or ranks.gathered(socket.gethostname())
        is_new = time.monotonic() - self._asked >= INTERVAL
        if is_new:
            self._asked, self._sample = time.monotonic(), [ranks.memory_gib(), _reserved_gib(), *self._health()]
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        mine = torch.tensor([data_seconds, compute_seconds, *self._sample], dtype=torch.float64, device=device)
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine)
        waits, computed, memory, reserved, *health = torch.stack(rows).cpu().T.tolist()
        warnings = [("straggler", text) for text in self._new_stragglers(computed)]
        fields: dict[str, Any] = {"data_seconds": max(waits), "memory_gib": max(memory)}
        if torch.cuda.is_available():
            fields["memory_reserved_gib"] = max(reserved)
        if not (is_new and self._nvml):
            return Vitals(fields, warnings)
        warnings += [("gpu", text) for text in self._warnings(*health)]
        return Vitals(fields | {"gpu": over_ranks(*health)}, warnings)

    def _new_stragglers(self, computed: list[float]) -> list[str]:
        """A sentence on each rank that has become slow, and on those of other stages that wait for it within their pipeline.

        The ranks of a pipeline stage lie one after the other.
        """
        self._seconds.append(computed)
        if len(self._seconds) < STRAGGLER_STEPS:
            return []
        medians = [statistics.median(of_rank) for of_rank in zip(*self._seconds, strict=True)]
        of_stage = len(medians) // self._num_stages
        slow = {}
        for rank, median in enumerate(medians):
            first = rank // of_stage * of_stage
            peers = statistics.median_low(medians[first : first + of_stage])
            if median > STRAGGLER_SHARE * peers:
                what = f"{median:.3g} s a step until its gradients are there, and its peers {peers:.3g} s"
                slow[rank] = f"rank {rank} on {self._hosts[rank]} is slow: {what}"
        new = slow.keys() - self._stragglers
        self._stragglers = set(slow)
        return [slow[rank] for rank in sorted(new)]

    def _health(self) -> list[float]:
        """Temperature (°C), power (W), SM clock (MHz), reasons for a lower clock (bits), uncorrectable ECC errors since the last reboot."""
        if not self._nvml:
            return [math.nan] * 5
        nvml = self._nvml
        questions = [
            lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
            lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            lambda gpu: nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
            lambda gpu: nvml.nvmlDeviceGetTotalEccErrors(gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        ]
        answers = []
        for question in questions:
            try:
                answers.append(float(question(nvml.nvmlDeviceGetHandleByUUID(self._uuid))))
            except nvml.NVMLError:  # not every GPU and not every container tells everything
                answers.append(math.nan)
        return answers

    def _warnings(
        self, temperatures: list[float], powers: list[float], clocks: list[float], reasons: list[float], errors: list[float]
    ) -> list[str]:
        """What is new since the last look, on every rank."""
        warnings, troubled = [], set()
        for rank, (bits, count) in enumerate(zip(reasons, errors, strict=True)):
            if words := in_words(bits, TROUBLE):
                troubled.add(rank)
                if rank not in self._troubled:
                    what = f"{clocks[rank]:.0f} MHz, {temperatures[rank]:.0f} °C, {powers[rank]:.0f} W"
                    warnings.append(f"the GPU of rank {rank} is slowed down: {', '.join(words)} ({what})")
            if count > self._errors.get(rank, 0):
                warnings.append(f"the GPU of rank {rank} has {count:.0f} uncorrectable ECC errors: drain its node and reset the GPU")
        self._troubled, self._errors = troubled, dict(enumerate(errors))
        return warnings


def over_ranks(
    temperatures: list[float], powers: list[float], clocks: list[float], reasons: list[float], errors: list[float]
) -> dict[str, Any]:
    """The worst of the ranks, and what slows which rank down; what no GPU told is left out."""
    fields: dict[str, Any] = {}
    for name, values, worst in (("hottest_c", temperatures, max), ("power_w", powers, max), ("slowest_mhz", clocks, min)):
        if told := [(value, rank) for rank, value in enumerate(values) if not math.isnan(value)]:
            fields[name], rank = worst(told)
            fields[name.split("_")[0] + "_rank"] = rank
    if counts := [count for count in errors if not math.isnan(count)]:
        fields["ecc_errors"] = int(sum(counts))
    slowed = {str(rank): words for rank, bits in enumerate(reasons) if (words := in_words(bits))}
    return fields | ({"slowed": slowed} if slowed else {})


def _reserved_gib() -> float:
    return torch.cuda.memory_reserved() / 2**30 if torch.cuda.is_available() else math.nan
