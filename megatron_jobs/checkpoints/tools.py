"""Looks into checkpoints, averages them, and writes them in other files: box by box, without a GPU or a process group.

    python -m megatron_jobs.checkpoints.tools inspect CHECKPOINT [--against OTHER]        (what `mujina checkpoint inspect` calls)
    python -m megatron_jobs.checkpoints.tools average CHECKPOINT… OUTPUT                  (or --last N RUN OUTPUT)
    python -m megatron_jobs.checkpoints.tools reshape CHECKPOINT OUTPUT --files N

OUTPUT is a new folder like RUN/checkpoints, with one checkpoint and `latest`; it gets its name when all of it is written and verified.
"""

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_jobs.config.model import differences
from megatron_jobs.data.ledger import Ledger, Origin
from mujina.checkpoint_folders import step_folder, steps
from mujina.files import whole_folder
from mujina.user_input import UserError, command_line

if TYPE_CHECKING:
    import torch

    from megatron_jobs.checkpoints.checkpoint import Checkpoint
    from mujina.matrices import Box

    Read = Callable[[str, str, Box], torch.Tensor]  # state, name, box → float32

BOX_BYTES = 2**26  # what is in memory at a time, of each checkpoint

Named = Annotated[Path, typer.Argument(help="checkpoint folder, such as RUN/checkpoints/latest")]
Output = Annotated[Path, typer.Argument(help="new folder for the checkpoint, such as NEW_RUN/checkpoints")]


def inspect(
    checkpoint: Named,
    against: Annotated[Path | None, typer.Option(help="another checkpoint of the same model, to show the difference to it")] = None,
    by: Annotated[Literal["layer", "matrix"], typer.Option(help="what a row of the table is")] = "layer",
    moments: Annotated[bool, typer.Option("--moments", help="AdamW's moments too")] = False,
) -> None:
    """Shows what a checkpoint holds: step, tokens, data, files, and of every layer or matrix the norm, the range and what is not finite.

    Norms are Frobenius'; norms and ranges leave out NaN and Inf, which are counted. The difference is its norm by that of OTHER's values.
    """
    from rich.console import Console
    from rich.table import Table

    from megatron_jobs.checkpoints.checkpoint import STATES, Checkpoint

    source = Checkpoint(checkpoint)
    other = Checkpoint(against) if against else None
    if other:
        require_same_model(source, other)
    print("\n".join(summary(source)))
    console = Console() if sys.stdout.isatty() else Console(width=160)  # rich takes a file for 80 columns wide, and cuts
    columns = ["", "shape", "values", "norm", "min", "max", "NaN", "Inf"] + (["difference", "largest"] if other else [])
    for state in STATES if moments else STATES[:1]:
        table = Table(*columns, title={"master": "weights"}.get(state, state))
        for name, shape, found in rows(source, other, state, by):
            cells = [name, shape, f"{found.num_values:,}", f"{found.norm:.6g}", f"{found.low:.4g}", f"{found.high:.4g}"]
            cells += [f"{found.num_nan:,}", f"{found.num_inf:,}"]
            if other:
                cells += [f"{found.relative_difference:.4g}", f"{found.largest_difference:.4g}"]
            table.add_row(*cells)
        console.print(table)


def average(
    paths: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT… OUTPUT", help="checkpoint folders, or with --last a run; a new folder")
    ],
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="the newest N checkpoints of a run")] = None,
) -> None:
    """Writes the mean of the weights of several checkpoints of one model, for `train.init_from` and `mujina convert`.

    All count alike; summed in float64 and rounded once. Step, tokens, configuration and ledger are those of the newest.
    """
    from megatron_jobs.checkpoints.checkpoint import Checkpoint

    *named, output = paths
    if last:
        if len(named) != 1:
            raise UserError(f"--last {last} takes one run and one output, not {len(paths)} folders: write --last {last} RUN OUTPUT")
        there = [step_folder(named[0] / "checkpoints", step) for step in steps(named[0] / "checkpoints")]
        if len(there) < last:
            raise UserError(f"{named[0]}: has {len(there)} checkpoints and not {last}: raise train.keep_checkpoints, or ask for fewer")
        named = there[-last:]
    if len({path.resolve() for path in named}) < len(named) or not named:
        raise UserError("average takes checkpoints, each one once (`latest` is one of the others), and an output: name those to average")
    sources = sorted(map(Checkpoint, named), key=lambda source: source.step)
    newest = sources[-1]
    for source in sources:
        if source.config.adapter:
            raise UserError(f"{source.folder}: holds an adapter, and the mean of A and of B is not the mean of B A: `mujina convert` each")
        require_same_model(source, newest)
        source.verify()

    def mean(state: str, name: str, box: "Box") -> "torch.Tensor":
        total = sources[0].read(name, box, state).double()
        for source in sources[1:]:
            total += source.read(name, box, state)
        return (total / len(sources)).float()

    origin = Origin(kind="averaged", of=tuple(source.identity for source in sources), ledger=newest.ledger)
    ledger = newest.ledger.model_copy(update={"origin": origin})
    final = _write(output, newest, ["master"], mean, 2**30, None, ledger, "averaging")
    print(f"{final}: the mean of steps {', '.join(str(source.step) for source in sources)}")


def reshape(
    checkpoint: Named,
    output: Output,
    files: Annotated[int | None, typer.Option(min=1, help="number of files")] = None,
    file_bytes: Annotated[int, typer.Option(min=1, help="size of a file, about; without --files")] = 2**30,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="leave out AdamW's moments: to start from, not to go on from")
    ] = False,
) -> None:
    """Writes a checkpoint in another number of files, or without the optimizer's moments. The values stay as they are, bit for bit.

    No checkpoint needs this to be loaded at another TP, PP, EP or DP: name it in the run, whatever the layout that saved it.
    """
    from megatron_jobs.checkpoints.checkpoint import Checkpoint

    source = Checkpoint(checkpoint)
    source.verify()
    states = ["master"] if weights_only else source.states
    final = _write(
        output, source, states, lambda state, name, box: source.read(name, box, state), file_bytes, files, source.ledger, "writing"
    )
    print(f"{final}: step {source.step} in {len(Checkpoint(final).files) - 1} files")


@dataclass(frozen=True)
class Facts:
    """Of the finite values of a matrix, or of several, and of how they differ from another checkpoint's."""

    num_values: int = 0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    num_nan: int = 0
    num_inf: int = 0
    other_squares: float = 0.0
    difference_squares: float = 0.0
    largest_difference: float = 0.0

    def __add__(self, more: "Facts") -> "Facts":
        return Facts(
            self.num_values + more.num_values,
            self.squares + more.squares,
            min(self.low, more.low),
            max(self.high, more.high),
            self.num_nan + more.num_nan,
            self.num_inf + more.num_inf,
            self.other_squares + more.other_squares,
            self.difference_squares + more.difference_squares,
            max(self.largest_difference, more.largest_difference),
        )

    @property
    def norm(self) -> float:
        return math.sqrt(self.squares)

    @property
    def relative_difference(self) -> float:
        """‖values − others‖ / ‖others‖; infinite where only the others are zero."""
        if not self.difference_squares:
            return 0.0
        return math.sqrt(self.difference_squares / self.other_squares) if self.other_squares else math.inf


def facts(values: "torch.Tensor", others: "torch.Tensor | None" = None) -> Facts:
    """Of float32 values of any shape; sums are float64. A difference counts where both are finite."""
    finite = values[values.isfinite()]
    low, high = finite.aminmax() if finite.numel() else (math.inf, -math.inf)
    found = Facts(values.numel(), _squares(finite), float(low), float(high), int(values.isnan().sum()), int(values.isinf().sum()))
    if others is None:
        return found
    both = values.isfinite() & others.isfinite()
    others = others[both]
    difference = values[both] - others
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    return found + Facts(other_squares=_squares(others), difference_squares=_squares(difference), largest_difference=largest)


def _squares(values: "torch.Tensor") -> float:
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def rows(source: "Checkpoint", other: "Checkpoint | None", state: str = "master", by: str = "layer") -> Iterator[tuple[str, str, Facts]]:
    """(name, shape or number of matrices, facts) of every matrix, or of every layer and each matrix outside of the layers."""
    from rich.progress import track

    groups: dict[str, list[str]] = {}
    for name in source.shapes:
        groups.setdefault(re.match(r"layers\.\d+|\w+", name)[0] if by == "layer" else name, []).append(name)  # type: ignore[index]
    for group, names in track(groups.items(), description=f"reading {state}", transient=True):
        found = Facts()
        for name in names:
            for box in _boxes(source.shapes[name], BOX_BYTES):
                found += facts(source.read(name, box, state), other.read(name, box, state) if other else None)
        shape = " × ".join(map(str, source.shapes[names[0]])) if names == [group] else f"{len(names)} matrices"
        yield group, shape, found


def summary(source: "Checkpoint") -> list[str]:
    """Lines on where the checkpoint stands, what it has consumed, and its files."""
    from megatron_jobs.checkpoints.checkpoint import STATES

    ledger = source.ledger
    sizes = [facts["bytes"] for name, facts in source.files.items() if name.endswith(".safetensors")]
    kind = "dense" if source.config.moe is None else f"{source.config.moe.num_experts} experts, {source.config.moe.top_k} per token"
    moments = "weights and moments" if set(source.states) == set(STATES) else "weights only"
    lines = [
        f"{source.folder}: step {source.step:,}, {source.tokens:,} tokens, {source.updates:,} updates",
        f"model: {source.config.model.num_layers} layers, {len(source.shapes):,} matrices, "
        f"{sum(rows * columns for rows, columns in source.shapes.values()):,} values, {kind}",
        f"files: {len(sizes)} of {min(sizes):,} to {max(sizes):,} bytes, {sum(sizes):,} in all, {moments}",
    ]
    for phase in ledger.phases:
        consumed = ", ".join(f"{name} {share.tokens:,}" for name, share in phase.sources.items())
        lines.append(f"phase {phase.name}: {phase.steps:,} steps, {phase.tokens:,} tokens: {consumed}")
    origin = ledger.origin
    while origin:
        lines.append(f"origin: {origin}")
        origin = origin.ledger.origin if origin.ledger else None
    return lines


def require_same_model(one: "Checkpoint", other: "Checkpoint") -> None:
    """Raises UserError, naming what differs, when the checkpoints are not of one model."""
    mine, its = one.config, other.config
    problems = [f"{name} is {a} and {b}" for name, a, b in differences(mine.model, mine.moe, its.model, its.moe)]
    if one.shapes != other.shapes and not problems:
        name = next(name for name in one.shapes | other.shapes if one.shapes.get(name) != other.shapes.get(name))
        problems.append(f"{name} has the shape {one.shapes.get(name)} and {other.shapes.get(name)}")
    if problems:
        raise UserError(f"{one.folder} and {other.folder} are not of one model: {'; '.join(problems[:5])}: name checkpoints of one model")


def _boxes(shape: tuple[int, int], num_bytes: int) -> "Iterator[Box]":
    """Whole rows of at most `num_bytes` together (one row at least), which make up the matrix."""
    from mujina.matrices import Box

    rows, columns = shape
    height = max(1, num_bytes // (4 * columns))
    return (Box(row, min(row + height, rows), 0, columns) for row in range(0, rows, height))


def _write(
    output: Path,
    like: "Checkpoint",
    states: Sequence[str],
    read: "Read",
    file_bytes: int,
    num_files: int | None,
    ledger: Ledger,
    description: str,
) -> Path:
    """A checkpoint of what `read` gives, else like `like`, in equal files, or in files of about `file_bytes`. Returns its folder."""
    import torch

    from megatron_jobs.checkpoints.checkpoint import Checkpoint, Writer, box_key
    from mujina.tensor_files import Planned, progress

    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: exists and is not empty: name a new folder, or remove this one")
    total = len(states) * sum(4 * rows * columns for rows, columns in like.shapes.values())
    num_files = num_files or -(-total // file_bytes)
    files: list[list[Planned]] = [[] for _ in range(num_files)]
    position = 0
    for state in states:
        for name, shape in like.shapes.items():
            for box in _boxes(shape, min(BOX_BYTES, total // num_files)):
                planned = Planned(box_key(state, name, box), (box.rows, box.columns), torch.float32, partial(read, state, name, box))
                files[position * num_files // total].append(planned)  # the file in whose equal share the box begins
                position += planned.nbytes
    if not all(files):
        raise UserError(f"{num_files} files are too many for {total:,} bytes, whose rows are not cut: ask for fewer, or for larger ones")
    with whole_folder(output, "latest") as partial_folder, progress(description, total) as advance:
        writer = Writer(partial_folder, like.step)
        writer.clear()
        for rank, boxes in enumerate(files):
            writer.stream_rank_file(rank, boxes, lambda part: advance(len(part)))
        final = writer.finish(like.config, like.updates, like.shapes, ledger)
        Checkpoint(final).verify()
    return output / final.name


if __name__ == "__main__":
    command_line(inspect, average, reshape)
