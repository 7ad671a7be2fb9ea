"""Writes the pages of docs/ that say what the code says: configuration.md, commands.md and files.md.

    python -m docs.generate [FOLDER]        (default: docs; tests/test_docs.py compares what is there with what this writes)

configuration.md comes from the documentation of the fields, commands.md from each verb's --help, files.md from the docstrings of the
modules that write or read a format.
"""

import ast
import contextlib
import io
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import typer.core

from mujina import explain
from mujina.cli import VERBS

ROOT = Path(__file__).parents[1]
NOTE = "<!-- Written by `python -m docs.generate`: change the code, not this page. -->\n"
READ_BY = {
    "train": "`mujina train`, `plan`, `submit`, `upcycle`",
    "prepare": "`mujina prepare`",
    "tokenizer": "`mujina tokenizer`",
    "extend-vocabulary": "`mujina extend-vocabulary`",
}
FORMATS = {  # the module whose docstring says what is in the files
    "Rows of raw text": "data_prep/row.py",
    "A prepared source": "data_prep/pipeline.py",
    "Token binaries": "data_prep/indexed.py",
    "A tokenizer's folder": "tokenization/train.py",
    "Metrics and events of a run": "megatron_jobs/monitoring/metrics.py",
    "Checkpoints": "megatron_jobs/checkpoints/checkpoint.py",
    "Shared file systems": "mujina/disks.py",
    "The ledger of a checkpoint": "megatron_jobs/data/ledger.py",
    "References of preferences": "megatron_jobs/references.py",
    "Pairs of answers": "data_prep/pairs.py",
    "The names of the matrices": "megatron_jobs/engine/placement.py",
    "Logs of a run": "megatron_jobs/failures.py",
    "Rollbacks": "megatron_jobs/stability.py",
    "A run on the cluster": "slurm/history.py",
    "A node's preflight": "slurm/preflight.py",
    "An imported model": "megatron_jobs/conversion/import_hf.py",
    "An exported model": "megatron_jobs/conversion/convert.py",
    "Adapters for peft": "megatron_jobs/conversion/peft.py",
    "Chains of verbs": "mujina/chain.py",
    "Journals of answers": "mujina/answers/journal.py",
    "Pairs of a model's own answers": "evaluation/preferences/__main__.py",
    "Results of an evaluation": "evaluation/result.py",
    "Prompts of the arithmetic suite": "evaluation/suites/arithmetic.py",
}


def configuration() -> str:
    parts = [
        NOTE,
        "# Configuration\n",
        "YAML; an unknown key is an error that names the nearest known one. `mujina explain FIELD` tells the same on the command line, and",
        "`mujina explain --schema > run.schema.json` writes JSON Schema for editors: put",
        "`# yaml-language-server: $schema=run.schema.json` on top of a file (`--of VERB` chooses another configuration).\n",
        "`extends: other.yaml` (or a list, the later over the earlier) lays a file over others, section by section. What a file includes",
        "is relative to that file; paths of data, runs and models, and paths in overrides (`key=value`), to the working directory.\n",
        "Values are what people mean, in files and in overrides: `no`, `on` and `24:00:00` are texts, `1e-4` is a number, `30e9` and",
        "`30_000` are whole ones; true is not 1, and a text in quotes is no number. A key twice, a number that begins with 0 (`010`),",
        "`.inf` and `.nan` are errors with their line.\n",
    ]
    for verb in explain.CONFIGURATIONS:
        parts.append(f"## {verb}\n\nRead by {READ_BY.get(verb, f'`mujina {verb}`')}.\n")
        for entry in explain.whole(explain.configuration(verb)).everything():
            if entry.sections:
                parts += _section(entry)
    return "\n".join(parts) + "\n"


def _section(entry: explain.Entry) -> Iterator[str]:
    inside = list(entry.inside())
    if entry.names:
        yield f"### {entry.path}\n"
    texts = [entry.documentation, " ".join((entry.sections[0].__doc__ or "").split()) if len(entry.sections) == 1 else ""]
    yield "\n\n".join(dict.fromkeys(map(_plain, filter(None, texts)))) + "\n"
    if fields := [inner for inner in inside if inner.info]:
        yield "| field | type | default | |\n| --- | --- | --- | --- |"
        for field in fields:
            default = "" if field.default is None else f"`{field.default}`"
            yield f"| `{field.names[-1]}` | {_plain(field.type)} | {default} | {_plain(field.documentation)} |"
        yield ""


def _plain(text: str) -> str:
    """Text whose signs Markdown leaves alone; what stands between backquotes stays as it is, but for the borders of cells."""
    parts = text.replace("|", "\\|").split("`")
    plain = [part if number % 2 else re.sub(r"([\[*])", r"\\\1", part).replace("<", "&lt;") for number, part in enumerate(parts)]
    return "`".join(plain)


def commands() -> str:
    parts = [
        NOTE,
        "# Commands\n",
        "`mujina --help` lists the verbs, `mujina VERB --help` explains one.\n",
    ]
    parts += ["| verb | what it does | module |", "| --- | --- | --- |"]
    parts += [f"| [`{verb}`](#{verb}) | {what} | `{module}` |" for verb, (module, what) in VERBS.items()]
    for verb, (module, _) in VERBS.items():
        shown = _help(verb, module)
        parts.append(f"\n## {verb}\n\n{_block(shown)}")
        if listed := re.search(r"^Commands:\n((?: .*\n?)+)", shown, re.MULTILINE):
            for name in re.findall(r"^  (\S+)", listed[1], re.MULTILINE):
                parts.append(f"\n### {verb} {name}\n\n{_block(_help(verb, module, name))}")
    return "\n".join(parts) + "\n"


def _help(verb: str, module: str, *names: str) -> str:
    """What `mujina VERB … --help` prints, without boxes and at one width."""
    before, out = sys.argv, io.StringIO()
    sys.argv = [f"mujina {verb}", *names, "--help"]
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv = before
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines()) + "\n"


def _block(text: str) -> str:
    return f"```text\n{text}```"


def files() -> str:
    parts = [NOTE, "# File formats\n", "What the modules that write and read these files say of them; RUN is a run's folder.\n"]
    for title, path in FORMATS.items():
        docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        assert docstring, path
        parts.append(f"## {title}\n\n`{path}`\n\n{_block(docstring + chr(10))}\n")
    return "\n".join(parts)


PAGES = {"configuration.md": configuration, "commands.md": commands, "files.md": files}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"
    os.environ |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100"}
    typer.core.HAS_RICH = False
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
