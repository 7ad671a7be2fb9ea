#!/usr/bin/env bash
# Documents → token binaries, the sources shared out over the tasks of an array.    sbatch --array=0-7 slurm/tokenize.sh DATA.yaml
# Documents that slurm/prepare_data.sh has not made yet are made first. Some tasks alone: sbatch --array=3,5 … --share array/8
#SBATCH --job-name=mujina-tokenize
#SBATCH --array=0
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
. "${MUJINA_SLURM:-${SLURM_SUBMIT_DIR:-.}/slurm}/site.sh"
mujina prepare --share array "$@"
