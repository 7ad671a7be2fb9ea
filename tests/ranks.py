"""Runs a function as several real processes over gloo.

The processes are forked from one server that has imported megatron-core already, so that a case costs a second, not fifteen.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["megatron_jobs.train", "megatron_jobs.conversion.agreement", "transformers.models.llama.modeling_llama"])


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in every one of `world_size` processes; what they return, by rank. The first error is raised."""
    results = FORKSERVER.Queue()
    port = _free_port()
    processes = [
        FORKSERVER.Process(target=_rank, args=(rank, world_size, port, results, function, arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        by_rank: dict[int, Any] = {}
        while len(by_rank) < world_size:
            rank, error, value = results.get(timeout=300)
            if error:
                raise AssertionError(f"rank {rank}:\n{error}")
            by_rank[rank] = value
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return [by_rank[rank] for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        results.put((rank, None, function(*arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
