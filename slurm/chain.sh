#!/usr/bin/env bash
# The whole way as one chain of jobs: data → dense → upcycle → mixture → Hugging Face. Run it on the login node, not with sbatch.
#
#     slurm/chain.sh DATA.yaml DENSE.yaml MIXTURE.yaml HF_FOLDER
#
# MIXTURE.yaml starts from the checkpoint that upcycling writes: train.init_from: RUN/start/latest, where RUN is its own run folder.
# Each job starts when the one before it has ended well; when one fails, those behind it are cancelled. ARRAY is the number of tasks that
# share the sources (default: 4). SBATCH_OPTIONS goes to every sbatch.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ $# != 4 ]]; then sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
data=$1 dense=$2 mixture=$3 folder=$4
if [[ -f slurm/cluster.env ]]; then set -a; . slurm/cluster.env; set +a; fi
run_of() { "${MUJINA_PYTHON:-.venv/bin/python}" -m slurm.status --run-folder "$1"; }
dense_run=$(run_of "$dense") mixture_run=$(run_of "$mixture")
after=
submit() {
    local job
    job=$(sbatch --parsable ${SBATCH_OPTIONS:-} ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} "$@")
    after=${job%%;*}
    echo "job $after: ${*: -$#}"
}
submit --array=0-$((${ARRAY:-4} - 1)) slurm/prepare_data.sh "$data"
submit --array=0-$((${ARRAY:-4} - 1)) slurm/tokenize.sh "$data"
submit slurm/pretrain_8b.sh "$dense"
submit slurm/upcycle.sh "$mixture" "$dense_run/checkpoints/latest" "$mixture_run/start"
submit slurm/pretrain_8x8b.sh "$mixture"
submit slurm/convert_to_hf.sh "$mixture_run/checkpoints/latest" "$folder"
