"""Starts a training run on this machine: everything is checked first, then torchrun starts the processes.

    python -m megatron_jobs.launch CONFIG.yaml [key=value …] --processes 2             (what `mujina train` calls)

On a cluster the Slurm scripts start `python -m megatron_jobs.train` themselves.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_jobs import config as configuration
from megatron_jobs import data, phases
from user_input import run


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.micro_batch_size=2")] = None,
    processes: Annotated[int, typer.Option(help="how many processes: one a GPU, or a few on a CPU")] = 1,
) -> None:
    """Trains to the end of the last phase; a run that was interrupted goes on where its newest whole checkpoint stands."""
    settings = configuration.load(config, overrides)
    settings.check(processes)
    sources = data.facts(data.open_sources(settings))
    settings = phases.resolve(settings, sources)
    phases.shares(settings, sources)
    num_steps = phases.num_steps(settings.phases)
    if (settings.run / "checkpoints" / f"step-{num_steps:08d}").exists():
        print(f"{settings.run}: all {num_steps} steps are done")
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "megatron_jobs.train", str(config), *(overrides or [])]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    os.execv(sys.executable, command)


if __name__ == "__main__":
    run(main)
