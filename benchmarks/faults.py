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

from slurm import history
from tests.cluster import slurm_cluster
from tests.slurm import faults
from tests.slurm.faults import FAULTS, ROOT, Job, Struck, records, submit
from user_input import run

DATA = ROOT / "runs/quickstart"
INTERVAL = 5  # steps from checkpoint to checkpoint of the run that is struck


def main(
    count: Annotated[int, typer.Option(help="of faults")] = 20,
    seed: Annotated[int, typer.Option(help="of their order and moments")] = 1,
) -> None:
    """Prints the tables of RESULTS.md."""
    with tempfile.TemporaryDirectory(prefix="mujina-") as folder, ExitStack() as stack:
        (sockets := Path(folder) / "slurm").mkdir()
        cluster = stack.enter_context(slurm_cluster(sockets))

        def started(name: str, num_steps: int, *options: str, **train: Any) -> Job:
            config = faults.quickstarts_model(DATA, Path(folder) / name, num_steps, micro_batch_size=4, hang_minutes=0.25, **train)
            return submit(cluster, config, *options, tasks_per_node=1, PYTHONPATH=str(ROOT / "tests/slurm/nvml"))

        def completed(*arguments: Any, **train: Any) -> Job:
            job = started(*arguments, **train)
            assert job.wait(1800) == "COMPLETED", job.log()
            return job

        num_steps = 12 * count
        job = started("struck", num_steps, checkpoint_interval=INTERVAL)
        struck = faults.soak(job, count, seed)
        assert job.wait() == "COMPLETED", job.log()
        undisturbed = completed("undisturbed", num_steps, checkpoint_interval=INTERVAL)
        differing = faults.differences(job.run, undisturbed.run)
        savings = [dict(checkpoint_interval=10_000), dict(asynchronous_save=False), dict()]
        never, synchronous, asynchronous = (
            completed(f"saves-{number}", 100, **(dict(checkpoint_interval=20) | train)) for number, train in enumerate(savings)
        )
        with_nvml = completed("nvml", 8, "--gpus-per-node=8")

        console = Console(width=120)
        console.print(_of_faults(struck))
        console.print(f"{count} faults, {num_steps} steps; differences from the undisturbed run: {', '.join(differing) or 'none'}")
        for name, done in (
            ("without a checkpoint", never),
            ("asynchronous, every 20", asynchronous),
            ("synchronous, every 20", synchronous),
        ):
            step, stands = _step_seconds(done)
            console.print(f"a step, {name}: {step:.3f} s, of which training stands still for saves {stands / step:.1%}")
        console.print(
            f"preflight: disks alone {_preflight(undisturbed):.1f} s, 8 GPUs a node (NVML's stand-in) {_preflight(with_nvml):.1f} s"
        )


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
    run(main)
