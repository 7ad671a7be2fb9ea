#!/usr/bin/env bash
# Checkpoint → Hugging Face folder, logits compared.    sbatch slurm/convert_to_hf.sh RUN/checkpoints/latest OUTPUT [--no-check]
#SBATCH --job-name=mujina-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
. "${MUJINA_SLURM:-${SLURM_SUBMIT_DIR:-.}/slurm}/site.sh"
mujina convert "$@"
