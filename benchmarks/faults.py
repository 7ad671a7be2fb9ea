"""What faults of a cluster cost: a run on a real Slurm is struck again and again, and has to end as if nothing had happened.

    ./quickstart.sh; python -m benchmarks.faults [--count 20] [--seed 1]      (a quarter of an hour on two cores; Debian's slurm-wlm)

The quickstart's dense model trains on two of the four virtual nodes of tests/cluster.py. Faults are drawn at random, a few steps apart,
each kind as often as any other (tests/slurm/faults.py). Losses, ledger and checkpoint are compared with an undisturbed run's, bit by bit.
Three more runs measure what checkpoints cost, and one with a stand-in of NVML what the preflight takes.
"""

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mujina.user_input import command_line
from slurm import history
from tests.cluster import slurm_cluster
from tests.slurm import faults
from tests.slurm.faults import FAULTS, ROOT, Job, Struck, records, submit

DATA = ROOT / "runs/quickstart"
INTERVAL, STEPS_PER_FAULT = 5, 12  # of the run that is struck: steps from checkpoint to checkpoint; enough steps for all faults


def main(
    count: Annotated[int, typer.Option(help="of faults")] = 20,
    seed: Annotated[int, typer.Option(help="of their order and moments")] = 1,
) -> None:
    """Prints the tables of RESULTS.md."""
    with tempfile.TemporaryDirectory(prefix="mujina-") as folder, ExitStack() as stack:
        (sockets := Path(folder) / "slurm").mkdir()
        cluster = stack.enter_context(slurm_cluster(sockets))

        (planted := Path(folder) / "planted.json").write_text("{}")
        nvml = {"PYTHONPATH": str(ROOT / "tests/slurm/nvml"), "NVML_STAND_IN": str(planted)}

        def started(name: str, num_steps: int, *options: str, **train: Any) -> Job:
            config = faults.quickstarts_model(DATA, Path(folder) / name, num_steps, micro_batch_size=4, hang_minutes=0.25, **train)
            return submit(cluster, config, *options, **nvml)

        def completed(*arguments: Any, **train: Any) -> Job:
            job = started(*arguments, **train)
            assert job.wait(1800) == "COMPLETED", job.log()
            return job

        with_nvml = completed("nvml", 8, "--gpus-per-node=2", checkpoint_interval=20)
        cost = {
            "without": completed("without", 100, checkpoint_interval=10_000),
            "synchronous, every 20": completed("synchronous", 100, checkpoint_interval=20, asynchronous_save=False),
            "asynchronous, every 20": completed("asynchronous", 100, checkpoint_interval=20),
        }
        for name, done in cost.items():
            step, stands = _step_seconds(done)
            print(f"a step, checkpoints {name}: {step:.3f} s, of which training stands still for saves {stands / step:.1%}")
        seconds = [_preflight(done) for done in (cost["without"], with_nvml)]
        print("preflight: disks alone {:.1f} s, with 2 GPUs a node (NVML's stand-in) {:.1f} s".format(*seconds), flush=True)

        job = started("struck", STEPS_PER_FAULT * count, checkpoint_interval=INTERVAL)
        struck = faults.soak(job, count, seed)
        Console(width=120).print(_of_faults(struck))
        assert job.wait() == "COMPLETED", job.log()
        undisturbed = completed("undisturbed", STEPS_PER_FAULT * count, checkpoint_interval=INTERVAL)
        differing = faults.differences(job.run, undisturbed.run)
        print(f"{count} faults, {STEPS_PER_FAULT * count} steps; differs from the undisturbed run in: {', '.join(differing) or 'nothing'}")


def _of_faults(struck: list[Struck]) -> Table:
    headings = "fault|times|s to the next attempt|s to a trained step|longest|tokens lost|most"
    table = Table(*headings.split("|"), title="medians, and the highest")
    for kind in FAULTS:
        found = [one for one in struck if one.kind == kind.__name__]
        if found:
            attempts, steps, lost = zip(*((one.seconds_to_attempt, one.seconds_to_step, one.tokens_lost) for one in found), strict=True)
            seconds = [f"{value:.1f}" for value in (statistics.median(attempts), statistics.median(steps), max(steps))]
            table.add_row(kind.__name__, str(len(found)), *seconds, f"{statistics.median(lost):,.0f}", f"{max(lost):,}")
    return table


def _step_seconds(job: Job) -> tuple[float, float]:
    """Mean seconds of a step, saves included, and of these for saves; without the first step, in which much is done once."""
    found = records(job.run)[1:]
    saving = [record.get("checkpoint_seconds", 0.0) for record in found]
    return statistics.mean(record["seconds"] for record in found) + statistics.mean(saving), statistics.mean(saving)


def _preflight(job: Job) -> float:
    return history.attempts(job.run)[-1].extra["preflight_seconds"]


if __name__ == "__main__":
    command_line(main)
