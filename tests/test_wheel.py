"""The wheel, installed into an empty folder and used from another one: nothing that the checkout has may be missed."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny
from tests.test_layering import MAY_ENTER, ROOT

ROOMS = {room.partition(".")[0] for room in MAY_ENTER}

DATA = (".sh", ".yaml", ".ftz", ".txt", ".jinja", ".json", ".example", ".typed")

# Runs the script at once, as Slurm does: a copy of it, in the folder from which it was submitted.
SBATCH = """#!/usr/bin/env bash
set -e
echo "$@" >> "$STAND_IN/calls"
for word; do
    case $word in
        --test-only) echo "sbatch: Job 1 to start now" >&2; exit ;;
        --*) shift ;;
        *) break ;;
    esac
done
cp "$1" "$STAND_IN/slurm_script"
shift
export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=1
cd /
bash "$STAND_IN/slurm_script" "$@" > "$STAND_IN/log" 2>&1 || true
echo 1
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SQUEUE = """#!/usr/bin/env bash
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the rooms, because building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / "source" / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    [path] = folder.glob("mujina-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", str(folder), str(wheel))
    return folder


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", arguments[0], "--no-deps", "--no-index", *arguments[1:]]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def mujina(installed: Path, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The installed command in another folder, with stand-ins for Slurm's."""
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("squeue", SQUEUE)):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MUJINA", "SLURM"))}
    environment |= variables | {"PYTHONPATH": str(installed), "PATH": f"{folder}/bin:{os.environ['PATH']}", "STAND_IN": str(folder)}
    command = [sys.executable, str(installed / "bin/mujina"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)


def test_it_holds_the_rooms_and_their_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == ROOMS
    wanted = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in (".py", *DATA)]
    assert {str(path.relative_to(ROOT)) for path in wanted} == names


def test_its_help_needs_no_torch_and_no_checkout(installed, tmp_path):
    shown = mujina(installed, tmp_path, "--help")
    assert shown.returncode == 0 and "  chain  " in shown.stdout, shown
    assert f"  {installed}/slurm" in shown.stdout and (installed / "slurm/chain.yaml").exists()
    loaded = "import sys, mujina.cli; sys.argv[1:] = ['--help']; mujina.cli.main(); print({'torch', 'typer', 'yaml'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", loaded], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True
    )
    assert done.stdout.endswith(b"\nset()\n"), done


def test_it_plans_and_submits_from_another_folder(installed, prepared, tmp_path):
    phases = [phase.model_dump(mode="json") | dict(global_batch_size=128, tokens=3 * 128 * 32) for phase in tiny(prepared, tmp_path).phases]
    config = tiny(prepared, tmp_path / "run", phases=phases[:1], train=dict(micro_batch_size=1))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    planned = mujina(installed, tmp_path, "plan", "run.yaml")
    assert planned.returncode == 0 and "parameters" in planned.stdout, planned
    tried = mujina(installed, tmp_path, "submit", "run.yaml", "--dry-run")
    assert tried.returncode == 0 and "not submitted: --dry-run" in tried.stdout, tried
    assert (tmp_path / "calls").read_text() == f"--test-only --nodes=16 {installed}/slurm/pretrain_8b.sh run.yaml\n"


@pytest.mark.parametrize("site", ["slurm/cluster.env", "site.env"])
def test_a_job_of_a_chain_finds_its_scripts_python_and_site(installed, tmp_path, site):
    (tmp_path / "slurm").mkdir()
    (tmp_path / site).write_text("echo $0 >> $STAND_IN/site; MUJINA_SRUN_OPTIONS=--of-the-site\n")
    cluster_env = {} if site == "slurm/cluster.env" else {"MUJINA_CLUSTER_ENV": site}
    config = {"stations": [{"name": "a", "run": "chain --help"}], "name": "x", "folder": "state"}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(config))
    submitted = mujina(installed, tmp_path, "chain", "chain.yaml", "--slurm", **cluster_env)
    assert submitted.returncode == 0, submitted
    assert "CHAIN.yaml" in (log := (tmp_path / "log").read_text()), log
    assert (tmp_path / "site").read_text().splitlines() == ["bash", str(tmp_path / "slurm_script")]
    seen = mujina(installed, tmp_path, "chain", "chain.yaml", "--slurm")
    assert seen.returncode == 0 and json.loads((tmp_path / "state/summary.json").read_text())["stations"][0]["state"] == "done", seen
