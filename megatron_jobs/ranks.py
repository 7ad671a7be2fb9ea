"""The processes of a run: who I am, and the small exchanges that need no group but all of them.

Started by torchrun (RANK, WORLD_SIZE), by srun (SLURM_PROCID, SLURM_NTASKS) or by hand (one process).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from mujina import locks


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))


def from_rank_0(value: Any) -> Any:
    """What rank 0 passed in."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gathered(value: Any) -> list[Any]:
    """What every rank passed in, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    dist.barrier()


def any_of(value: bool) -> bool:
    """Whether one of the ranks passed in True."""
    told = torch.tensor(float(value))
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def memory_gib() -> float:
    """The most GPU memory that this process has held; without a GPU, the memory that it holds now."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return used / 2**30


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a run folder (`mujina.locks.hold`). Raises UserError (on rank 0) when another run is in it."""
    if rank() != 0:
        yield
        return
    with locks.hold(folder / ".lock", f"run ({folder})"):
        yield
