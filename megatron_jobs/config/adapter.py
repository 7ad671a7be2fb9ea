"""The section `adapter` of a run's configuration: low-rank matrices (LoRA, Hu et al. 2021, arXiv 2106.09685) beside a frozen base.

A matrix W [rows, columns] of the base then computes W x + scale × B (A x) with A [rank, columns] and B [rows, rank], of which only A and B
are trained. They are named matrices like all others: `layers.3.query.lora_a`, `layers.3.experts.5.gate.lora_b`; one adapter for all experts
of a layer is `layers.3.experts.gate.lora_a`.
"""

import re
from typing import Annotated, Literal

import pydantic
from annotated_types import Gt, Le
from pydantic import Field, PositiveFloat

from megatron_jobs.config.model import MOST, ModelConfig, MoEConfig
from mujina.user_input import Section, nearest

ATTENTION = ("query", "key", "value", "attention_out")
FFN = ("gate", "up", "down")
MATRICES = (*ATTENTION, *FFN, *(f"{of}.{name}" for of in ("experts", "shared") for name in FFN))
Rank = Annotated[int, Gt(0), Le(MOST)]


def _is_matrix(name: str) -> str:
    if name not in MATRICES:
        raise ValueError(f"is no matrix that can have an adapter: {nearest(name, list(MATRICES))}")
    return name


class AdapterConfig(Section):
    """Low-rank matrices beside a frozen base, `train.init_from`; they alone are trained and saved."""

    rank: Rank
    """Rows of each A, columns of each B."""
    alpha: PositiveFloat
    """What B A x is multiplied with: alpha ÷ rank."""
    matrices: tuple[Annotated[str, pydantic.AfterValidator(_is_matrix)], ...] = Field(min_length=1)
    """Of every layer that has them: query, key, value, attention_out; gate, up, down (of dense FFNs); experts.gate, experts.up,
    experts.down; shared.gate, shared.up, shared.down.
    """
    experts: Literal["each", "shared"] = "each"
    """Whether each expert has adapters of its own, or all experts of a layer have one for each matrix (`shared`)."""
    dropout: float = 0.0
    """Must be 0: nothing here is drawn while it trains, so that every restart goes on to the last bit."""

    def scale(self) -> float:
        """What B A x is multiplied with."""
        return self.alpha / self.rank

    def adapted(self, matrix: str) -> str | None:
        """The name under which the A and B of a matrix of the base go, without `.lora_a`; None where it has none."""
        found = re.fullmatch(r"(layers\.\d+\.)(experts\.\d+\.|shared\.)?(\w+)", matrix)
        if not found:
            return None
        layer, of, name = found[1], found[2] or "", found[3]
        of = re.sub(r"\d+\.", "", of)
        if f"{of}{name}" not in self.matrices:
            return None
        return f"{layer}{of}{name}" if of == "experts." and self.experts == "shared" else matrix

    def why_not_of(self, model: ModelConfig, moe: MoEConfig | None) -> str | None:
        """What of `matrices` a model does not have."""
        has_dense = moe is None or len(moe.layers(model)) < model.num_layers
        for name in self.matrices:
            of, dot, _ = name.partition(".")
            if of == "experts" and dot and moe is None:
                return f"adapter.matrices ({name}): a dense model has no experts: write {name.removeprefix('experts.')}, or take it out"
            if of == "shared" and not (moe and moe.shared_ffn_hidden_size):
                return f"adapter.matrices ({name}): this model has no shared expert (moe.shared_ffn_hidden_size): take it out"
            if name in FFN and not has_dense:
                return f"adapter.matrices ({name}): all FFNs of this model are mixtures: write experts.{name}, or take it out"
        return None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "AdapterConfig":
        if self.dropout:
            raise ValueError(f"dropout ({self.dropout}) must be 0, for nothing here is drawn while it trains: write 0, or leave it out")
        if len(set(self.matrices)) < len(self.matrices):
            raise ValueError(f"matrices: every name must stand once, these do not: {', '.join(self.matrices)}")
        return self
