#!/usr/bin/env bash
# Post-trains a model (SFT, DPO, adapters).    sbatch slurm/post_train.sh RUN.yaml [key=value …]
# As pretrain_8b.sh: it saves and requeues itself before its time is over, and after a crash, and goes on from the newest whole checkpoint.
#SBATCH --job-name=mujina-post
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
. "${MUJINA_SLURM:-${SLURM_SUBMIT_DIR:-.}/slurm}/site.sh"
train "$@"
