#!/usr/bin/env bash
# Pairs of a model's own answers.    sbatch slurm/preferences.sh CONFIG.yaml [key=value …]       (called again, it asks nothing twice)
#SBATCH --job-name=mujina-preferences
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
. "${MUJINA_SLURM:-${SLURM_SUBMIT_DIR:-.}/slurm}/site.sh"
mujina preferences "$@"
