"""The process groups of a run, and the device of this process."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_jobs.config import ParallelConfig
from megatron_jobs.engine import cpu, cpu_speed
from megatron_jobs.ranks import rank, world_size

_cpu_is_prepared = False


@contextlib.contextmanager
def of_run(parallel: ParallelConfig, seed: int) -> Iterator[None]:
    """The process groups of a run, over all processes that were started together; taken down at the end."""
    if world_size() > 1:
        with _groups(parallel, seed, init_method="env://", rank=rank(), world_size=world_size()):
            yield
    else:
        with alone(parallel, seed):
            yield


@contextlib.contextmanager
def alone(parallel: ParallelConfig | None = None, seed: int = 1) -> Iterator[None]:
    """Process groups of one, also for a command that wants the whole model in this process."""
    with _groups(parallel or ParallelConfig(), seed, store=dist.HashStore(), rank=0, world_size=1):  # type: ignore[attr-defined]
        yield


@contextlib.contextmanager
def _groups(parallel: ParallelConfig, seed: int, **meeting: Any) -> Iterator[None]:
    prepare_device()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, **meeting)
    initialize(parallel)
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def initialize(parallel: ParallelConfig) -> None:
    """Divides the processes into megatron-core's groups."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
    )


def data_parallel() -> tuple[int, int]:
    """The number of this rank among those that read other data, and how many there are."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def prepare_device() -> None:
    """Chooses this process's GPU; where there is none, installs the stand-ins (once) and keeps to its share of the cores."""
    global _cpu_is_prepared
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))
    elif not _cpu_is_prepared:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", world_size())))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
        cpu.install()
        cpu_speed.install()
        _cpu_is_prepared = True


def device_name() -> str:
    """What this process computes on, in a line for the log."""
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads a process"
    import pynvml

    pynvml.nvmlInit()
    return f"{torch.cuda.get_device_name()}, driver {pynvml.nvmlSystemGetDriverVersion()}"
