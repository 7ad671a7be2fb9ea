"""Upcycling: a mixture of experts made of a dense model's FFNs, matrix by matrix.

F is the width of the dense FFN, W that of an expert, G = F / W, E the number of experts, k of which are chosen for a token.

    copy        Each expert is the dense FFN (Komatsuzaki et al. 2022, arXiv 2212.05055). The weights of the chosen experts are a softmax
                over their k logits and so add up to one: k equal experts weighted to one are the dense FFN, whatever the router says.
    noise       A copy, plus normal noise of `noise_std` times the standard deviation of each matrix.
    drop        A copy in which a share `drop_ratio` of the neurons (rows of gate and up, columns of down) is drawn anew, others in each
                expert, with the mean and the deviation of the weights that they replace (Drop-Upcycling, arXiv 2502.19261). The paper has
                one set of neurons for the three matrices; its code draws a set for each (`independent: true`).
    granular    An expert is one of G pieces of the dense FFN, and experts iG … iG + G − 1 are one copy of it, a virtual group. Their router
                rows are equal, so the k highest logits are those of k / G whole groups, each piece once a group: no tie between experts
                is ever decided (He et al. 2024, arXiv 2410.07524). `router` says how the rows start; see `Upcycled._router_rows`.

The factor of granular experts: a group that a softmax over groups would give the weight p gives p / G to each of its G pieces, whose sum is
the dense FFN: the layer's output is 1 / G of the dense one. "exact" multiplies down by G; the output is linear in it. "cube_root"
multiplies gate, up and down by the cube root of G, as Megatron-LM does; SwiGLU is not linear in gate, so it is an approximation.
With the softmax before the top-k the chosen experts keep about k / E of the weight, and the factor is Megatron-LM's G × E / k.

A shared expert begins with the gate and up of a new model and a down of zero: at first it adds nothing, whatever its width, and it
learns from the first step on. (A copy of dense neurons would have to be taken out of the experts again.)
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch

from mujina.matrices import Box, TensorSource

BALANCE_NOISE = 0.1  # of router_init_std


class DenseSizes(Protocol):
    """What is read of a run's section `model:`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...


class Operator(Protocol):
    """What is read of `moe.upcycling`; the module's docstring says what they do."""

    @property
    def operator(self) -> str: ...
    @property
    def noise_std(self) -> float: ...
    @property
    def drop_ratio(self) -> float: ...
    @property
    def independent(self) -> bool: ...
    @property
    def scaling(self) -> str: ...
    @property
    def router(self) -> str | None: ...


class Experts(Protocol):
    """What is read of the section `moe:`."""

    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def scores(self) -> str: ...
    @property
    def capacity_factor(self) -> float | None: ...
    @property
    def router_init_std(self) -> float: ...
    @property
    def upcycling(self) -> Operator: ...
    def expert_width(self, model: Any) -> int: ...


class Upcycled(TensorSource):
    """The mixture as a source of named matrices, without ever holding it.

    Values depend on the name, and on what `normal` gives for it, not on the box in which they are asked for. Copies and granular experts
    read the box alone; noise and drop read a matrix whole, for its deviation, and keep the last one.
    """

    def __init__(
        self,
        dense: TensorSource,
        new: TensorSource,
        model: DenseSizes,
        moe: Experts,
        normal: Callable[[str, tuple[int, int]], torch.Tensor],
    ) -> None:
        """`model` and `moe` are the mixture's sections of a run's configuration, `new` its initial weights if it were trained from scratch.

        `normal(name, shape)` draws standard normal values that depend on the name only. The sizes must fit
        (`MoEConfig.why_not_upcycled`).
        """
        self.dense, self.new, self.normal = dense, new, normal
        self.model, self.moe, self.how = model, moe, moe.upcycling
        self.width = moe.expert_width(model)
        self.pieces = model.ffn_hidden_size // self.width
        self.router = self.how.router or ("virtual_groups" if self.how.operator == "granular" else "normal")
        self._whole = lru_cache(maxsize=1)(self._redrawn)

    @property
    def keeps_the_function(self) -> bool:
        """Whether the mixture computes what the dense model does, up to rounding."""
        operator = self.how.operator == "copy" or (
            self.how.operator == "granular" and self.how.scaling == "exact" and self.router == "virtual_groups"
        )
        # sigmoid scores of more than one expert are divided by their sum
        weights_add_up_to_one = self.moe.scores == "topk_softmax" or (self.moe.scores == "sigmoid" and self.moe.top_k > 1)
        return operator and weights_add_up_to_one and self.moe.capacity_factor is None

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The values in a box of the matrix `name`, such as `layers.3.experts.5.gate` (which is made of `layers.3.gate`)."""
        if name.endswith(".router_bias"):
            return self.new.read(name, box)
        if name.endswith(".router"):
            return self._router_rows(name, box)
        if ".shared." in name:
            return torch.zeros(box.rows, box.columns) if name.endswith(".down") else self.new.read(name, box)
        if ".experts." not in name:
            return self.dense.read(name, box)
        dense_name, expert, kind = _parse(name)
        if self.how.operator in ("noise", "drop"):
            rows, columns = (self.model.hidden_size, self.width) if kind == "down" else (self.width, self.model.hidden_size)
            whole = self._whole(name, box._replace(row0=0, row1=rows, column0=0, column1=columns))
            return whole[box.row0 : box.row1, box.column0 : box.column1]
        first = expert % self.pieces * self.width
        if kind == "down":
            box = box._replace(column0=box.column0 + first, column1=box.column1 + first)
        else:
            box = box._replace(row0=box.row0 + first, row1=box.row1 + first)
        return self.dense.read(dense_name, box) * self._factor(kind)

    def _factor(self, kind: str) -> float:
        if self.how.operator == "copy":
            return 1.0
        factor = self.pieces * (self.moe.num_experts / self.moe.top_k if self.moe.scores == "softmax_topk" else 1)
        if self.how.scaling == "cube_root":
            return factor ** (1 / 3)
        return factor if kind == "down" else 1.0

    def _router_rows(self, name: str, box: Box) -> torch.Tensor:
        """normal: each its own. virtual_groups: the experts of a group have equal rows. balance_noise: nearly equal ones.

        Equal rows keep the dense model's function. With noise single pieces of a group win from the start, and each is used for itself.
        """
        if self.router == "normal":
            return self.new.read(name, box)
        experts = torch.arange(box.row0, box.row1)
        rows = self.new.read(name, box._replace(row0=0, row1=self.moe.num_experts))[experts // self.pieces]
        if self.router == "balance_noise":
            noise = self.normal(f"{name}.balance_noise", (self.moe.num_experts, self.model.hidden_size))
            rows = rows + BALANCE_NOISE * self.moe.router_init_std * noise[box.row0 : box.row1, box.column0 : box.column1]
        return rows

    def _redrawn(self, name: str, whole: Box) -> torch.Tensor:
        """An expert's whole matrix with noise, or with neurons drawn anew."""
        dense_name, _, kind = _parse(name)
        dense = self.dense.read(dense_name, whole)
        if self.how.operator == "noise":
            _, std = _mean_and_std(dense)
            return dense + self.how.noise_std * std * self.normal(name, (dense.shape[0], dense.shape[1]))
        owner = name if self.how.independent else name.removesuffix(f".{kind}")
        order = self.normal(f"{owner}.dropped", (self.width, 1)).flatten().argsort(stable=True)
        neurons = order[: max(1, round(self.how.drop_ratio * self.width))]
        dim = 1 if kind == "down" else 0
        dropped = dense.index_select(dim, neurons)
        mean, std = _mean_and_std(dropped)
        return dense.index_copy(dim, neurons, mean + std * self.normal(name, (dropped.shape[0], dropped.shape[1])))


def _parse(name: str) -> tuple[str, int, str]:
    """(name of the dense matrix, number of the expert, "gate", "up" or "down")"""
    found = re.fullmatch(r"(layers\.\d+\.)experts\.(\d+)\.(\w+)", name)
    assert found, name
    layer, expert, kind = found.groups()
    return layer + kind, int(expert), kind


def _mean_and_std(values_RC: torch.Tensor) -> tuple[float, float]:
    """Over all values. A row is summed by one thread, so the result does not depend on how many there are."""
    variances_R, means_R = (x.double() for x in torch.var_mean(values_RC, dim=1, correction=0))
    mean = float(means_R.mean())
    return mean, float(variances_R.mean() + (means_R - mean).square().mean()) ** 0.5
