"""Checkpoints that know nothing of the layout they were saved at.

    checkpoints/step-00000200/checkpoint.json        step, tokens, updates, configuration, shapes, size and SHA-256 of every other file, and
                                                     a SHA-256 of all this
                              ledger.json            what has been consumed of each source, by phase
                              rank-00000.safetensors boxes of the named matrices of `placement.py`, for each of STATES
    checkpoints/latest                               leads to the newest whole one (mujina/checkpoint_folders.py)

Wherever a checkpoint is to be named, RUN@PHASE stands for the one at the end of a phase of the run.

Each rank writes only the boxes that it owns (the distributed optimizer gives every element one owner), and reads only
those that meet what it needs: no rank ever holds the model, and TP, PP, EP and DP may differ between save and load.
A checkpoint is written under a temporary name and renamed when all its files are on the disk. Nothing is unpickled.
No process group is needed here: `saver.py` is what the ranks of a run do together.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_jobs import config as configuration
from megatron_jobs.config import RunConfig
from megatron_jobs.data.ledger import Ledger
from mujina.checkpoint_folders import forget_latest, is_copied, point_latest_at, resolved, step_folder, steps
from mujina.disks import discard, patiently, rename, sweep, sync
from mujina.files import sha256_of, write_parts, write_whole
from mujina.matrices import Box, TensorSource
from mujina.tensor_files import Planned, header, progress, read_header, write_safetensors
from mujina.user_input import UserError, nearest, read_object, read_text, reading

STATES = ("master", "exp_avg", "exp_avg_sq")  # float32 weights, and AdamW's two moments
FORMAT = 2
DAMAGED = "the checkpoint is damaged; take an older one"
SEEN_WITHIN = 60  # seconds that a file system may take to show to one node what another one sees
FILE_BYTES = 2**30  # of the checkpoints that no rank writes


class Checkpoint:
    """A whole checkpoint folder, as a source of named matrices (`matrices.TensorSource`). Needs no process group."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError when the folder is not a whole checkpoint, OSError when its disk is not well; `verify` looks at the contents
        of the files too."""
        self.folder = folder = resolved(_at_end_of_phase(folder))
        about = _description(folder)
        with reading(folder / "checkpoint.json", "the description of a checkpoint", DAMAGED):
            self.step: int = about["step"]
            self.tokens: int = about["tokens"]
            self.updates: int = about["updates"]  # of the optimizer: fewer than steps where some were left out
            self.config: RunConfig = configuration.from_dict(about["config"], str(folder / "checkpoint.json"))
            self.shapes: dict[str, tuple[int, int]] = {name: (rows, columns) for name, (rows, columns) in about["shapes"].items()}
            self.files: dict[str, dict[str, Any]] = {
                name: {"bytes": of["bytes"], "sha256": of["sha256"]} for name, of in about["files"].items()
            }
        for name, facts in self.files.items():
            size = _size(folder / name)
            if size != facts["bytes"]:
                raise UserError(
                    f"{folder / name}: {'is missing' if size is None else f'has {size:,} bytes'}, and the checkpoint was saved "
                    f"with {facts['bytes']:,}: {DAMAGED}"
                )

    @functools.cached_property
    def _saved_boxes(self) -> dict[tuple[str, str], list[tuple[Box, Path, int]]]:
        """Where everything is, by state and name of the matrix: box, file, and position of its first byte in the file."""
        found: dict[tuple[str, str], list[tuple[Box, Path, int]]] = {}
        for path in (self.folder / name for name in self.files if name.endswith(".safetensors")):
            with reading(path, "a list of matrices", DAMAGED):
                pieces, start = read_header(path)
                for key, about in pieces.items():
                    state, name, row0, column0 = key.split("/")
                    rows, columns = about["shape"]
                    box = Box(int(row0), int(row0) + rows, int(column0), int(column0) + columns)
                    found.setdefault((state, name), []).append((box, path, start + about["data_offsets"][0]))
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """Tells this checkpoint from any other, by its checksums."""
        return {"run": str(self.config.run), "step": self.step, "tokens": self.tokens, "files": self.files}

    @property
    def states(self) -> list[str]:
        """Those of STATES that were saved: a checkpoint to start from may hold weights only."""
        return [state for state in STATES if any(state == saved for saved, _ in self._saved_boxes)]

    @property
    def ledger(self) -> Ledger:
        path = self.folder / "ledger.json"
        return Ledger.from_json(read_text(path, DAMAGED), str(path))

    def read(self, name: str, box: Box, state: str = "master") -> torch.Tensor:
        """float32 on the CPU, shape [box.rows, box.columns]. Raises UserError when a part of the box was not saved."""
        result = torch.empty(box.rows, box.columns)
        self.read_into(state, name, box, result)
        return result

    def read_into(self, state: str, name: str, box: Box, values: torch.Tensor) -> None:
        """As `read`, into a tensor of that shape, on any device. Several threads may do so at once."""
        if values.is_cpu and values.is_contiguous() and values.dtype == torch.float32:
            found = sum(
                self._read_box(saved, box, path, position, values) for saved, path, position in self._saved_boxes.get((state, name), [])
            )
            if found != box.rows * box.columns:
                raise UserError(
                    f"{self.folder}: holds {found:,} of the {box.rows * box.columns:,} values of {state} {name} that are asked for"
                )
        else:
            values.copy_(self.read(name, box, state))

    def _read_box(self, saved: Box, box: Box, path: Path, position: int, values: torch.Tensor) -> int:
        """What a saved box has of the box that is asked for, into its place in `values`; returns how many values that are."""
        both = saved.meet(box)
        if both.rows <= 0 or both.columns <= 0:
            return 0
        target = values[both.within(box)]
        is_direct = both.columns == saved.columns == box.columns  # else through whole rows of what is saved
        rows = target if is_direct else torch.empty(both.rows, saved.columns)
        position += (both.row0 - saved.row0) * saved.columns * 4
        left = memoryview(rows.numpy()).cast("B")
        with open(path, "rb", buffering=0) as file:
            while left:
                count = os.preadv(file.fileno(), [left], position)
                if count == 0:
                    raise UserError(f"{path}: ends before its time: {DAMAGED}")
                left, position = left[count:], position + count
        if not is_direct:
            target.copy_(rows[:, both.column0 - saved.column0 : both.column1 - saved.column0])
        return both.rows * both.columns

    def verify(self, share: int = 0, num_shares: int = 1) -> None:
        """Raises UserError when a file is not what was saved. Several processes may take a share of the files each.

        As many shares as files give rank r the file of rank r, which then waits in the memory of its machine to be loaded.
        """
        names = sorted(self.files, key=lambda name: (not name.endswith(".safetensors"), name))
        for name in names[share::num_shares]:
            if sha256_of(self.folder / name) != self.files[name]["sha256"]:
                raise UserError(f"{self.folder / name}: its checksum is not that of the save: {DAMAGED}")


def _size(path: Path) -> int | None:
    try:
        return patiently(path, path.stat).st_size
    except FileNotFoundError:
        return None


def _at_end_of_phase(named: Path) -> Path:
    """The folder of RUN@PHASE; another name as it is. Raises UserError when the run has no such phase."""
    run, at, phase = named.name.rpartition("@")
    if not (run and at) or named.exists():
        return named
    checkpoints = named.with_name(run) / "checkpoints"
    latest = resolved(checkpoints / "latest")
    phases = configuration.from_dict(_description(latest)["config"], str(latest / "checkpoint.json")).phases
    names = [one.name for one in phases]
    if phase not in names:
        raise UserError(f"{named}: the run has no phase {phase}: {nearest(phase, names)}")
    return step_folder(checkpoints, sum(one.num_steps for one in phases[: names.index(phase) + 1]))


def _description(folder: Path) -> dict[str, Any]:
    if not patiently(folder, (folder / "checkpoint.json").is_file):
        there = [path.name for step in steps(folder.parent) if ((path := step_folder(folder.parent, step)) / "checkpoint.json").is_file()]
        remedy = f"name another one of {folder.parent}: {', '.join(there)}" if there else "name a folder such as RUN/checkpoints/latest"
        raise UserError(f"{folder}: not a whole checkpoint (it has no checkpoint.json): {remedy}")
    about = read_object(folder / "checkpoint.json", DAMAGED)
    its_format = about.get("format")
    if its_format != FORMAT:
        raise UserError(f"{folder}: is of format {its_format}, this version reads {FORMAT}: use the version that saved it")
    if about.pop("sha256", None) != seal(about):
        raise UserError(f"{folder / 'checkpoint.json'}: its checksum is not that of the save: {DAMAGED}")
    return about


def seal(about: dict[str, Any]) -> str:
    """The SHA-256 of what checkpoint.json says, in hex; it stands in the same file."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def newest_whole(
    folder: Path,
    keeps: Callable[[Checkpoint], bool] = lambda checkpoint: True,
    rank: int = 0,
    gathered: Callable[[Any], list[Any]] = lambda value: [value],
) -> Checkpoint | None:
    """The newest checkpoint in `folder` whose files are what was saved; says so when it passes over a damaged one.

    Newer ones that `keeps` refuses (they were rolled back) are removed once it is found, and `latest` points at what is left. Called by
    all ranks of a run, with `ranks.gathered`, it gives each of them a share of the files to verify, and the same answer.
    Raises UserError, and removes nothing, when there are checkpoints and none of them is whole and kept.
    """
    if rank == 0 and is_copied(folder / "latest"):
        _name_by_step(folder / "latest")
    newest, refused = _first_whole(folder, lambda step: -step, keeps, rank, gathered)
    if rank == 0:
        for step in refused:
            _remove(step_folder(folder, step))
        if newest:
            point_latest_at(newest.folder)
        else:
            forget_latest(folder)
    return newest


def newest_described(folder: Path, keeps: Callable[[Checkpoint], bool]) -> Checkpoint | None:
    """The newest checkpoint that `keeps` does not refuse, as its description has it: nothing is read of its files but their sizes.

    Raises UserError when there are checkpoints and this can be said of none of them.
    """
    there, refused = steps(folder), list[int]()
    for step in reversed(there):
        checkpoint, _ = _opened(step_folder(folder, step))
        if checkpoint and keeps(checkpoint):
            return checkpoint
        refused += [step] if checkpoint else []
    if there:
        raise _none_is_whole(folder, there, refused)
    return None


def whole_before(
    folder: Path,
    step: int,
    keeps: Callable[[Checkpoint], bool],
    rank: int,
    gathered: Callable[[Any], list[Any]],
) -> Checkpoint | None:
    """The newest whole checkpoint of at most `step` steps, else the oldest of more; None where there is none at all. As `newest_whole`."""
    return _first_whole(folder, lambda one: (one > step, abs(one - step)), keeps, rank, gathered)[0]


def remove_after(folder: Path, step: int) -> None:
    """Removes the checkpoints of more than `step` steps, which were rolled back, and lets `latest` point at that of `step`; 0: at none."""
    for newer in filter(lambda one: one > step, reversed(steps(folder))):
        _remove(step_folder(folder, newer))
    if step:
        point_latest_at(step_folder(folder, step))
    else:
        forget_latest(folder)


def _name_by_step(copied: Path) -> None:
    """A whole checkpoint that a copy has left under another name gets its own, unless that is taken."""
    with contextlib.suppress(UserError):
        own = step_folder(copied.parent, Checkpoint(copied).step)
        if not own.exists():
            rename(copied, own)


def _first_whole(
    folder: Path, order: Callable[[int], Any], keeps: Callable[[Checkpoint], bool], rank: int, gathered: Callable[[Any], list[Any]]
) -> tuple[Checkpoint | None, list[int]]:
    """The first one, in the `order` of steps, that is whole and kept, None where there are none; and what `keeps` refused before it.

    Raises OSError where the disk of some is not well, and of the others none is whole and kept."""
    of_ranks = gathered(set(steps(folder)))
    there, refused, is_well = sorted(set[int]().union(*of_ranks), key=order), list[int](), True
    for step in there:
        is_kept = True
        checkpoint, problem = _opened(step_folder(folder, step))
        if any(gathered(problem is None)):
            # A file system may show what was written just now to one node, and to another one later.
            end = time.monotonic() + SEEN_WITHIN
            while problem and time.monotonic() < end:
                time.sleep(1)
                checkpoint, problem = _opened(step_folder(folder, step))
        try:
            if checkpoint and (is_kept := keeps(checkpoint)):
                checkpoint.verify(rank, len(of_ranks))
        except (UserError, OSError) as error:
            problem = error
        problems, kept = zip(*gathered((problem, is_kept)), strict=True)
        is_well &= not any(isinstance(one, OSError) for one in problems)
        if not all(kept):
            refused.append(step)
        elif first := next(filter(None, problems), None):
            if rank == 0:
                print(f"passing over a damaged checkpoint: {first}", flush=True)
        else:
            return checkpoint, refused
    if not is_well:
        raise OSError(errno.EIO, "none of its checkpoints can be read, and the disk is not well", str(folder))
    if there:
        raise _none_is_whole(folder, there, refused)
    return None, []


def _none_is_whole(folder: Path, there: Sequence[int], refused: Sequence[int]) -> UserError:
    return UserError(
        f"{folder}: none of its {len(there)} checkpoints is whole ({len(refused)} were rolled back): bring one back, or move the folder "
        "away to start anew"
    )


def _opened(folder: Path) -> tuple[Checkpoint | None, UserError | OSError | None]:
    """The checkpoint, or why it is none as this process sees it."""
    try:
        return Checkpoint(folder), None
    except (UserError, OSError) as error:
        return None, error


class Writer:
    """One checkpoint in the making: every rank calls `add_rank_file`, and one of them `finish` when all files are there."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.final = step_folder(folder, step)
        self.temporary = self.final.with_name(f".{self.final.name}")
        self.step = step

    def clear(self) -> None:
        """Removes what interrupted saves have left; called by one rank, before any writes."""
        for left in self.folder.glob(".step-*"):
            _remove(left)
        sweep(self.folder)
        self.temporary.mkdir(parents=True)

    def add_rank_file(self, rank: int, boxes: dict[str, torch.Tensor]) -> None:
        """Writes the boxes that this rank owns (keys from `box_key`; float32, on the CPU), and beside them size and checksum."""
        self.temporary.mkdir(exist_ok=True)  # another node has made it, and this one may not see it yet
        path = self.temporary / f"rank-{rank:05d}.safetensors"
        write_whole(path.with_suffix(".json"), json.dumps(_write(path, _safetensors(boxes))).encode())

    def stream_rank_file(self, rank: int, boxes: Sequence[Planned], seen: Callable[[Any], Any]) -> None:
        """As `add_rank_file`, of boxes that are read one at a time; `seen` is called with every part that is written."""
        path = self.temporary / f"rank-{rank:05d}.safetensors"
        digest, num_bytes = hashlib.sha256(), 0

        def digested(part: Any) -> None:
            nonlocal num_bytes
            num_bytes += len(part)
            digest.update(part)
            seen(part)

        write_safetensors(path, boxes, seen=digested)
        facts = {"bytes": num_bytes, "sha256": digest.hexdigest()}
        write_whole(path.with_suffix(".json"), json.dumps(facts).encode())

    def rank_files(self) -> dict[str, dict[str, Any]]:
        """Size and checksum of the files that are written to the end, as far as this process sees them."""
        found = {}
        for path in sorted(self.temporary.glob("rank-*.json")):
            with contextlib.suppress(OSError, ValueError):  # that of another node may be empty for a while
                found[path.with_suffix(".safetensors").name] = json.loads(path.read_bytes())
        return found

    def finish(self, config: RunConfig, updates: int, shapes: dict[str, tuple[int, int]], ledger: Ledger) -> Path:
        """Writes the description, gives the folder its name, and points `latest` at it. `updates` are the optimizer's so far."""
        files = {"ledger.json": _write(self.temporary / "ledger.json", [ledger.to_json().encode()])}
        files |= self.rank_files()
        for path in self.temporary.glob("rank-*.json"):
            path.unlink(missing_ok=True)
        about = {
            "format": FORMAT,
            "step": self.step,
            "tokens": ledger.tokens,
            "updates": updates,
            "shapes": shapes,
            "files": files,
            "config": config.model_dump(mode="json"),
        }
        _write(self.temporary / "checkpoint.json", [json.dumps({"sha256": seal(about)} | about, indent=1).encode()])
        sync(self.temporary)
        if self.final.exists():  # a damaged one of the same step
            _remove(self.final)
        rename(self.temporary, self.final)
        point_latest_at(self.final)
        sync(self.folder)
        return self.final


def write_weights(
    folder: Path, config: RunConfig, source: TensorSource, shapes: dict[str, tuple[int, int]], ledger: Ledger, description: str
) -> Path:
    """A checkpoint at step 0 without moments, of all that `source` (`matrices.TensorSource`) has, one matrix in memory at a time.

    In files of about FILE_BYTES; shows a progress bar with the description. Returns the folder of the checkpoint.
    """
    files: list[list[Planned]] = [[]]
    for name, (rows, columns) in shapes.items():
        if sum(planned.nbytes for planned in files[-1]) >= FILE_BYTES:
            files.append([])
        box = Box(0, rows, 0, columns)
        read = functools.partial(source.read, name, box)
        files[-1].append(Planned(box_key("master", name, box), (rows, columns), torch.float32, read))
    writer = Writer(folder, step=0)
    writer.clear()
    with progress(description, sum(planned.nbytes for boxes in files for planned in boxes)) as advance:
        for number, boxes in enumerate(files):
            writer.stream_rank_file(number, boxes, lambda part: advance(len(part)))
    return writer.finish(config, 0, shapes, ledger)


def prune(folder: Path, keep: int, is_kept: Callable[[int], bool], back_to: int) -> None:
    """Removes all but the newest `keep` checkpoints, those whose step `is_kept`, and those that a rollback can need.

    back_to    the step behind which the next rollback goes: the newest checkpoint of no more steps is kept, and all that are newer
    """
    there = steps(folder)
    needed = max((step for step in there if step <= back_to), default=0)
    for step in [step for step in there if not is_kept(step)][:-keep]:
        if step < needed:
            _remove(step_folder(folder, step))


def _remove(folder: Path) -> None:
    """`discard`; where not even that can be done, it is told and tried again at the next save: what is old does not end a run."""
    try:
        discard(folder)
    except OSError as error:
        print(f"{folder}: could not be removed ({error}): tried again at the next save", flush=True)


def box_key(state: str, name: str, box: Box) -> str:
    return f"{state}/{name}/{box.row0}/{box.column0}"


def boxes_of_range(start: int, end: int, columns: int) -> Iterator[tuple[int, int, Box]]:
    """Cuts the values start … end − 1 of a row-major matrix with `columns` columns into at most three boxes.

    Yields (start, end, box): the end of a row, whole rows, the beginning of a row.
    """
    cuts = sorted({start, min(end, -(-start // columns) * columns), max(start, end // columns * columns), end})
    for first, last in itertools.pairwise(cuts):
        row, column = divmod(first, columns)
        if column or last - first < columns:
            yield first, last, Box(row, row + 1, column, column + last - first)
        else:
            yield first, last, Box(row, last // columns, 0, columns)


def _safetensors(boxes: dict[str, torch.Tensor]) -> list[Any]:
    """The bytes of a safetensors file: the header, and the values, which are not copied."""
    assert all(values.dtype == torch.float32 for values in boxes.values())
    return [
        header((key, "F32", values.shape, values.nbytes) for key, values in boxes.items()),
        *(memoryview(values.contiguous().numpy()).cast("B") for values in boxes.values()),
    ]


def _write(path: Path, parts: Sequence[Any]) -> dict[str, Any]:
    """Writes the parts, one after the other; returns size and checksum of the file, which is then safely on the disk.

    A second thread computes the checksum meanwhile (hashlib and the disk both let other threads run). SHA-256, because processors
    have instructions for it: it is faster than BLAKE2, and anybody can check it with sha256sum. An OSError names the file.
    """
    with ThreadPoolExecutor(1) as beside:
        checksum = beside.submit(_sha256, parts)
        write_parts(path, parts)
    return {"bytes": sum(len(part) for part in parts), "sha256": checksum.result()}


def _sha256(parts: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
