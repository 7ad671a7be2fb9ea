"""Checks a run before it waits in the queue, and submits it.    python -m slurm.submit RUN.yaml [key=value …]     (= mujina submit)

Checked are the configuration, the layout on the nodes and its memory (plan), the data and their manifests, the model or checkpoint that
the run begins with, the disk, and what sbatch says (--test-only).
"""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from megatron_jobs import config as configuration
from megatron_jobs.check import check
from megatron_jobs.config import RunConfig
from megatron_jobs.conversion.families import tell_hindrance
from megatron_jobs.data import phases
from megatron_jobs.planning import flops, layers, plan, planner
from megatron_jobs.planning.layers import Layers
from mujina import sbatch
from mujina.checkpoint_folders import steps
from mujina.disks import free_bytes
from mujina.user_input import UserError, command_line, read_text, reading
from slurm import history

BYTES_PER_PARAMETER = 12  # of a checkpoint: float32 weights and two moments


def main(
    config: Annotated[Path, typer.Argument(help="the run's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.micro_batch_size=2")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, max=100_000, help="to train on; default: those of the script")] = None,
    spare: Annotated[
        int, typer.Option(min=0, max=100_000, help="further nodes, of which the slowest or sick ones are left out at each start")
    ] = 0,
    time: Annotated[str | None, typer.Option(help="limit of each job, such as 24:00:00; the run requeues itself")] = None,
    gpu: Annotated[str, typer.Option(help="that the nodes have, for the plan: h100, h200, …")] = "h100",
    script: Annotated[
        Path | None, typer.Option(help="default: Mujina's slurm/pretrain_8x8b.sh with a moe section, else its slurm/pretrain_8b.sh")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, submit nothing")] = False,
) -> None:
    """Checks that the run can be, then submits it with sbatch and tells what will happen."""
    settings = configuration.load(config, overrides)
    script = script or sbatch.SCRIPTS / ("pretrain_8x8b.sh" if settings.moe else "pretrain_8b.sh")
    asked = directives(script)
    with reading(script, "a script whose #SBATCH --nodes, --ntasks-per-node and --gpus-per-node are numbers", "write numbers"):
        nodes = nodes or int(asked.get("nodes", 1))
        processes = nodes * int(asked.get("ntasks-per-node", 1))
        gpus_per_node = int(asked.get("gpus-per-node", "0").rpartition(":")[2])
    settings, _ = check(settings, processes, _layers(gpu) if gpus_per_node else Layers(False))
    if gpus_per_node:
        _check_memory(settings, planner.machine(processes, gpu, gpus_per_node, "transformer-engine"), gpu)
    _check_disk(settings)
    tell_hindrance(settings)

    options = [f"--nodes={nodes + spare}"] + ([f"--time={time}"] if time else [])
    left_out = history.excluded(settings.run)
    options += [f"--exclude={','.join(left_out)}"] if left_out else []
    options += [f"--export=ALL,MUJINA_SPARE_NODES={spare}"] if spare else []
    arguments = [*options, str(script), str(config), *(overrides or [])]
    print(f"test of the scheduler   {sbatch.test(arguments)}")
    _tell(settings, nodes, spare, processes, left_out)
    print(shlex.join(["sbatch", *arguments]))
    if dry_run:
        print("not submitted: --dry-run")
        return
    job = sbatch.submit(arguments)
    history.submitted(settings.run, job)
    print(f"submitted as job {job}: `mujina status {settings.run}`, `mujina logs {settings.run} --follow`")


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH lines of a script: {option: value}. Raises UserError when there is no such file."""
    text = read_text(script, "name another --script, or leave the option out for Mujina's own")
    return {name: value or "" for name, value in re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.MULTILINE)}


def _layers(gpu: str) -> Layers:
    """Of the ranks on nodes with these GPUs. What is installed in another Python than this one, or in a container, is not known."""
    found = flops.gpu(gpu)
    return Layers(None if sbatch.is_elsewhere() else layers.is_installed(), found is None or found.fp8 > found.bf16)


def _check_memory(config: RunConfig, machine: planner.Machine, gpu: str) -> None:
    """Raises UserError when the run does not fit into the GPUs."""
    found = planner.predict(config, machine)
    if not found.fits:
        raise UserError(
            f"parallel: this layout needs {found.memory_gib:.1f} GiB on the fullest GPU, and --gpu ({gpu}) has "
            f"{machine.gpu.memory_gib:.1f}: see `mujina plan` with --gpus {machine.gpus} --gpu {gpu} for those that fit"
        )
    print(f"plan                    {found.memory_gib:.1f} of {machine.gpu.memory_gib:.1f} GiB on the fullest {gpu}, {_days(found)}")


def _days(prediction: planner.Prediction) -> str:
    days = prediction.tokens / prediction.tokens_per_day
    return f"{days:,.1f} days of training" if days >= 1 else f"{24 * days:,.1f} hours of training"


def _check_disk(config: RunConfig) -> None:
    """Raises UserError when the file system of the run has no room for its checkpoints."""
    folder = next(path for path in (config.run, *config.run.absolute().parents) if path.is_dir())
    free = free_bytes(folder)
    parameters, _ = plan.num_parameters(config)
    kept = max(config.train.keep_checkpoints, config.stability.checkpoints_needed(config.train.checkpoint_interval))
    kept += len(config.phases) + 1  # the ends of phases stay, and one is being written
    if config.train.keep_every:
        kept += phases.num_steps(config.phases) // config.train.keep_every
    there = len(steps(config.run / "checkpoints"))
    needed = BYTES_PER_PARAMETER * parameters * max(1, kept - there)
    if free is None:
        print(f"disk                    {kept} checkpoints of {BYTES_PER_PARAMETER * parameters / 1e9:,.1f} GB; {folder} tells no room")
        return
    if free < needed:
        raise UserError(
            f"run ({config.run}): {kept} checkpoints of {BYTES_PER_PARAMETER * parameters / 1e9:,.1f} GB (train.keep_checkpoints, "
            f"train.keep_every, and the end of each phase), {there} of which are there, need {needed / 1e9:,.1f} GB more and {folder} has "
            f"{free / 1e9:,.1f} GB free: make space, keep fewer, or move the run"
        )
    print(f"disk                    {kept} checkpoints of {BYTES_PER_PARAMETER * parameters / 1e9:,.1f} GB, {free / 1e9:,.1f} GB free")


def _tell(config: RunConfig, nodes: int, spare: int, processes: int, left_out: Iterable[str]) -> None:
    step, tokens = history.standing(config.run)
    all_tokens = phases.consumed_tokens(config.phases, phases.num_steps(config.phases))
    start = f"goes on from step {step:,}" if step else "starts"
    print(f"run                     {config.run}: {start}, {tokens:,} of {all_tokens:,} tokens")
    print(f"phases                  {', '.join(f'{phase.name} {phase.num_steps:,} steps' for phase in config.phases)}")
    print(f"rollback                {plan.reach_of_rollbacks(config)}")
    print(f"processes               {processes} on {nodes} nodes" + (f", and {spare} spare" if spare else ""))
    for node in left_out:
        print(f"left out                {node}: {history.excluded(config.run)[node]['reason']}")
    print(
        "when its time is over   saves, requeues itself and goes on; a crash starts again, later each time; a mistake in the run stops it"
    )


if __name__ == "__main__":
    command_line(main)
