#!/usr/bin/env bash
# Raw text → clean documents, the sources shared out over the tasks of an array.    sbatch --array=0-7 slurm/prepare_data.sh DATA.yaml
# A task that was stopped goes on where it stood. Some tasks alone need the number of shares: sbatch --array=3,5 … --share array/8
# For a source that needs more than a node, see `executor: slurm` of DATA.yaml.
#SBATCH --job-name=mujina-prepare
#SBATCH --array=0
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
. "${MUJINA_SLURM:-${SLURM_SUBMIT_DIR:-.}/slurm}/site.sh"
mujina prepare --share array --documents-only "$@"
