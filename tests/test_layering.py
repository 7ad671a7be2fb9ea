"""The rooms of the project, who may enter which, and that nothing runs in a circle: read from the imports, those inside functions too."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# A room is a folder, or a file of the trainer's door; behind it stands what it may enter. What nobody makes use of is taken out.
MAY_ENTER = {
    "mujina": "",
    "tokenization": "mujina",
    "data_prep": "mujina tokenization",
    "moe": "mujina",
    "megatron_jobs.config": "mujina tokenization data_prep",
    "megatron_jobs.ranks": "mujina",
    "megatron_jobs.failures": "mujina",
    "megatron_jobs.stability": "mujina megatron_jobs.config",
    "megatron_jobs.data": "mujina tokenization data_prep megatron_jobs.config",
    "megatron_jobs.conversion.families": "mujina megatron_jobs.config",
    "megatron_jobs.planning": "mujina megatron_jobs.config megatron_jobs.conversion.families megatron_jobs.data",
    "megatron_jobs.checkpoints": "mujina megatron_jobs.config megatron_jobs.ranks megatron_jobs.data",
    "megatron_jobs.losses": "megatron_jobs.config megatron_jobs.data",
    "megatron_jobs.engine": "mujina moe megatron_jobs.config megatron_jobs.ranks megatron_jobs.data megatron_jobs.checkpoints "
    "megatron_jobs.losses megatron_jobs.planning",
    "megatron_jobs.conversion": "mujina tokenization data_prep moe megatron_jobs.config megatron_jobs.conversion.families "
    "megatron_jobs.data megatron_jobs.planning megatron_jobs.checkpoints megatron_jobs.engine",
    "megatron_jobs.monitoring": "mujina moe megatron_jobs.config megatron_jobs.ranks megatron_jobs.data megatron_jobs.planning",
    "megatron_jobs.check": "mujina megatron_jobs.config megatron_jobs.stability megatron_jobs.data megatron_jobs.planning "
    "megatron_jobs.checkpoints megatron_jobs.conversion megatron_jobs.monitoring",
    "megatron_jobs.launch": "mujina megatron_jobs.check megatron_jobs.config megatron_jobs.failures megatron_jobs.stability "
    "megatron_jobs.data megatron_jobs.checkpoints",
    "megatron_jobs.references": "mujina megatron_jobs.config megatron_jobs.ranks megatron_jobs.data",
    "megatron_jobs.train": "mujina megatron_jobs.config megatron_jobs.ranks megatron_jobs.failures megatron_jobs.stability "
    "megatron_jobs.references "
    "megatron_jobs.data megatron_jobs.planning megatron_jobs.checkpoints megatron_jobs.engine megatron_jobs.conversion "
    "megatron_jobs.conversion.families megatron_jobs.monitoring",
    "evaluation": "mujina",
    "slurm": "mujina megatron_jobs.check megatron_jobs.config megatron_jobs.conversion.families megatron_jobs.failures megatron_jobs.data "
    "megatron_jobs.planning",
}
MAY_IMPORT_MEGATRON_CORE = {"megatron_jobs.engine", "moe"}
# Rooms and modules that need no torch to be imported; those of the verbs are added to them.
NEED_NO_TORCH = [
    *("tokenization", "data_prep", "slurm", "megatron_jobs.config", "megatron_jobs.failures", "megatron_jobs.check"),
    *(
        "megatron_jobs.launch",
        "megatron_jobs.stability",
        "megatron_jobs.data",
        "megatron_jobs.planning",
        "megatron_jobs.conversion.families",
    ),
]
HEAVY = {"torch", "megatron", "transformers", "httptools"}


class Import(NamedTuple):
    name: str
    at_once: bool  # with the module, and not inside a function or for types alone


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the rooms."""
    found = {}
    for top in {room.split(".")[0] for room in MAY_ENTER}:
        for path in (ROOT / top).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports_of(tree: ast.AST, at_once: bool = True) -> Iterator[Import]:
    """Every import below a node; of `from folder import name` the name is the module where it is one, else the folder."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield Import(inside if inside in modules() else node.module, at_once)
        else:
            is_later = isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            yield from imports_of(node, at_once and not is_later)


@functools.cache
def imported_by(module: str) -> frozenset[Import]:
    return frozenset(imports_of(ast.parse(modules()[module].read_text())))


def room_of(module: str) -> str | None:
    return next((room for room in MAY_ENTER if f"{module}.".startswith(f"{room}.")), None)


def entered_by(room: str) -> set[str]:
    inside = [module for module in modules() if room_of(module) == room]
    return {other for module in inside for name, _ in imported_by(module) if (other := room_of(name)) not in (room, None)}


def built() -> list[str]:
    return [room for room in MAY_ENTER if any(room_of(module) == room for module in modules())]


def test_every_module_is_in_a_room():
    assert {module for module in modules() if room_of(module) is None} == {"megatron_jobs"}  # whose __init__.py imports nothing
    assert not imported_by("megatron_jobs")


@pytest.mark.parametrize("room", MAY_ENTER)
def test_a_room_enters_those_rooms_that_it_may(room):
    may, entered = set(MAY_ENTER[room].split()), entered_by(room)
    assert may <= set(MAY_ENTER)
    where = {
        f"{module} imports {name}"
        for module in modules()
        if room_of(module) == room
        for name, _ in imported_by(module)
        if room_of(name) not in (room, None, *may)
    }
    assert not where
    unused = may.intersection(built()) - entered
    assert room not in built() or not unused, f"nobody in {room} enters {unused}: take it out of the table"


def test_rooms_stand_on_floors():
    """No room is above another that is above it; and the lower ones are those of the house plan."""
    floor: dict[str, int] = {}
    for room in graphlib.TopologicalSorter({room: may.split() for room, may in MAY_ENTER.items()}).static_order():
        floor[room] = 1 + max((floor[below] for below in MAY_ENTER[room].split()), default=-1)
    of = {room.removeprefix("megatron_jobs."): number for room, number in floor.items()}
    assert of["mujina"] == 0 and of["config"] < of["data"] < of["planning"]
    assert max(of["data"], of["checkpoints"], of["losses"], of["moe"]) < of["engine"] < of["conversion"] < of["train"]


def test_no_circle():
    """Not even one that a function's import, or an import for types, hides."""
    graph = {module: {name for name, _ in imported_by(module) if name in modules() and name != module} for module in modules()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(reversed(error.args[1]))}")


def test_megatron_core_is_imported_where_it_may_be():
    importing = {module for module in modules() if any(re.match(r"megatron(\.|$)", name) for name, _ in imported_by(module))}
    assert {room_of(module) for module in importing} == MAY_IMPORT_MEGATRON_CORE
    names = {name for module in modules() for name, _ in imported_by(module)}
    assert not {name for name in names if name.startswith("megatron.training") or name.split(".")[0] == "apex"}


def heavy_behind(module: str, seen: set[str] | None = None) -> str | None:
    """How a module comes to import torch or its like at once: `a → b → torch`; None where it does not."""
    seen = set() if seen is None else seen
    seen.add(module)
    for name, at_once in sorted(imported_by(module)):
        if at_once and name.split(".")[0] in HEAVY:
            return f"{module} → {name}"
        parts = name.split(".")
        for below in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):  # the folders that it is in are imported, too
            if at_once and below in modules() and below not in seen and (found := heavy_behind(below, seen)):
                return f"{module} → {found}"
    return None


def verbs() -> dict[str, str]:
    from mujina.cli import VERBS

    return {verb: module for verb, (module, _) in VERBS.items()}


def test_what_needs_no_gpu_needs_no_torch():
    light = [module for module in modules() for room in NEED_NO_TORCH if f"{module}.".startswith(f"{room}.")] + list(verbs().values())
    assert len(light) > 60
    assert not [found for module in light if (found := heavy_behind(module))]


def test_help_needs_no_torch():
    """Of any verb; a library that imports it counts as well."""
    code = f"""
import contextlib, io, sys
from mujina import cli
for verb in {list(verbs())}:
    sys.argv = ["mujina", verb, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        cli.main()
    assert len(shown.getvalue()) > 200, verb
    assert not {HEAVY} & set(sys.modules), f"mujina {{verb}} --help imports {{ {HEAVY} & set(sys.modules) }}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_package_is_installed():
    """A folder that setup.py forgets works in the checkout and is missing from the wheel."""
    listed = set(re.findall(r'"([a-z_]+)"', re.search(r"ROOMS = \((.*?)\)", (ROOT / "setup.py").read_text())[1]))
    assert listed == {room.split(".")[0] for room in MAY_ENTER}
    for room in listed:
        assert all((path.parent / "__init__.py").exists() for path in (ROOT / room).rglob("*.py")), room
