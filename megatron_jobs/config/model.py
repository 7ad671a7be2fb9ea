"""The sections `model` and `moe` of a run's configuration, and what of them makes two models compute the same."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Ge, Gt, Le
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from mujina.user_input import Section

VOCABULARY_MULTIPLE = 128  # one size at every tensor-parallel size, and a shape that GPU kernels like
MOST = 1_000_000  # of whatever makes sense far below it only: a slip of the hand must not be reckoned with for hours
Size = Annotated[int, Gt(0), Le(MOST)]


class RopeScaling(Section):
    """Llama 3.1's stretched rotary positions (`rope_type: llama3` of transformers): for contexts beyond `original_length` tokens."""

    factor: PositiveFloat
    """How many times longer the context grows: the low frequencies turn so much slower."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above `original_length` divided by this are stretched by the whole `factor`."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below `original_length` divided by this stay as they are; above `low_freq_factor`."""
    original_length: PositiveInt = 8192
    """Tokens of the context that the model was trained for before."""

    @pydantic.model_validator(mode="after")
    def _grows(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor}): raise it")
        return self


class ModelConfig(Section):
    """A decoder of the Llama family: RMSNorm, SwiGLU, rotary positions, grouped queries; and what Qwen2 and Qwen3 add to it."""

    num_layers: PositiveInt = Field(le=10_000)
    """Decoder layers."""
    hidden_size: Size
    """Width of the residual stream."""
    ffn_hidden_size: Size
    """Neurons of a dense FFN (SwiGLU: gate, up and down each have so many)."""
    num_attention_heads: Size
    """Query heads; a multiple of `num_query_groups`."""
    num_query_groups: Size
    """Key and value heads; as many as `num_attention_heads` for plain multi-head attention."""
    head_size: Size
    """Width of a head; `hidden_size / num_attention_heads` where it is left out."""
    vocab_size: PositiveInt = Field(le=2**31)
    """Pieces of the tokenizer. The matrices have the next multiple of 128 rows, of which those behind it are never looked up."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: PositiveFloat = 10_000
    """Base of the rotary positions' wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's stretched positions; null: none."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of a new model's matrices; that of attention's and the FFN's last ones ÷ √(2 × num_layers)."""
    tie_embeddings: bool = False
    """The output layer is the embedding."""
    qkv_bias: bool = False
    """Biases on query, key and value, as in Qwen2."""
    qk_norm: bool = False
    """RMSNorm over each query's and each key's head, as in Qwen3."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output layer; the rows behind `vocab_size` are never looked up."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def split_over(self, tensor: int) -> "ModelConfig":
        """The model that `tensor` ranks compute, with as many query groups on each.

        Where the groups do not divide, groups whose weights are all zero stand behind them. They add zero to what attention gives, all
        their gradients are zero, and so no update moves them; checkpoints do not hold them.
        """
        groups = -(-self.num_query_groups // tensor) * tensor
        heads = self.num_attention_heads // self.num_query_groups * groups
        return self.model_copy(update={"num_query_groups": groups, "num_attention_heads": heads})

    @pydantic.model_validator(mode="before")
    @classmethod
    def _head_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("head_size") is None:
            hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
            if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
                if hidden % heads:
                    raise ValueError(f"num_attention_heads ({heads}) must divide hidden_size ({hidden}): change one, or write head_size")
                return values | {"head_size": hidden // heads}
        return values

    @pydantic.model_validator(mode="after")
    def _divides(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(f"num_query_groups ({self.num_query_groups}) must divide num_attention_heads ({self.num_attention_heads})")
        return self


class UpcyclingConfig(Section):
    """How experts are made of a dense FFN (`moe/upcycle.py` has the formulas)."""

    operator: Literal["copy", "noise", "drop", "granular"] = "copy"
    """How an expert is made: the dense FFN itself (`copy`), with noise, with neurons drawn anew (`drop`), or one piece of it (`granular`).
    """
    noise_std: PositiveFloat = 0.01
    """Of `noise`: its standard deviation, relative to that of each matrix."""
    drop_ratio: float = Field(default=0.5, gt=0, le=1)
    """Of `drop`: the share of an expert's neurons that are drawn anew; above 0, at most 1."""
    independent: bool = False
    """Of `drop`: gate, up and down each draw their neurons, as in the published code."""
    scaling: Literal["exact", "cube_root"] = "exact"
    """Of `granular`: on the down projection alone (`exact`: step-0 logits are equal), or Megatron-LM's on all three matrices."""
    router: Literal["normal", "virtual_groups", "balance_noise"] | None = None
    """How its rows start; null: `virtual_groups` for granular, else `normal`."""


class PhaseMoE(Section):
    """What a phase sets for itself of the section `moe`; null: as it stands there."""

    load_balancing_loss: NonNegativeFloat | None = None
    """Coefficient of the balancing loss; 0: none."""
    router_z_loss: NonNegativeFloat | None = None
    """Coefficient of the mean square of log Z of the router's logits; 0: none."""
    bias_update_rate: NonNegativeFloat | None = None
    """What the bias of an expert moves in a step; 0: it stays, as at the end of DeepSeek-V3's training."""


class MoEConfig(Section):
    """FFNs that are mixtures of experts. The defaults are Mixtral's: top-k of the router's logits, softmax over the chosen, dropless."""

    num_experts: Size
    """Experts of a layer."""
    top_k: Size
    """Experts that a token goes through; at most `num_experts`."""
    ffn_hidden_size: Size | None = None
    """Neurons of one expert; null: the model's."""
    shared_ffn_hidden_size: Annotated[int, Ge(0), Le(MOST)] = 0
    """Neurons of an expert that every token goes through; 0: there is none."""
    every: PositiveInt = 1
    """The first of each so many layers is a mixture, the others are dense."""
    scores: Literal["topk_softmax", "softmax_topk", "sigmoid"] = "topk_softmax"
    """The weights of the chosen experts: softmax over the top-k logits (Mixtral), top-k of the softmax, or sigmoid (DeepSeek-V3)."""
    normalize_logits: bool = False
    """The router's logits to mean 0 and deviation 1, as in Tanuki; no inference engine knows it. Needs 3 experts or more."""
    balancing: Literal["aux_loss", "global_aux_loss", "bias", "none"] = "aux_loss"
    """What keeps loads even: a loss over a micro-batch, one over the global batch, a bias without a loss (needs sigmoid scores), nothing.
    """
    load_balancing_loss: NonNegativeFloat = 0.02
    """Coefficient of the balancing loss."""
    bias_update_rate: NonNegativeFloat = 1e-3
    """What the bias of an expert moves in a step, of `balancing: bias` (DeepSeek-V3)."""
    router_z_loss: NonNegativeFloat = 1e-5
    """Coefficient of the mean square of log Z of the router's logits (ST-MoE)."""
    router_init_std: PositiveFloat = 0.01
    """Standard deviation of the router's rows at the start."""
    capacity_factor: PositiveFloat | None = None
    """Tokens that an expert takes, as a multiple of its even share of each micro-batch; null: no token is dropped."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens get to their experts' ranks; fp8 needs `alltoall`."""
    upcycle_from: Path | None = None
    """A dense checkpoint or Hugging Face folder that the run starts from; excludes `train.init_from`."""
    upcycling: UpcyclingConfig = UpcyclingConfig()
    """How experts are made of the dense FFNs."""

    def expert_width(self, model: ModelConfig) -> int:
        return self.ffn_hidden_size or model.ffn_hidden_size

    def in_phase(self, own: PhaseMoE) -> "MoEConfig":
        """With what a phase sets for itself."""
        return self.model_copy(update=own.model_dump(exclude_none=True))

    def is_mixture(self, layer: int) -> bool:
        """Whether the layer (from 0) has experts."""
        return layer % self.every == 0

    def layers(self, model: ModelConfig) -> list[int]:
        """The layers that are mixtures."""
        return [layer for layer in range(model.num_layers) if self.is_mixture(layer)]

    def why_not_upcycled(self, model: ModelConfig) -> str | None:
        """What keeps experts of these sizes from being made of the dense FFN."""
        operator, dense, width = self.upcycling.operator, model.ffn_hidden_size, self.expert_width(model)
        if operator != "granular":
            if width == dense:
                return None
            return (
                f"moe.ffn_hidden_size ({width}) must be model.ffn_hidden_size ({dense}) with moe.upcycling.operator {operator}: "
                "leave it out, or set moe.upcycling.operator to granular"
            )
        if dense % width:
            return f"moe.ffn_hidden_size ({width}) must divide model.ffn_hidden_size ({dense}): write for example {dense // 8 or 1}"
        pieces = dense // width
        for field, size in (("num_experts", self.num_experts), ("top_k", self.top_k)):
            if size % pieces:
                return (
                    f"moe.{field} ({size}) must be a multiple of {pieces}, the pieces of the dense FFN (model.ffn_hidden_size {dense} / "
                    f"moe.ffn_hidden_size {width}), so that each is chosen as often: write {-(-size // pieces) * pieces}"
                )
        return None

    @property
    def has_load_balancing_loss(self) -> bool:
        return self.load_balancing_loss > 0 and self.balancing in ("aux_loss", "global_aux_loss")

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "MoEConfig":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must not exceed num_experts ({self.num_experts}): lower it")
        if self.top_k == 1 and self.scores == "topk_softmax":
            raise ValueError(
                "scores (topk_softmax) needs a top_k (1) of 2 or more, for the softmax over one expert is always 1 and its router learns "
                "nothing: write softmax_topk or sigmoid"
            )
        if self.balancing == "bias" and self.scores != "sigmoid":
            raise ValueError(f"balancing (bias) needs sigmoid scores, not {self.scores}: write scores: sigmoid, or balancing: aux_loss")
        if self.normalize_logits and self.num_experts < 3:
            raise ValueError(
                f"normalize_logits (true) needs num_experts ({self.num_experts}) of 3 or more, for two standardised logits are always the "
                "same two numbers: set it to false"
            )
        return self


def structure(model: ModelConfig, moe: MoEConfig | None) -> dict[str, Any]:
    """The fields that say what a model computes, by their dotted names; how it starts and is trained, a run may choose anew."""
    fields = {f"model.{name}": getattr(model, name) for name in ModelConfig.model_fields if name != "init_std"}
    if moe is not None:
        names = ("num_experts", "top_k", "shared_ffn_hidden_size", "every", "scores", "normalize_logits")
        fields |= {f"moe.{name}": getattr(moe, name) for name in names} | {"moe.ffn_hidden_size": moe.expert_width(model)}
    return fields


def differences(model: ModelConfig, moe: MoEConfig | None, its_model: ModelConfig, its_moe: MoEConfig | None) -> list[tuple[str, Any, Any]]:
    """(field, ours, theirs) of all that two models do not compute alike, and of a router's bias that only one of them has."""
    ours, theirs = structure(model, moe), structure(its_model, its_moe)
    found = [(name, ours.get(name), theirs.get(name)) for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if moe and its_moe and (moe.balancing == "bias") != (its_moe.balancing == "bias"):
        found.append(("moe.balancing", moe.balancing, its_moe.balancing))
    return found
