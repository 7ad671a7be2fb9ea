"""Stand-ins for what megatron-core takes for granted of CUDA, so that the same code runs on a CPU over gloo.

`install()` is called once, before a process group is made, and only where there is no GPU.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

CPU = torch.device("cpu")
_LIBRARY = torch.library.Library("aten", "IMPL")  # what is in it holds as long as it lives


def install() -> None:
    _factories_on_cpu()
    _current_device()
    _tensor_to_cuda()
    _streams()
    _tensor_type()
    _rng_tracker()
    _token_dispatcher()
    _swiglu()
    _groups_of_one()
    _matrix_products()
    # "Apex is not installed", "Transformer Engine is not installed" and their like say nothing new on a CPU.
    logging.getLogger("megatron").setLevel(logging.ERROR)


def _factories_on_cpu() -> None:
    """Schedules and the gradient clip make small tensors with `device="cuda"` written out, rotary embeddings in pinned memory."""
    # `with torch.device(…)` knows the factories by identity and looks them up once: it must find the originals, or
    # transformers builds the rotary frequencies of its models outside its meta device and leaves them without values.
    torch.utils._device._device_constructors()
    torch.tensor = _cuda_means_cpu(torch.tensor)
    torch.zeros = _cuda_means_cpu(torch.zeros)


def _cuda_means_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _current_device() -> None:
    """Buffers and pipeline messages are allocated on `torch.cuda.current_device()`."""
    torch.cuda.current_device = lambda: CPU


def _tensor_to_cuda() -> None:
    """Rotary embeddings move the index of a context-parallel rank's part to the GPU; a tied output layer moves its weight there."""
    torch.Tensor.cuda = lambda self, *_, **__: self


def _streams() -> None:
    """Gradient buffers and the token dispatcher order their work on streams; a CPU does one thing after the other."""

    class Stream:
        def wait_stream(self, stream: object) -> None: ...

        def record_event(self) -> "Stream":
            return self

        def synchronize(self) -> None: ...

    torch.cuda.Stream = Stream
    torch.cuda.current_stream = lambda device=None: Stream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda device=None: None


def _tensor_type() -> None:
    """DistributedOptimizer and clip_grads sort parameters by `Tensor.type()` and know CUDA's names only."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = type_name


def _rng_tracker() -> None:
    """Layers fork CUDA's random state around dropout, and recomputation restores it.

    Mujina has no dropout, and draws its initial weights itself.
    """
    from megatron.core.tensor_parallel import random

    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    random._get_all_rng_states = lambda: ()
    random._set_all_rng_states = lambda: None


def _token_dispatcher() -> None:
    """The all-to-all dispatcher wants its split sizes as lists; on a CPU the helper hands tensors through."""
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.maybe_move_tensor_to_cpu

    def as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        tensor = original(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = as_numpy


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
