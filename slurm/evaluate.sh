#!/usr/bin/env bash
# Scores a Hugging Face folder.    sbatch slurm/evaluate.sh HF_FOLDER --prompts held_out.jsonl --output result.json
#SBATCH --job-name=mujina-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
. "${MUJINA_SLURM:-${SLURM_SUBMIT_DIR:-.}/slurm}/site.sh"
mujina evaluate "$@"
