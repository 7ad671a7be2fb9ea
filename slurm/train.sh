# Sourced by the pretraining scripts: the supervisor checks the nodes, starts one process a GPU, and requeues the job when that makes sense.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ -f slurm/cluster.env ]]; then . slurm/cluster.env; fi
config=$DEFAULT_CONFIG
if [[ ${1:-} == *.yaml ]]; then config=$1; shift; fi
exec "${MUJINA_PYTHON:-.venv/bin/python}" -m slurm.supervisor "$config" "$@"
