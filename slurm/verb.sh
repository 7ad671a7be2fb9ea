#!/usr/bin/env bash
# Any verb, as a job of one process.    sbatch slurm/verb.sh VERB …
#SBATCH --job-name=mujina
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
. "${MUJINA_SLURM:-${SLURM_SUBMIT_DIR:-.}/slurm}/site.sh"
mujina "$@"
