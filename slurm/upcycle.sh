#!/usr/bin/env bash
# Dense → mixture of experts.    sbatch slurm/upcycle.sh MIXTURE.yaml DENSE_RUN/checkpoints/latest OUTPUT [--hugging-face] [--no-check]
# Streams matrix by matrix: no GPU. What is written is whole or not there; the same command again passes over what is done.
#SBATCH --job-name=mujina-upcycle
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
. "${MUJINA_SLURM:-${SLURM_SUBMIT_DIR:-.}/slurm}/site.sh"
mujina upcycle "$@"
