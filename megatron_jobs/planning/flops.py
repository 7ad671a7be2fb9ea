"""Floating-point operations of the model, and what GPUs can do of them: the basis of the planner and of the trainer's MFU.

Needs no torch. An operation is one multiplication or one addition.
"""

import re
from typing import NamedTuple

from megatron_jobs.config.model import ModelConfig, MoEConfig


def per_token(model: ModelConfig, moe: MoEConfig | None, sequence_length: int) -> int:
    """Operations of a forward and a backward pass for one token of a sequence of `sequence_length` tokens.

    6 for each parameter in a matrix product (2 forward, 4 backward), plus causal attention: scores and values take 12 × heads × head size
    for each of the S/2 tokens that a token sees on average, hence 6 × S. Recomputed activations do not count. The same as
    `num_floating_point_operations` of megatron.training (which halves for the causal mask as well), plus the router, which it leaves out.
    """
    attention = 6 * model.num_layers * model.num_attention_heads * model.head_size * sequence_length
    return 6 * matmul_parameters(model, moe) + attention


def matmul_parameters(model: ModelConfig, moe: MoEConfig | None) -> int:
    """Parameters in a matrix product of one token: of experts the top-k only; no norms, and no embedding, which is a look-up.

    The rows that pad the vocabulary count: the output layer computes them.
    """
    hidden, head = model.hidden_size, model.head_size
    attention = 2 * hidden * head * (model.num_attention_heads + model.num_query_groups)
    mixtures = num_mixtures(model, moe)
    parameters = model.num_layers * attention + model.padded_vocab_size * hidden
    parameters += (model.num_layers - mixtures) * 3 * hidden * model.ffn_hidden_size
    if moe is not None:
        width = moe.top_k * moe.expert_width(model) + moe.shared_ffn_hidden_size
        parameters += mixtures * (3 * hidden * width + moe.num_experts * hidden)
    return parameters


def num_mixtures(model: ModelConfig, moe: MoEConfig | None) -> int:
    """Layers that have experts."""
    return sum(map(moe.is_mixture, range(model.num_layers))) if moe else 0


class GPU(NamedTuple):
    """What a GPU can do by its data sheet: dense operations, and bytes a second in one direction."""

    bf16: float  # operations a second
    fp8: float  # operations a second
    memory_gib: float  # as the driver reports it
    memory_bandwidth: float
    nvlink: float
    network: float  # of the GPU's own network card, in the nodes that are usually built with it


# NVIDIA's data sheets (A100, H100, H200, DGX B200, GB200), which give rates with sparsity: halved here.
# All words of a name stand in the name that NVML gives the device.
GPUS = {
    "a100": GPU(312e12, 312e12, 79, 2.04e12, 300e9, 25e9),
    "a100 40gb": GPU(312e12, 312e12, 39.5, 1.56e12, 300e9, 25e9),
    "h100": GPU(989e12, 1979e12, 79, 3.35e12, 450e9, 50e9),
    "h100 pcie": GPU(756e12, 1513e12, 79, 2.0e12, 300e9, 25e9),
    "h100 nvl": GPU(835e12, 1671e12, 93, 3.9e12, 300e9, 25e9),
    "h200": GPU(989e12, 1979e12, 140, 4.8e12, 450e9, 50e9),
    "b200": GPU(2250e12, 4500e12, 179, 8.0e12, 900e9, 50e9),
    "gb200": GPU(2450e12, 4900e12, 184, 8.0e12, 900e9, 50e9),
}


def gpu(name: str) -> GPU | None:
    """The GPU of that name, be it "h100" or as NVML tells it ("NVIDIA H100 80GB HBM3"); None when it is not known."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    matching = [known for known in GPUS if set(known.split()) <= words]
    return GPUS[max(matching, key=len)] if matching else None


def peak(name: str, precision: str) -> float | None:
    """Dense operations a second of the GPU called `name` in "bf16" or "fp8" (in "fp32": None); None when it is not known."""
    found = gpu(name)
    return None if found is None or precision == "fp32" else getattr(found, precision)
