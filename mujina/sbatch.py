"""Submits jobs as the site wants them, for `mujina submit` and `mujina chain`, and reads what the jobs of a chain have written.

A job finds by its environment where it belongs, from whatever folder it was submitted:

    MUJINA_SLURM           the folder of the scripts, from which they source site.sh (Slurm runs a copy of the script, somewhere else)
    MUJINA_PYTHON          the Python with Mujina in it: that of cluster.env, else the one that submits
    MUJINA_CLUSTER_ENV     the facts of the site, as the user has set it; without it slurm/cluster.env, where there is one
    MUJINA_CHAIN_JOBS      of a chain's jobs: the folder in which they write JOB_TASK, a line `began SECONDS` at each start, and
                           `ended SECONDS STATUS` at its end; seconds since 1970. No accounting of Slurm's is needed
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mujina.user_input import UserError

SCRIPTS = Path(__file__).parents[1] / "slurm"
SITE = 'site=${MUJINA_CLUSTER_ENV:-slurm/cluster.env}; if [ -n "${MUJINA_CLUSTER_ENV:-}" ] || [ -f "$site" ]; then set -ea; . "$site"; fi; '
# Those of squeue's states in which a job does not come back; whatever else there is counts as being in the queue.
ENDED = set("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split())


def submit(arguments: Sequence[str], **environment: str) -> str:
    """Calls sbatch with these arguments; returns the number of the job. Raises UserError when sbatch refuses."""
    return _sbatch(["--parsable", *arguments], environment).stdout.strip().partition(";")[0]


def test(arguments: Sequence[str]) -> str:
    """When and where the job would start, in the words of sbatch --test-only. Raises UserError when sbatch refuses."""
    return _sbatch(["--test-only", *arguments], {}).stderr.strip()


def is_elsewhere() -> bool:
    """Whether the tasks of a job run in another Python than this one, or in a container, by what the site has set."""
    script = f'{SITE}printf \'%s\\n%s\' "${{MUJINA_TASK_PYTHON:-$MUJINA_PYTHON}}" "${{MUJINA_SRUN_OPTIONS:-}}"'
    known = {"MUJINA_PYTHON": sys.executable} | os.environ
    python, _, options = subprocess.run(["bash", "-c", script], env=known, capture_output=True, text=True).stdout.partition("\n")
    return python != sys.executable or "container" in options


def in_queue() -> set[str]:
    """The numbers of this user's jobs (of an array: its own) that wait, run, or are about to end. Raises UserError without an answer."""
    try:
        done = subprocess.run(["squeue", "--me", "-h", "-r", "-t", "all", "-o", "%F %T"], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("squeue: is not on the PATH: call this on a login node of the cluster") from None
    if done.returncode:
        raise UserError(f"squeue does not answer ({done.stderr.strip()}): try again when Slurm's controller is there")
    return {job for job, state in map(str.split, done.stdout.splitlines()) if state not in ENDED}


def record_end(status: int) -> None:
    """Tells the chain that this job belongs to, if it does, that it has ended; scripts of one verb do so in site.sh."""
    if folder := os.environ.get("MUJINA_CHAIN_JOBS"):
        with (Path(folder) / f"{os.environ['SLURM_JOB_ID']}_0").open("a") as file:
            file.write(f"ended {time.time():.0f} {status}\n")


def ended(folder: Path, job: str, tasks: int) -> tuple[int, float] | None:
    """(the worst status, seconds from the first start to the last end) of a job's tasks; None unless all of them have written their end."""
    paths = [folder / f"{job}_{task}" for task in range(tasks)]
    lines = [path.read_text().split("\n")[:-1] if path.exists() else [] for path in paths]
    if not all(one and one[-1].startswith("ended ") for one in lines):
        return None
    began = min(float(one[0].split()[1]) for one in lines)
    seconds, statuses = zip(*(map(float, one[-1].split()[1:]) for one in lines), strict=True)
    return int(max(statuses)), max(seconds) - began


def _sbatch(arguments: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    known = {"MUJINA_PYTHON": sys.executable} | os.environ | {"MUJINA_SLURM": str(SCRIPTS)} | environment
    done = subprocess.run(["bash", "-c", f'{SITE}exec sbatch "$@"', "bash", *arguments], env=known, capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr or done.stdout).strip()
        raise UserError(f"sbatch refuses: {told}: mend the script's #SBATCH lines, slurm/cluster.env, or the options that you gave")
    return done
