"""Safetensors files read by their headers and written tensor by tensor: no more than one tensor is in memory at a time.

A safetensors file is the length of a JSON header in 8 bytes, the header, and the values one after the other. Names, types and shapes
make the header, so it is written before any value is there; the safetensors library wants all tensors of a file at once.
Needs torch only where values are written.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mujina.files import write_parts

if TYPE_CHECKING:
    import torch

TYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
METADATA = "__metadata__"  # what a header has beside tensors


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What stands before the values of a safetensors file, by the names of the tensors, and the byte at which the values begin.

    A tensor is {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}, in bytes from where the values begin.
    Raises ValueError when there is no header.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise ValueError(f"its header is to have {length:,} bytes, more than the file")
        about = json.loads(file.read(length))
    if not isinstance(about, dict):
        raise ValueError(f"its header is a {type(about).__name__}")
    return about, 8 + length


def header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes before the values, for tensors of (name, type in the format's spelling, shape, bytes) which follow in this order."""
    about: dict[str, Any] = {METADATA: metadata} if metadata else {}
    start = 0
    for name, dtype, shape, nbytes in tensors:
        about[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}
        start += nbytes
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of their size
    return len(text).to_bytes(8, "little") + text


class Planned(NamedTuple):
    """A tensor to be written: `read()` gives its values on the CPU, in this dtype and order, whatever their shape."""

    name: str
    shape: Sequence[int]
    dtype: "torch.dtype"
    read: Callable[[], "torch.Tensor"]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, tensors: Sequence[Planned], shard_bytes: int, description: str) -> None:
    """The weights of a Hugging Face folder: model.safetensors, or files of at most `shard_bytes` (one tensor at least) and their index.

    Shows a progress bar with the description.
    """
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total = sum(tensor.nbytes for tensor in tensors)
    with progress(description, total) as advance:
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(folder / name, shard, {"format": "pt"}, lambda part: advance(len(part)))
    if len(shards) > 1:
        where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_safetensors(
    path: Path, tensors: Sequence[Planned], metadata: dict[str, str] | None = None, seen: Callable[[Any], Any] = lambda part: None
) -> None:
    """Writes one file, which is then safely on the disk. `seen` is called with all its bytes, part by part. An OSError names the file."""
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so each begins at a multiple of the size of its values
    write_parts(path, _told(_parts(tensors, metadata), seen))


def _told(parts: Iterator[Any], seen: Callable[[Any], Any]) -> Iterator[Any]:
    for part in parts:
        yield part
        seen(part)
        del part  # before the next is read


def _parts(tensors: Sequence[Planned], metadata: dict[str, str] | None) -> Iterator[Any]:
    yield header(((tensor.name, TYPES[str(tensor.dtype)], tensor.shape, tensor.nbytes) for tensor in tensors), metadata)
    for tensor in tensors:
        yield _bytes_of(tensor)


def _bytes_of(planned: Planned) -> memoryview:
    import torch

    values = planned.read()
    assert (values.nbytes, values.dtype) == (planned.nbytes, planned.dtype), planned.name
    return memoryview(values.contiguous().flatten().view(torch.uint8).numpy())


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes; gives the function that is told how many more are done."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
