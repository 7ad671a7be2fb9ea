# Sourced by the scripts of one process: site facts, and what runs Mujina's commands.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ -f slurm/cluster.env ]]; then . slurm/cluster.env; fi
# srun does not take the CPUs of a task from the job by itself.
mujina() { srun --ntasks=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} ${MUJINA_SRUN_OPTIONS:-} ${MUJINA_TASK_PYTHON:-${MUJINA_PYTHON:-.venv/bin/python}} -m mujina "$@"; }
