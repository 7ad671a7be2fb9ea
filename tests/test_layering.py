"""The rooms of the project and who may enter which, read from the imports."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"mujina", "tokenization", "data_prep", "moe", "megatron_jobs", "evaluation", "slurm"}
MAY_ENTER = {
    "mujina": set(),
    "tokenization": {"mujina"},
    "data_prep": {"mujina", "tokenization"},
    "moe": {"mujina"},
    "megatron_jobs": {"mujina", "data_prep", "tokenization", "moe"},
    "evaluation": {"mujina", "tokenization"},
    "slurm": {"mujina", "megatron_jobs"},
}
MEGATRON_CORE_MAY_BE_IN = {"megatron_jobs", "moe"}
NEED_NO_TORCH = ("config.py", "failures.py", "launch.py", "stability.py", "data/*.py", "planning/*.py")
LIGHT = [str(path.relative_to(ROOT)) for name in NEED_NO_TORCH for path in (ROOT / "megatron_jobs").glob(name)]
LIGHT += [str(path.relative_to(ROOT)) for path in ROOT.glob("slurm/*.py")]


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_enters_only_the_rooms_it_may(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        imported = imports_of(path)
        entered = {name.split(".")[0] for name in imported} & ROOMS - {room}
        assert entered <= MAY_ENTER[room], f"{path}: {entered - MAY_ENTER[room]}"
        if room not in MEGATRON_CORE_MAY_BE_IN:
            assert not {name for name in imported if name.startswith("megatron.")}, path
        assert not {name for name in imported if name.startswith("megatron.training") or name == "apex"}, path


@pytest.mark.parametrize("file", LIGHT)
def test_what_needs_no_gpu_needs_no_torch(file):
    heavy = {"torch", "megatron", "transformers"}
    assert not {name.split(".")[0] for name in imports_of(ROOT / file, top_level_only=True)} & heavy


def test_every_package_is_installed():
    """A folder that setup.py forgets works in the checkout and is missing from the wheel."""
    listed = set(re.findall(r'"([a-z_]+)"', re.search(r"ROOMS = \((.*?)\)", (ROOT / "setup.py").read_text())[1]))
    assert listed == ROOMS
    for room in ROOMS:
        assert all((path.parent / "__init__.py").exists() for path in (ROOT / room).rglob("*.py")), room
