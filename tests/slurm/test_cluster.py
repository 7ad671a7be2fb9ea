"""The Slurm that the tests bring along behaves like one."""

import os
import subprocess

from tests.cluster import NODES, wait_for_job

pytest_plugins = ["tests.cluster"]


def sbatch(slurm, folder, script, *options):
    command = ["sbatch", "--parsable", f"--chdir={folder}", f"--output={folder}/%A-%a.log", *options]
    return subprocess.run(command, input=f"#!/bin/bash\n{script}", env=os.environ | slurm, text=True, stdout=-1, check=True).stdout.strip()


def test_an_array_runs_before_the_job_that_depends_on_it(slurm, tmp_path):
    script = "sleep 0.5; echo $(hostname) $CUDA_VISIBLE_DEVICES > $SLURM_ARRAY_TASK_ID"
    array = sbatch(slurm, tmp_path, script, "--array=0-3", "--gpus-per-node=8")
    after = sbatch(slurm, tmp_path, "cat 0 1 2 3 > all && getent hosts node1 node4", f"--dependency=afterok:{array}")
    assert wait_for_job(slurm, after) == ["COMPLETED"]
    assert wait_for_job(slurm, array) == ["COMPLETED"] * 4
    assert sorted((tmp_path / "all").read_text().splitlines()) == [f"{node} 0,1,2,3,4,5,6,7" for node in NODES]
