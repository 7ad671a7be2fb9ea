"""Checkpoints that know nothing of the layout they were saved at.

    checkpoints/step-00000200/checkpoint.json        step, tokens, configuration, shapes, and size and SHA-256 of every other file
                              ledger.json            what has been consumed of each source, by phase
                              rank-00000.safetensors rectangles of the named matrices of `layout.py`, for each of STATES
    checkpoints/latest                               a link to the newest whole one

Each rank writes only the rectangles that it owns (the distributed optimizer gives every element one owner), and reads only
those that meet what it needs: no rank ever holds the model, and TP, PP, EP and DP may differ between save and load.
A checkpoint is written under a temporary name and renamed when all its files are on the disk. Nothing is unpickled.
"""

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from files import sha256_of
from megatron_jobs import config as configuration
from megatron_jobs.config import RunConfig
from megatron_jobs.weights import Box
from user_input import UserError

STATES = ("master", "exp_avg", "exp_avg_sq")  # float32 weights, and AdamW's two moments
FORMAT = 1


class Checkpoint:
    """A whole checkpoint folder, as a source of named matrices (`layout.TensorSource`). Needs no process group."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError when the folder is not a whole checkpoint; `verify` looks at the contents of the files too."""
        self.folder = folder
        try:
            about = json.loads((folder / "checkpoint.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not a whole checkpoint ({error}): name a folder such as RUN/checkpoints/latest") from None
        if about["format"] != FORMAT:
            raise UserError(f"{folder}: is of format {about['format']}, this version reads {FORMAT}: use the version that saved it")
        self.step: int = about["step"]
        self.tokens: int = about["tokens"]
        self.config: RunConfig = configuration.from_dict(about["config"], str(folder / "checkpoint.json"))
        self.shapes: dict[str, tuple[int, int]] = {name: (rows, columns) for name, (rows, columns) in about["shapes"].items()}
        self.files: dict[str, dict[str, Any]] = about["files"]
        for name, facts in self.files.items():
            size = (folder / name).stat().st_size if (folder / name).exists() else None
            if size != facts["bytes"]:
                raise UserError(
                    f"{folder / name}: {'is missing' if size is None else f'has {size:,} bytes'}, and the checkpoint was saved "
                    f"with {facts['bytes']:,}: the checkpoint is damaged; take an older one"
                )
        self._pieces: dict[tuple[str, str], list[tuple[Box, Any, str]]] = {}
        for name in self.files:
            if name.endswith(".safetensors"):
                self._index(safe_open(folder / name, framework="pt"))

    def _index(self, file: Any) -> None:
        for key in file.keys():
            state, name, row0, column0 = key.split("/")
            rows, columns = file.get_slice(key).get_shape()
            box = Box(int(row0), int(row0) + rows, int(column0), int(column0) + columns)
            self._pieces.setdefault((state, name), []).append((box, file, key))

    @property
    def identity(self) -> dict[str, Any]:
        """Tells this checkpoint from any other, by its checksums."""
        return {"run": str(self.config.run), "step": self.step, "tokens": self.tokens, "files": self.files}

    @property
    def ledger(self) -> dict[str, Any]:
        return json.loads((self.folder / "ledger.json").read_text())

    @property
    def updates(self) -> int:
        """Updates that AdamW has made: fewer than steps where some were skipped."""
        return self.ledger.get("interventions", {}).get("updates", self.step)

    def read(self, name: str, box: Box, state: str = "master") -> torch.Tensor:
        """float32 on the CPU, shape [box.rows, box.columns]. Raises UserError when a part of the box was not saved."""
        result = torch.empty(box.rows, box.columns)
        found = 0
        for piece, file, key in self._pieces.get((state, name), []):
            both = piece.meet(box)
            if both.rows > 0 and both.columns > 0:
                result[both.within(box)] = file.get_slice(key)[both.within(piece)]
                found += both.rows * both.columns
        if found != box.rows * box.columns:
            raise UserError(f"{self.folder}: holds {found:,} of the {box.rows * box.columns:,} values of {state} {name} that are asked for")
        return result

    def verify(self) -> None:
        """Raises UserError when a file is not what was saved."""
        for name, facts in self.files.items():
            if sha256_of(self.folder / name) != facts["sha256"]:
                raise UserError(f"{self.folder / name}: its checksum is not that of the save: the checkpoint is damaged; take an older one")


def newest_whole(folder: Path, keeps: Callable[[Checkpoint], bool] = lambda checkpoint: True) -> Checkpoint | None:
    """The newest checkpoint in `folder` whose files are what was saved; says so when it passes over a damaged one.

    Newer ones that `keeps` refuses (they were rolled back) are removed, and `latest` points at the one that is left.
    """
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            checkpoint = Checkpoint(candidate)
            if not keeps(checkpoint):
                _remove(candidate)
                continue
            checkpoint.verify()
            if not (folder / "latest").exists():
                _point_latest_at(candidate)
            return checkpoint
        except UserError as error:
            print(f"passing over a damaged checkpoint: {error}", flush=True)
    (folder / "latest").unlink(missing_ok=True)
    return None


class Writer:
    """One checkpoint in the making: every rank calls `add_rank_file`, then one of them `finish`."""

    def __init__(self, folder: Path, step: int) -> None:
        self.temporary = folder / f".step-{step:08d}"
        self.final = folder / f"step-{step:08d}"
        self.step = step

    def clear(self) -> None:
        """Removes what an interrupted save of the same step has left; called by one rank, before any writes."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)

    def add_rank_file(self, rank: int, pieces: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
        """Writes the rectangles that this rank owns (keys from `piece_key`); returns the file's name and facts for `finish`."""
        path = self.temporary / f"rank-{rank:05d}.safetensors"
        save_file(pieces, path)
        return path.name, _facts(path)

    def finish(
        self, config: RunConfig, tokens: int, shapes: dict[str, tuple[int, int]], ledger: dict[str, Any], files: dict[str, dict[str, Any]]
    ) -> Path:
        """Writes the description, gives the folder its name, and points `latest` at it. `files` are all ranks' facts."""
        ledger_path = self.temporary / "ledger.json"
        ledger_path.write_text(json.dumps(ledger, indent=1))
        about = {
            "format": FORMAT,
            "step": self.step,
            "tokens": tokens,
            "shapes": shapes,
            "files": files | {ledger_path.name: _facts(ledger_path)},
            "config": config.model_dump(mode="json"),
        }
        (self.temporary / "checkpoint.json").write_text(json.dumps(about, indent=1))
        _facts(self.temporary / "checkpoint.json")
        shutil.rmtree(self.final, ignore_errors=True)  # a damaged one of the same step
        os.rename(self.temporary, self.final)
        _point_latest_at(self.final)
        _sync(self.final.parent)
        return self.final


def _point_latest_at(final: Path) -> None:
    link = final.parent / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, final.parent / "latest")


def prune(folder: Path, keep: int, milestones: set[int]) -> None:
    """Removes all but the newest `keep` checkpoints and those at the steps in `milestones`."""
    found = sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    for path in [path for path in found if int(path.name[5:]) not in milestones][:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    # Renamed first: a folder that is half removed must not look like a checkpoint.
    hidden = path.with_name(f".removed-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def piece_key(state: str, name: str, box: Box) -> str:
    return f"{state}/{name}/{box.row0}/{box.column0}"


def rectangles(start: int, end: int, columns: int) -> Iterator[tuple[int, int, Box]]:
    """Cuts the values start … end − 1 of a row-major matrix with `columns` columns into at most three rectangles.

    Yields (start, end, box): the end of a row, whole rows, the beginning of a row.
    """
    cuts = sorted({start, min(end, -(-start // columns) * columns), max(start, end // columns * columns), end})
    for first, last in itertools.pairwise(cuts):
        row, column = divmod(first, columns)
        if column or last - first < columns:
            yield first, last, Box(row, row + 1, column, column + last - first)
        else:
            yield first, last, Box(row, last // columns, 0, columns)


def _facts(path: Path) -> dict[str, Any]:
    """Size and checksum of a file that is then safely on the disk."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
