"""What makes training on a CPU faster, and changes nothing but rounding: without this file it works as well.

`install()` is called once, behind `cpu.install()`, and only where there is no GPU. It holds for the whole process.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("aten", "IMPL")  # what is in it holds as long as it lives


def install() -> None:
    _swiglu()
    _groups_of_one()
    _matrix_products()


def _swiglu() -> None:
    """megatron-core compiles this function for a GPU; left out, it adds an offset of zero to `up` and keeps what can be had again."""
    from megatron.core.transformer import mlp

    mlp.bias_swiglu_impl = lambda gate_up, bias, *_: _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) × up of [gate, up] side by side in the last dimension; keeps its argument only."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        result = torch.empty_like(ctx.saved_tensors[0])
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradient, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        torch.ops.aten.silu.out(gate, out=of_up).mul_(gradient)
        return result


def _groups_of_one() -> None:
    """Gloo copies the whole buffer of gradients and of weights once a step for a group of one process; NCCL does nothing."""
    from megatron.core.distributed import param_and_grad_buffer

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(param_and_grad_buffer, name, _only_among_several(getattr(param_and_grad_buffer, name)))


def _only_among_several(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def wrapped(output: torch.Tensor, values: torch.Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == values.data_ptr():
            return None  # the result is in its place
        return collective(output, values, *args, group=group, **kwargs)

    return wrapped


def _matrix_products() -> None:
    """oneDNN, which comes with torch, multiplies in float32 faster than the MKL that torch takes for it (on an EPYC, by 15%)."""

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype == torch.float32 and a.is_contiguous():  # else MKL is the faster one
            return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return torch.ops.aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its own function is replaced
        _LIBRARY.impl("mm", mm, "CPU")
