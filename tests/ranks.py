"""Runs a function as several real processes over gloo.

The processes are forked from one server that has imported megatron-core already, so that a case costs a second, not fifteen.
"""

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from typing import Any

from megatron_jobs.launch import held_port

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["megatron_jobs.train", "megatron_jobs.conversion.agreement", "transformers.models.llama.modeling_llama"])


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in every one of `world_size` processes; what they return, by rank. The first error is raised."""
    results = FORKSERVER.Queue()
    with held_port() as port:
        processes = start_ranks(world_size, port, _told, results, function, arguments)
        try:
            by_rank: dict[int, Any] = {}
            while len(by_rank) < world_size:
                ended = [rank for rank, process in enumerate(processes) if process.exitcode is not None]
                try:
                    rank, error, value = results.get(timeout=1)
                except queue.Empty:
                    # What a rank has said is in the queue before it ends.
                    assert by_rank.keys() >= set(ended), f"ranks {ended} ended, and not all of them said how"
                    continue
                if error:
                    raise AssertionError(f"rank {rank}:\n{error}")
                by_rank[rank] = value
        finally:
            for process in processes:
                process.join(timeout=10)
                process.kill()
    return [by_rank[rank] for rank in range(world_size)]


def start_ranks(world_size: int, port: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Starts `function(*arguments)` in `world_size` processes that meet at `port` (see `held_port`); returns the processes."""
    processes = [FORKSERVER.Process(target=_rank, args=(rank, world_size, port, function, arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)


def _told(results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    rank = int(os.environ["RANK"])
    try:
        results.put((rank, None, function(*arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
