"""The whole model as named matrices: their shapes, and the values that a new model, or a new adapter, starts from.

Needs no process group. `placement.py` lists the names; a vector is a matrix of one column.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import torch

from megatron_jobs.config import RunConfig
from megatron_jobs.config.model import ModelConfig, MoEConfig
from mujina.matrices import Box


def shapes(model: ModelConfig, moe: MoEConfig | None) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and [rows, columns] of every matrix of the model."""
    hidden, head, vocabulary = model.hidden_size, model.head_size, model.padded_vocab_size
    yield "embedding", (vocabulary, hidden)
    for layer in range(model.num_layers):
        here = f"layers.{layer}."
        yield here + "attention_norm", (hidden, 1)
        for kind, heads in (("query", model.num_attention_heads), ("key", model.num_query_groups), ("value", model.num_query_groups)):
            yield here + kind, (heads * head, hidden)
            if model.qkv_bias:
                yield f"{here}{kind}_bias", (heads * head, 1)
        if model.qk_norm:
            yield here + "query_norm", (head, 1)
            yield here + "key_norm", (head, 1)
        yield here + "attention_out", (hidden, model.num_attention_heads * head)
        yield here + "ffn_norm", (hidden, 1)
        widths = {here: model.ffn_hidden_size}
        if moe is not None and moe.is_mixture(layer):
            yield here + "router", (moe.num_experts, hidden)
            if moe.balancing == "bias":
                yield here + "router_bias", (moe.num_experts, 1)
            widths = {f"{here}experts.{expert}.": moe.expert_width(model) for expert in range(moe.num_experts)}
            if moe.shared_ffn_hidden_size:
                widths[f"{here}shared."] = moe.shared_ffn_hidden_size
        for ffn, width in widths.items():
            yield ffn + "gate", (width, hidden)
            yield ffn + "up", (width, hidden)
            yield ffn + "down", (hidden, width)
    yield "final_norm", (hidden, 1)
    if not model.tie_embeddings:
        yield "output", (vocabulary, hidden)


def trained_shapes(config: RunConfig) -> dict[str, tuple[int, int]]:
    """Name and [rows, columns] of every matrix that a run trains and saves: of the model, or of its adapter."""
    whole = dict(shapes(config.model, config.moe))
    if config.adapter is None:
        return whole
    found: dict[str, tuple[int, int]] = {}
    for matrix, (rows, columns) in whole.items():
        if name := config.adapter.adapted(matrix):
            rank = config.adapter.rank_of(matrix)
            found |= {f"{name}.lora_a": (rank, columns), f"{name}.lora_b": (rows, rank)}
    return found


def drawn(seed: int, name: str, shape: tuple[int, int], std: float) -> torch.Tensor:
    """A matrix of normal values that depends on the seed and the name only, not on who asks for which part of it."""
    return torch.empty(shape).normal_(0.0, std, generator=_generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")
    return torch.Generator().manual_seed(key)


class InitialWeights:
    """A new model: norms are one, biases zero, all else normal with `init_std`, the same values at every layout.

    Projections back into the residual stream are scaled by 1/sqrt(2 × layers) (GPT-2), as megatron-core does.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig | None, seed: int) -> None:
        self.shapes = dict(shapes(model, moe))
        self.model, self.moe, self.seed = model, moe, seed
        self._whole = lru_cache(maxsize=4)(self._draw)  # a parameter is asked for in several boxes, one after the other

    def read(self, name: str, box: Box) -> torch.Tensor:
        if name.endswith("_norm"):
            return torch.ones(box.rows, box.columns)
        if name.endswith("_bias"):
            return torch.zeros(box.rows, box.columns)
        return self._whole(name)[box.within(Box(0, self.shapes[name][0], 0, self.shapes[name][1]))]

    def _draw(self, name: str) -> torch.Tensor:
        std = self.model.init_std
        if name.endswith((".attention_out", ".down")):
            std /= (2 * self.model.num_layers) ** 0.5
        elif name.endswith(".router"):
            assert self.moe is not None
            std = self.moe.router_init_std
        return drawn(self.seed, name, self.shapes[name], std)


class InitialAdapter:
    """A new adapter, the same at every layout: B is zero, so that the model is the base; A is uniform within ±1/√columns, as in peft."""

    def __init__(self, config: RunConfig) -> None:
        self.shapes, self.seed = trained_shapes(config), config.seed
        self._whole = lru_cache(maxsize=4)(self._draw)

    def read(self, name: str, box: Box) -> torch.Tensor:
        if name.endswith(".lora_b"):
            return torch.zeros(box.rows, box.columns)
        return self._whole(name)[box.within(Box(0, self.shapes[name][0], 0, self.shapes[name][1]))]

    def _draw(self, name: str) -> torch.Tensor:
        bound = self.shapes[name][1] ** -0.5
        return torch.empty(self.shapes[name]).uniform_(-bound, bound, generator=_generator(self.seed, name))
