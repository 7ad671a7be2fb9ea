"""The rooms of the project and who may enter which, read from the imports."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"tokenization", "data_prep", "moe", "megatron_jobs", "evaluation", "slurm"}
MAY_ENTER = {
    "tokenization": set(),
    "data_prep": {"tokenization"},
    "moe": set(),
    "megatron_jobs": {"data_prep", "tokenization", "moe"},
    "evaluation": {"tokenization"},
    "slurm": {"megatron_jobs"},
}
MEGATRON_CORE_MAY_BE_IN = {"megatron_jobs", "moe"}
NEED_NO_TORCH = ("config", "data", "failures", "flops", "launch", "memory", "order", "phases", "plan", "planner", "stability")
LIGHT = [f"megatron_jobs/{name}.py" for name in NEED_NO_TORCH] + [str(path.relative_to(ROOT)) for path in ROOT.glob("slurm/*.py")]


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


def test_the_leaves_enter_no_room():
    for path in ROOT.glob("*.py"):
        if path.name not in ("setup.py", "mujina.py"):
            assert not {name.split(".")[0] for name in imports_of(path)} & ROOMS, path


@pytest.mark.parametrize("file", LIGHT)
def test_what_needs_no_gpu_needs_no_torch(file):
    heavy = {"torch", "megatron", "transformers"}
    assert not {name.split(".")[0] for name in imports_of(ROOT / file, top_level_only=True)} & heavy


def test_every_package_is_installed():
    """A folder that setup.py forgets works in the checkout and is missing from the wheel."""
    listed = set(re.findall(r'"([a-z_.]+)"', re.search(r"packages=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)[1]))
    there = {str(path.parent.relative_to(ROOT)).replace("/", ".") for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    assert listed == there
