# Sourced by every script: site facts, and what runs Mujina's commands. Scripts find it by MUJINA_SLURM (mujina/sbatch.py), or in the
# checkout from which they were submitted by hand.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ -n ${MUJINA_CLUSTER_ENV:-} || -f slurm/cluster.env ]]; then . "${MUJINA_CLUSTER_ENV:-slurm/cluster.env}"; fi
python=${MUJINA_PYTHON:-.venv/bin/python}

tell_chain() {
    if [[ -n ${MUJINA_CHAIN_JOBS:-} ]]; then
        echo "$@" >> "$MUJINA_CHAIN_JOBS/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}"
    fi
}
tell_chain began "$EPOCHSECONDS"

# One verb in one process. srun does not take the CPUs of a task from the job by itself.
mujina() {
    local status=0
    srun --ntasks=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} ${MUJINA_SRUN_OPTIONS:-} \
        ${MUJINA_TASK_PYTHON:-$python} -m mujina "$@" || status=$?
    tell_chain ended "$EPOCHSECONDS" "$status"
    return "$status"
}

# train DEFAULT.yaml [RUN.yaml] [key=value …]: the supervisor checks the nodes, starts one process a GPU, and requeues the job when that
# makes sense. In the place of this shell, for Slurm signals this process.
train() {
    if [[ ${2:-} == *.yaml ]]; then shift; fi
    exec "$python" -m slurm.supervisor "$@"
}
