"""The section `adapter` of a run's configuration: low-rank matrices (LoRA, Hu et al. 2021, arXiv 2106.09685) beside a frozen base.

A matrix W [rows, columns] of the base then computes W x + scale × B (A x) with A [rank, columns] and B [rows, rank], of which only A and B
are trained. They are named matrices like all others: `layers.3.query.lora_a`, `layers.3.experts.5.gate.lora_b`; one adapter for all experts
of a layer is `layers.3.experts.gate.lora_a`.
"""

import re
from pathlib import Path
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


Matrix = Annotated[str, pydantic.AfterValidator(_is_matrix)]


def kind_of(matrix: str) -> str | None:
    """What a matrix of a layer, or its adapter, is called in MATRICES: experts.gate of layers.3.experts.5.gate, and of itself. None for all
    others.
    """
    found = re.fullmatch(r"(?:layers\.\d+\.)?(experts\.|shared\.)?(?:\d+\.)?(\w+)", matrix)
    kind = f"{found[1] or ''}{found[2]}" if found else None
    return kind if kind in MATRICES else None


class AdapterConfig(Section):
    """Low-rank matrices beside a frozen base, `train.init_from`; they alone are trained and saved."""

    rank: Rank
    """Rows of each A, columns of each B."""
    alpha: PositiveFloat
    """What B A x is multiplied with: alpha ÷ rank."""
    matrices: tuple[Matrix, ...] = Field(min_length=1)
    """Of every layer that has them: query, key, value, attention_out; gate, up, down (of dense FFNs); experts.gate, experts.up,
    experts.down; shared.gate, shared.up, shared.down.
    """
    experts: Literal["each", "shared"] = "each"
    """Whether each expert has adapters of its own, or all experts of a layer have one for each matrix (`shared`)."""
    rank_pattern: dict[Matrix, Rank] = {}
    """The rank of those of `matrices` that have another one, by their names."""
    alpha_pattern: dict[Matrix, PositiveFloat] = {}
    """The alpha of those of `matrices` that have another one, by their names."""
    init_from: Path | None = None
    """A PEFT folder (`conversion/peft.py`) whose A and B the run begins with; null: B is zero, and A is drawn."""
    dropout: float = 0.0
    """Must be 0: nothing here is drawn while it trains, so that every restart goes on to the last bit."""

    def rank_of(self, matrix: str) -> int:
        """Of the adapter of a matrix, which goes by its own name or by its kind's."""
        return self.rank_pattern.get(kind_of(matrix) or "", self.rank)

    def alpha_of(self, matrix: str) -> float:
        return self.alpha_pattern.get(kind_of(matrix) or "", self.alpha)

    def scale_of(self, matrix: str) -> float:
        """What B A x is multiplied with."""
        return self.alpha_of(matrix) / self.rank_of(matrix)

    def adapted(self, matrix: str) -> str | None:
        """The name under which the A and B of a matrix of the base go, without `.lora_a`; None where it has none."""
        kind = kind_of(matrix)
        if kind not in self.matrices:
            return None
        return re.sub(r"experts\.\d+", "experts", matrix) if self.experts == "shared" else matrix

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
        for field in ("rank_pattern", "alpha_pattern"):
            if others := [name for name in getattr(self, field) if name not in self.matrices]:
                raise ValueError(f"{field}: {others[0]} is none of matrices ({', '.join(self.matrices)}): add it there, or take it out")
        return self
