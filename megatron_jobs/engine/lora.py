"""Adapters (LoRA) beside the linears of a model whose own weights are frozen.

Each adds scale × B (A x) to what a linear gives, by a forward hook, so that megatron-core's layers stay as they are; query, key and value,
and gate and up, have an A and a B each, as in peft. Every rank holds A and B whole and computes with the rows or columns that belong to its
part of the base's matrix; gradients are then summed over the ranks that share the matrix.

    the base's matrix     A takes                     what is exchanged, `rank` values a token         B gives
    cut by rows           the rank's part of the      A x is gathered over the sequence                its rows, of the whole sequence
                          sequence
    cut by columns        its columns of the input    A x is summed, and scattered over the sequence   all rows, of its part of the sequence
    of experts            as the expert does          nothing: the dispatcher sums what experts give   as the expert does

The sum over tensor-parallel ranks is megatron-core's for weights that see a part of the sequence each (`sequence_parallel`, as the norms);
that of an expert's own adapter, over `expert_tensor`, is made in `TrainingState`.

Shapes: T tokens (of one or more dimensions), E experts here (1 where there are none), R rows and C columns of an expert's matrix, r rank.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, reduce_scatter_to_sequence_parallel_region

from megatron_jobs.checkpoints.weights import trained_shapes
from megatron_jobs.config import RunConfig
from megatron_jobs.engine.placement import LocalParameter

CUT_BY_COLUMNS = ("attention_out", "down")
ALIGNED = 8  # what grouped products want of a width, in values: 16 bytes in bf16


def attach(gpt: GPTModel, config: RunConfig, base: Sequence[LocalParameter]) -> list[torch.nn.Parameter]:
    """Freezes a model, whose parameters are `base`, and gives its linears the adapters of the configuration, as yet without values.

    Returns those that one expert alone has, whose gradients are to be summed over `expert_tensor`.
    """
    assert config.adapter is not None
    of_weight = {module.weight: module for module in gpt.modules() if isinstance(getattr(module, "weight", None), torch.nn.Parameter)}
    for local in base:
        if isinstance(local.parameter, torch.nn.Parameter):
            local.parameter.requires_grad_(False)
            if any(config.adapter.adapted(part.name) for part in local.parts):
                linear = of_weight[local.parameter]
                linear.adapter = Adapter(config, local)
                linear.register_forward_hook(_add)
    if gpt.pre_process:  # layers that are computed again, and stages without an adapter, want an input that has a gradient
        gpt.embedding.register_forward_hook(lambda _, __, hidden_SBH: hidden_SBH.requires_grad_(torch.is_grad_enabled()))
    adapters = (module for module in gpt.modules() if isinstance(module, Adapter))
    return [values for adapter in adapters if adapter.is_of_each_expert for values in adapter.parameters()]


@contextlib.contextmanager
def turned_off(gpt: torch.nn.Module) -> Iterator[None]:
    """Within it a model computes what its base does (and may be given no backward pass)."""
    adapters = [module for module in gpt.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True


class Adapter(torch.nn.Module):
    """The adapters of what lies in one parameter of the base."""

    def __init__(self, config: RunConfig, local: LocalParameter) -> None:
        super().__init__()
        assert config.adapter is not None
        shapes, weight = trained_shapes(config), local.parameter
        experts = list(dict.fromkeys(part.name.rpartition(".")[0] for part in local.parts))
        of_experts = ".experts." in experts[0]
        self.is_of_each_expert = of_experts and config.adapter.experts == "each"
        self.num_experts = len(experts) if self.is_of_each_expert else 1
        self.norm_epsilon = config.model.norm_epsilon
        # Of the first expert, as of all others: (matrix, its rows) one behind the other, as they lie in the parameter.
        of_first = [part for part in local.parts if part.name.rpartition(".")[0] == experts[0]]
        self.pieces = [(part.name.rpartition(".")[2], range(part.box.row0, part.box.row1)) for part in of_first]
        self.rows = len(weight) // len(experts)
        self.columns = range(of_first[0].box.column0, of_first[0].box.column1)
        self.scales: dict[str, float] = {}
        for matrix in dict(self.pieces):
            if name := config.adapter.adapted(f"{experts[0]}.{matrix}"):
                self.scales[matrix] = config.adapter.scale_of(name)
                for suffix in ("lora_a", "lora_b"):
                    rows, columns = shapes[f"{name}.{suffix}"]
                    values = torch.nn.Parameter(torch.empty(self.num_experts * rows, columns, dtype=weight.dtype, device=weight.device))
                    if self.is_of_each_expert:  # marks that torch's stubs do not know
                        values.allreduce = False  # type: ignore[attr-defined]
                    else:
                        values.sequence_parallel = config.parallel.tensor > 1  # type: ignore[attr-defined]
                    # of this module itself, which is called: megatron-core waits there for what other ranks have updated
                    self.register_parameter(f"{matrix}_{suffix}", values)
        self.is_on = True
        self.exchange = _none
        if config.parallel.tensor > 1 and not of_experts:
            is_cut_by_columns = self.pieces[0][0] in CUT_BY_COLUMNS
            self.exchange = reduce_scatter_to_sequence_parallel_region if is_cut_by_columns else gather_from_sequence_parallel_region

    def forward(self, inputs_TC: torch.Tensor, ends_E: torch.Tensor | None = None) -> torch.Tensor:
        """What is to be added to the output of the linear [T, R]; the tokens of expert e end at `ends_E[e]`."""
        if not self.is_on:  # called all the same, for megatron-core's sake
            return inputs_TC.new_zeros(())
        if not self.is_of_each_expert:
            ends_E = None
        a_ErC = [self._by_expert(f"{matrix}_lora_a")[..., self.columns.start : self.columns.stop] for matrix in self.scales]
        if ends_E is not None:
            a_ErC = [F.pad(values, (0, 0, 0, -values.shape[1] % ALIGNED)) for values in a_ErC]
        low_Tr = self.exchange(_product(inputs_TC[..., : len(self.columns)], torch.cat(a_ErC, 1), ends_E))
        added, first = {}, {}
        for matrix, its_low_Tr in zip(self.scales, low_Tr.split([values.shape[1] for values in a_ErC], -1), strict=True):
            rows = [rows for name, rows in self.pieces if name == matrix]
            first[matrix] = rows[0].start
            b_ERr = self._by_expert(f"{matrix}_lora_b")[:, rows[0].start : rows[-1].stop]
            added[matrix] = self.scales[matrix] * _product(its_low_Tr, F.pad(b_ERr, (0, its_low_Tr.shape[-1] - b_ERr.shape[2])), ends_E)
        out_TR = [
            added[matrix][..., rows.start - first[matrix] : rows.stop - first[matrix]]
            if matrix in added
            else low_Tr.new_zeros(1).expand(*low_Tr.shape[:-1], len(rows))
            for matrix, rows in self.pieces
        ]
        return F.pad(torch.cat(out_TR, -1), (0, self.rows - sum(len(rows) for _, rows in self.pieces)))

    def _by_expert(self, name: str) -> torch.Tensor:
        values = self.get_parameter(name)
        return values.view(self.num_experts, -1, values.shape[1])


def _add(linear: torch.nn.Module, inputs: tuple[torch.Tensor, ...], outputs: Any) -> Any:
    """What a linear gives, a tensor or (a tensor, its bias apart), with what its adapter adds."""
    assert isinstance(linear.adapter, Adapter)
    if isinstance(norm := getattr(linear, "layer_norm_weight", None), torch.Tensor):  # Transformer Engine's, with the norm before it inside
        inputs = (F.rms_norm(inputs[0], norm.shape, norm, linear.adapter.norm_epsilon),)
    if isinstance(outputs, tuple):
        out, *others = outputs
        return (out + linear.adapter(*inputs), *others)
    return outputs + linear.adapter(*inputs)


def _product(inputs_TC: torch.Tensor, weight_ERC: torch.Tensor, ends_E: torch.Tensor | None) -> torch.Tensor:
    if ends_E is None:
        return F.linear(inputs_TC, weight_ERC[0])
    return F.grouped_mm(inputs_TC, weight_ERC.transpose(1, 2), offs=ends_E)


def _none(low_Tr: torch.Tensor) -> torch.Tensor:
    """Nothing is exchanged."""
    return low_Tr
