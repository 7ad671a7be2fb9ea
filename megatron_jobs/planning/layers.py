"""What the layers of a run cannot do, be they Transformer Engine's, which ranks take on a GPU where it is installed, or the local ones.

Ranks know which they have; who only plans or submits the run knows it or not, and then tells. Needs torch only to look at this machine.
"""

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

from megatron_jobs.config import RunConfig
from mujina.user_input import UserError


class Layers(NamedTuple):
    """None: not known here."""

    transformer_engine: bool | None
    fp8: bool = True  # whether the GPU, if there is one, computes in fp8


def has_transformer_engine() -> bool:
    """Whether processes on this machine have its layers."""
    import torch

    return torch.cuda.is_available() and is_installed()


def is_installed() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def of_this_machine(config: RunConfig) -> Layers:
    """As far as the configuration asks for anything that not all have."""
    if not any(_wants(config)):
        return Layers(None)
    import torch

    found = has_transformer_engine()
    return Layers(found, found and torch.cuda.get_device_capability() >= (8, 9))


def check(config: RunConfig, layers: Layers) -> None:
    """Raises UserError when the layers cannot do what the configuration asks for; where it is not known whether they can, it is printed."""
    for wanted, text in _wants(config):
        found = False if wanted and not layers.fp8 else layers.transformer_engine
        if found is None:
            print(f"layers            {text}; whether they have it is not known here")
        elif found != wanted:
            raise UserError(text)


def _wants(config: RunConfig) -> Iterator[tuple[bool, str]]:
    """What is asked for that either Transformer Engine's layers (True) or the local ones (False) alone can do."""
    if config.train.precision == "fp8":
        yield (
            True,
            "train.precision (fp8) needs Transformer Engine on a GPU that computes in fp8 (Ada, Hopper or later): install the extra "
            "`gpu` on such a machine, or set train.precision to bf16",
        )
    of_experts = [name for name in config.adapter.matrices if name.startswith("experts.")] if config.adapter else []
    if of_experts:
        yield (
            False,
            f"adapter.matrices ({of_experts[0]}): Transformer Engine's grouped products take no adapters yet: leave those of experts out, "
            "or train where it is not installed",
        )
    separated = [phase.name for phase in config.phases if phase.keeps_apart]
    if config.parallel.context > 1 and separated:
        yield (
            False,
            f"parallel.context ({config.parallel.context}) must be 1 where phases.{separated[0]} separates documents: Transformer "
            "Engine cuts each document over the ranks, and wants their lengths in multiples of 2 × parallel.context",
        )
