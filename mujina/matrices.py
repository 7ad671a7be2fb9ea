"""A model as named matrices: boxes of them, and anything that can say what stands in a box.

Checkpoints, initial weights, upcycling and conversion all speak of (name, box), so none of them knows about TP, PP, EP or DP. A vector is a
matrix of one column. `megatron_jobs/engine/placement.py` lists the names.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class Box(NamedTuple):
    """Rows row0 … row1 − 1 and columns column0 … column1 − 1 of a matrix."""

    row0: int
    row1: int
    column0: int
    column1: int

    @property
    def rows(self) -> int:
        return self.row1 - self.row0

    @property
    def columns(self) -> int:
        return self.column1 - self.column0

    def meet(self, other: "Box") -> "Box":
        """What both boxes cover; its rows or columns are not positive where they do not meet."""
        return Box(
            max(self.row0, other.row0), min(self.row1, other.row1), max(self.column0, other.column0), min(self.column1, other.column1)
        )

    def within(self, outer: "Box") -> tuple[slice, slice]:
        """The index of this box in an array that holds `outer`."""
        return (
            slice(self.row0 - outer.row0, self.row1 - outer.row0),
            slice(self.column0 - outer.column0, self.column1 - outer.column0),
        )


class TensorSource(Protocol):
    """Anything that can say what stands in a box of a named matrix: a checkpoint, initial weights, an upcycled model."""

    def read(self, name: str, box: Box) -> "torch.Tensor":
        """float32 on the CPU, shape [box.rows, box.columns]."""
        ...
