"""What README.md, CONTRIBUTING.md and docs/ say is there: pages that are written by the program, paths, functions, links and verbs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mujina.cli import VERBS

ROOT = Path(__file__).parents[1]
GENERATED = ("configuration.md", "commands.md", "files.md")
WRITTEN = [path for path in (ROOT / "docs").glob("*.md") if path.name not in GENERATED]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]
TOP = {path.name for path in ROOT.iterdir()} - {"runs", "build"}  # `runs/…` in an example is what a command will write
COPIES = {"slurm/cluster.env"}  # that the reader makes


def test_the_reference_is_what_the_program_says(tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", "-m", "docs.generate", str(tmp_path)], cwd=ROOT, check=True, timeout=600)
    for name in GENERATED:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), f"docs/{name} is old: python -m docs.generate"
    shown = (tmp_path / "commands.md").read_text()
    assert [verb for verb in VERBS if f"Usage: mujina {verb} [OPTIONS]" not in shown] == []


def test_the_site_is_built_and_loads_nothing(tmp_path):
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(mkdocs, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert {"index.html", "configuration.html", "cluster.html"} <= {page.name for page in pages}
    for page in pages:
        assert not re.findall(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(?:\w+:)?//[^"]*"', page.read_text()), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name}: link to {target}"
    inline = re.findall(r"`([^`\n]+)`", text)
    for path in {word.rstrip("/") for word in inline if re.fullmatch(r"[\w./-]+", word) and word.split("/")[0] in TOP}:
        assert path in COPIES or (ROOT / path).exists(), f"{page.name}: {path}"
    for file, name in [word.split(":") for word in inline if re.fullmatch(r"[\w/]+\.py:[\w.]+", word)]:
        assert name in _names(ROOT / file), f"{page.name}: {file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_verbs(page):
    for verb in re.findall(r"^ {4}mujina ([a-z][\w-]*)|`mujina ([a-z][\w-]*)|; mujina ([a-z][\w-]*)", page.read_text(), re.MULTILINE):
        assert "".join(verb) in VERBS, f"{page.name}: mujina {''.join(verb)}"


def test_the_readme_has_all_verbs_and_is_short():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"`mujina ([a-z][\w-]*)", text)) == set(VERBS)
    assert len(text.splitlines()) <= 180


def _names(path: Path) -> set[str]:
    """Functions, classes, methods (Class.method) and constants of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names
