#!/usr/bin/env bash
# Pretrains the dense 8B.    sbatch slurm/pretrain_8b.sh [RUN.yaml] [key=value …]       (or `mujina submit RUN.yaml`, which checks first)
# The job saves and requeues itself before its time is over, and after a crash; starting it again goes on from the newest whole checkpoint.
# Hyperparameters live in the YAML file, site facts in slurm/cluster.env.
#SBATCH --job-name=mujina-8b
#SBATCH --nodes=16
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
train megatron_jobs/configs/tanuki_8b.yaml "$@"
