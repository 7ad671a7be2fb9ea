"""An adapter and its base as one model: W + scale × B A, in the place of the checkpoint of a whole one."""

from typing import TYPE_CHECKING, Any

from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.checkpoints.weights import shapes
from megatron_jobs.conversion.start import check_base, open_base
from megatron_jobs.data.ledger import Ledger
from mujina.matrices import Box

if TYPE_CHECKING:
    import torch


class Merged:
    """What `convert.Exported` takes as it takes a checkpoint (`model_card.Exportable`)."""

    def __init__(self, adapter: Checkpoint) -> None:
        """Raises UserError when the base in its configuration is not there, or not the one that it was trained beside."""
        assert adapter.config.adapter is not None
        self.adapter, self.config, self.lora = adapter, adapter.config, adapter.config.adapter
        self.step, self.tokens = adapter.step, adapter.tokens
        self.shapes = dict(shapes(self.config.model, self.config.moe))
        self.base = open_base(self.config)
        check_base(adapter, self.base)

    @property
    def ledger(self) -> Ledger:
        return self.adapter.ledger

    @property
    def identity(self) -> dict[str, Any]:
        return self.adapter.identity

    def read(self, name: str, box: Box) -> "torch.Tensor":
        """float32 on the CPU, shape [box.rows, box.columns]."""
        values = self.base.read(name, box)
        if own := self.lora.adapted(name):
            rank = self.lora.rank_of(name)
            a = self.adapter.read(f"{own}.lora_a", Box(0, rank, box.column0, box.column1))
            b = self.adapter.read(f"{own}.lora_b", Box(box.row0, box.row1, 0, rank))
            values += self.lora.scale_of(name) * (b @ a)
        return values
