# Sourced by the pretraining scripts: starts one process a GPU with the command that `mujina train` uses on one machine.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ -f slurm/cluster.env ]]; then . slurm/cluster.env; fi
config=$DEFAULT_CONFIG
if [[ ${1:-} == *.yaml ]]; then config=$1; shift; fi
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
srun --kill-on-bad-exit=1 --wait=60 "${MUJINA_PYTHON:-.venv/bin/python}" -m megatron_jobs.train "$config" "$@"
