"""Stand-ins for what megatron-core takes for granted of CUDA, so that the same code runs on a CPU over gloo.

`install()` is called once, before a process group is made, and only where there is no GPU. What is here is needed; what only makes a
CPU faster is in `cpu_speed.py`.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

CPU = torch.device("cpu")


def install() -> None:
    _factories_on_cpu()
    _current_device()
    _tensor_to_cuda()
    _streams()
    _tensor_type()
    _rng_tracker()
    _token_dispatcher()
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
