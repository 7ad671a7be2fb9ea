"""The configuration of a training run: what may be written in its YAML file, and the rules that hold between the fields.

`load(path, overrides)` reads a file; `planning.layouts.check(config, world_size)` tells whether it can be on so many processes.
Needs no torch. Counts start with `num_`, `tokens` are tokens, intervals are optimizer steps.
"""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from annotated_types import Ge, Gt, Le
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_prep.row import Kind, Origin
from mujina.user_input import Section, UserError, parse, read_yaml
from tokenization.tokenizer import BeginDocuments

VOCABULARY_MULTIPLE = 128  # one size at every tensor-parallel size, and a shape that GPU kernels like
# Values of the logits of which the loss takes the softmax at a time, in float32: what fits a cache, what keeps a GPU busy.
SOFTMAX_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
MOST_INCREMENTS = 1_000  # of a batch ramp
MOST = 1_000_000  # of whatever makes sense far below it only: a slip of the hand must not be reckoned with for hours
Size = Annotated[int, Gt(0), Le(MOST)]
Share = Annotated[float, Gt(0), Le(10**15)]


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

    def in_phase(self, phase: "Phase") -> "MoEConfig":
        """With what the phase sets for itself."""
        return self.model_copy(update=phase.moe.model_dump(exclude_none=True))

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


class ParallelConfig(Section):
    """Sizes of the model-parallel dimensions; what is left of the processes is data parallel. Tensor parallel is sequence parallel too.

    Experts divide the tensor, context and data dimensions of a pipeline stage anew: expert_tensor × expert × the copies of each expert.
    """

    tensor: Size = 1
    """Ranks that share each matrix, and the sequence between the layers."""
    pipeline: Size = 1
    """Stages of layers; divides `model.num_layers`."""
    virtual_pipeline: Size = 1
    """Chunks of layers in each stage (interleaved schedule); above 1 only with `pipeline` above 1."""
    context: Size = 1
    """Ranks that share each sequence; 2 × context divides every phase's `sequence_length`."""
    expert: Size = 1
    """Ranks that share the experts of a layer; divides `moe.num_experts`."""
    expert_tensor: Size = 1
    """Ranks that share each expert's matrices."""

    def data(self, world_size: int) -> int:
        return world_size // (self.tensor * self.pipeline * self.context)

    def __str__(self) -> str:
        return ", ".join(f"{field} {size}" for field, size in self if size > 1) or "data parallel only"


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay; none on norms. The learning rate belongs to the phases."""

    beta1: PositiveFloat = Field(default=0.9, lt=1)
    """Decay of the mean of the gradients, a step."""
    beta2: PositiveFloat = Field(default=0.95, lt=1)
    """Decay of the mean of their squares, a step."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Times the learning rate, taken off each matrix in a step."""
    clip_grad: PositiveFloat = 1.0
    """The norm of the whole gradient is cut to this."""


class LearningRate(Section):
    """The piece of the learning-rate curve that belongs to one phase: a linear warm-up from 0, then `start` to `end`.

    With `decay_steps` the way down takes only the last steps of the phase, and before it the rate stays at `start`
    (warm-up, stable, decay). "1-sqrt" and "exponential" are the decays of Hägele et al. 2024 (arXiv 2405.18392) and of MiniCPM.
    """

    start: PositiveFloat = Field(le=100)
    """The rate after the warm-up."""
    end: NonNegativeFloat = Field(le=100)
    """The rate at the phase's last step; above 0 for `exponential`."""
    shape: Literal["constant", "linear", "cosine", "1-sqrt", "exponential"] = "cosine"
    """The curve from `start` to `end`."""
    warmup_steps: NonNegativeInt = 0
    """Steps from 0 to `start`; with `decay_steps` at most the phase's."""
    decay_steps: PositiveInt | None = None
    """The last so many steps go down; null: all behind the warm-up."""

    @pydantic.model_validator(mode="after")
    def _ends(self) -> "LearningRate":
        if self.shape == "exponential" and not self.end:
            raise ValueError("end (0) must be above 0 for an exponential decay: raise it, or take another shape")
        if self.shape == "constant" and self.decay_steps:
            raise ValueError(f"decay_steps ({self.decay_steps}) means nothing for a constant rate: leave it out, or take another shape")
        return self


class Admit(Section):
    """Which sources a phase lets in; an empty list lets in all. A source may have several languages, licences, teachers: all count."""

    kinds: tuple[Kind, ...] = ()
    """Kinds of text."""
    origins: tuple[Origin, ...] = ()
    """Who wrote it: human, synthetic (a model) or rule (a program)."""
    languages: tuple[str, ...] = ()
    """As the manifests of the sources name them, such as ja."""
    licences: tuple[str, ...] = ()
    """As the manifests name them, such as Apache-2.0."""
    teachers: tuple[str, ...] = ()
    """Names of the models that wrote synthetic text."""


class Portion(Section):
    """What a phase takes of a source: a share by `weight`, or a fixed amount, so many `tokens` or so many `epochs` of it; one of the three.

    A plain number in the place of this section is a weight.
    """

    weight: Share | None = None
    """Share of what the amounts leave of the phase's tokens, relative to the other weights."""
    tokens: PositiveInt | None = None
    """So many tokens of it."""
    epochs: Share | None = None
    """So many times all of it."""
    loss_weight: Share = 1.0
    """Of each of its tokens in the loss."""

    @pydantic.model_validator(mode="after")
    def _is_one(self) -> "Portion":
        if sum(value is not None for value in (self.weight, self.tokens, self.epochs)) != 1:
            raise ValueError("a source is taken by weight, tokens or epochs: write one of them")
        return self

    @property
    def is_amount(self) -> bool:
        return self.weight is None


class NextToken(Section):
    """The cross-entropy of each token with the text before it (`losses/next_token.py`)."""

    kind: Literal["next_token"] = "next_token"
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the mean square of log Z of the output's softmax (PaLM)."""
    token_weights: str | None = None
    """The channel of the binaries that weighs each token; null: all count alike."""


class BatchRamp(Section):
    """The global batch size grows from `start` by `increment` to the phase's own, in equal stretches of the first `tokens` of the phase."""

    start: PositiveInt
    """Samples of the first global batch; below the phase's `global_batch_size`."""
    increment: PositiveInt
    """Samples by which it grows; whole increments lead to the phase's `global_batch_size`."""
    tokens: PositiveInt
    """The first so many tokens of the phase, shared evenly by the smaller batches."""


class PhaseMoE(Section):
    """What a phase sets for itself of the section `moe`; null: as it stands there."""

    load_balancing_loss: NonNegativeFloat | None = None
    """Coefficient of the balancing loss; 0: none."""
    router_z_loss: NonNegativeFloat | None = None
    """Coefficient of the mean square of log Z of the router's logits; 0: none."""
    bias_update_rate: NonNegativeFloat | None = None
    """What the bias of an expert moves in a step; 0: it stays, as at the end of DeepSeek-V3's training."""


class Phase(Section):
    """A stretch of training with one mix.

    A source is given by weight, or by an amount; weights share what the amounts leave of `tokens`. Without `tokens` every source has an
    amount, and the budget is their sum (`phases.resolve` writes it in).
    """

    name: str
    """Stands in logs and the ledger; every name once."""
    tokens: PositiveInt | None = None
    """Budget in tokens, of which whole steps are trained; null where every source has an amount: their sum."""
    sequence_length: PositiveInt = Field(le=2**31)
    """Tokens of a sample; divides `data.block_length`."""
    global_batch_size: Size
    """Samples of a step, all ranks together; a multiple of micro-batch size × data-parallel size."""
    batch_ramp: BatchRamp | None = None
    """The batch grows to `global_batch_size`; null: it is that from the first step."""
    sources: dict[str, Share | Portion] = Field(min_length=1)
    """What is trained on, by the names of the binaries in `data.folder`: a weight, or a section with an amount."""
    learning_rate: LearningRate
    """The phase's piece of the learning-rate curve."""
    loss: NextToken = NextToken()
    """What is minimised."""
    moe: PhaseMoE = PhaseMoE()
    """How its routers are trained, where it differs from the section `moe`."""
    optimizer: Literal["keep", "reset"] = "keep"
    """`reset`: the phase begins without AdamW's moments of the steps before it."""
    admit: Admit = Admit()
    """Which sources may stand here; one that may not is an error that names it."""
    separate_documents: bool = False
    """Attention stays within a document, and positions start anew with each."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _earlier_spelling(cls, values: Any) -> Any:
        """Checkpoints of version 0.1 have `z_loss` beside the phase's other fields."""
        if isinstance(values, dict) and "z_loss" in values and isinstance(values.get("loss", {}), dict):
            loss = {"z_loss": values["z_loss"]} | values.get("loss", {})
            return {name: value for name, value in values.items() if name != "z_loss"} | {"loss": loss}
        return values

    def portion(self, source: str) -> Portion:
        value = self.sources[source]
        return value if isinstance(value, Portion) else Portion(weight=value)

    @property
    def tokens_per_step(self) -> int:
        """At the end of the batch ramp, where there is one."""
        return self.sequence_length * self.global_batch_size

    @property
    def batch_sizes(self) -> list[int]:
        """Every global batch size of the phase, in samples, the smallest first."""
        ramp = self.batch_ramp
        return [*(range(ramp.start, self.global_batch_size, ramp.increment) if ramp else ()), self.global_batch_size]

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """(global batch size, steps) from the first step to the last. Needs `tokens`, which `phases.resolve` writes in."""
        assert self.tokens is not None
        stretches, rest = [], self.tokens
        for size in self.batch_sizes[:-1]:
            assert self.batch_ramp is not None  # else there is one size
            steps = -(-self.batch_ramp.tokens // (len(self.batch_sizes[:-1]) * size * self.sequence_length))
            stretches.append((size, steps))
            rest -= steps * size * self.sequence_length
        return [*stretches, (self.global_batch_size, max(0, rest // self.tokens_per_step))]

    @property
    def num_steps(self) -> int:
        return sum(steps for _, steps in self.stretches)

    def batch_size(self, step: int) -> int:
        """The global batch size, in samples, of the phase's step `step` (from 0)."""
        return self.num_samples(step + 1) - self.num_samples(step)

    def num_samples(self, steps: int) -> int:
        """Samples in the first `steps` steps of the phase."""
        samples = 0
        for size, there in self.stretches:
            samples += size * min(steps, there)
            steps -= min(steps, there)
        return samples

    @pydantic.model_validator(mode="after")
    def _can_be(self) -> "Phase":
        if (ramp := self.batch_ramp) and (ramp.start >= self.global_batch_size or (self.global_batch_size - ramp.start) % ramp.increment):
            raise ValueError(
                f"phase {self.name}: batch_ramp must reach global_batch_size ({self.global_batch_size}) from start ({ramp.start}) in whole "
                f"increments ({ramp.increment}): change one of them"
            )
        if ramp and (steps := (self.global_batch_size - ramp.start) // ramp.increment) > MOST_INCREMENTS:
            raise ValueError(
                f"phase {self.name}: batch_ramp.increment ({ramp.increment}) makes {steps:,} batch sizes, and {MOST_INCREMENTS:,} are the "
                "most: raise it"
            )
        if self.tokens is None:
            for source in self.sources:
                if (weight := self.portion(source).weight) is not None:
                    raise ValueError(
                        f"phase {self.name}: tokens is missing, and source {source} has a weight ({weight:g}): write the phase's tokens, "
                        f"or an amount of {source}"
                    )
            return self
        if not self.stretches[-1][1]:
            raise ValueError(
                f"phase {self.name}: tokens ({self.tokens:,}) must hold at least one step of {self.tokens_per_step:,} tokens"
                + (f" behind the batch_ramp ({self.batch_ramp.tokens:,} tokens, in whole steps)" if self.batch_ramp else "")
                + ": raise it"
            )
        warmup, decay = self.learning_rate.warmup_steps, self.learning_rate.decay_steps or 0
        if warmup + decay > self.num_steps:
            raise ValueError(
                f"phase {self.name}: learning_rate.warmup_steps ({warmup:,}) and decay_steps ({decay:,}) must fit into the phase's "
                f"{self.num_steps:,} steps: lower them, or raise tokens"
            )
        return self


class DataConfig(Section):
    """Where the token binaries are (`<folder>/<source>.bin/.idx/.json`) and how their streams are cut."""

    folder: Path
    """The token binaries and their manifests."""
    block_length: PositiveInt = 8192
    """Tokens that stay together in the shuffled order; every phase's `sequence_length` divides it."""
    max_epochs: PositiveInt = 1
    """How often a token may be trained on, all phases together."""
    validation_tokens: NonNegativeInt = 0
    """Tokens of each source, in whole blocks, that are held out of training and make its validation set."""


class TrainConfig(Section):
    """How steps are computed, and what happens every so many of them."""

    micro_batch_size: PositiveInt
    """Samples that a rank takes through forward and backward at once. No result depends on it but the last bits."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Of the products; `fp8`: the matrix products only, by Transformer Engine, on Hopper or newer. The optimizer is float32 always."""
    recompute: Literal["none", "attention", "layers"] = "none"
    """Activations that the backward pass computes again, to save memory."""
    checkpoint_interval: PositiveInt = 500
    """Steps between checkpoints; the end of a phase is always saved, and kept."""
    keep_checkpoints: PositiveInt = 2
    """The newest so many are kept."""
    keep_every: PositiveInt | None = None
    """Steps: the checkpoints at its multiples are kept as well; null: none more."""
    asynchronous_save: bool = True
    """Training goes on while a checkpoint is written."""
    validation_interval: PositiveInt = 500
    """Steps between validations, with `data.validation_tokens`."""
    layer_norms_interval: PositiveInt | None = None
    """Steps between records of each layer's gradient and weight norm; null: none."""
    fp8_shadow_interval: PositiveInt = 100
    """Steps between comparisons of the loss in fp8 with the one in bf16."""
    hang_minutes: PositiveFloat = Field(default=10, le=100_000)
    """Minutes in which no rank ends a step or a batch of a validation, reads or writes, after which the run counts as hung and ends with
    the stacks of all ranks in its logs.
    """
    init_from: Path | None = None
    """A checkpoint or Hugging Face folder whose weights (and no optimizer state) start the run."""


class StabilityConfig(Section):
    """What is done about a step whose loss or gradient norm stands out, or is not a number.

    A spike lies more than `deviations` median absolute deviations (scaled to a standard deviation) above the median of the last `window`
    steps. `skip` leaves the update out; `rollback` goes back to the newest checkpoint at or before `pass_over` steps ago and passes over
    the data of those steps, the one that stood out included. Where no checkpoint of the phase is so old, fewer steps are passed over.
    """

    on_spike: Literal["log", "skip", "rollback"] = "log"
    """What a spike of the loss or of the gradient norm leads to."""
    on_not_finite: Literal["skip", "rollback"] = "rollback"
    """What NaN or Inf leads to."""
    window: PositiveInt = 128
    """Steps whose median and deviation a step is held against."""
    deviations: PositiveFloat = 6.0
    """A spike lies so many deviations above the median."""
    pass_over: PositiveInt = 8
    """Steps whose data a rollback passes over. The checkpoints that it can need are kept, whatever `train.keep_checkpoints` says."""
    max_rollbacks: NonNegativeInt = 3
    """After so many rollbacks the run stops with a diagnosis."""
    max_skips: PositiveInt = 8
    """After so many skipped updates, one after the other, it stops too."""

    @property
    def may_roll_back(self) -> bool:
        return "rollback" in (self.on_spike, self.on_not_finite)

    def checkpoints_needed(self, interval: int) -> int:
        """How many are kept for the next rollback, with `interval` steps between them."""
        return 1 + math.ceil((self.pass_over - 1) / interval) if self.may_roll_back else 1


class WandbConfig(Section):
    """Also sends the metrics to Weights & Biases (`pip install wandb`; WANDB_MODE=offline keeps them here)."""

    project: str
    """Project of W&B."""
    entity: str | None = None
    """Team or user; null: the account's default."""
    name: str | None = None
    """Of the run there; null: W&B invents one."""


class PrometheusConfig(Section):
    """Also serves the metrics to Prometheus, at http://HOST:port/metrics on the node of rank 0 (`prometheus.py`)."""

    port: int = Field(default=9410, ge=1024, le=65520)
    """TCP port, or one of the 15 behind it where it is taken; 9400 is that of NVIDIA's DCGM exporter."""
    targets: Path | None = None
    """The folder of Prometheus's file_sd_configs, where the run says on which host and port it is; null: nowhere."""


class RunConfig(Section):
    """A run: a model, the phases that train it, and how."""

    from_file: ClassVar = ("phases",)

    run: Path
    """The run folder: resolved configuration, checkpoints, metrics, logs."""
    seed: NonNegativeInt = 1
    """Of the order of the data, a new model's weights and new experts."""
    tokenizer: Path
    """Folder of the tokenizer that the binaries were made with."""
    end_of_document: str | None = None
    """The piece that ends every document of the binaries, as they were prepared; null: the tokenizer's `eos_token`."""
    begin_documents: BeginDocuments = "auto"
    """Whether the tokenizer's `bos_token` begins every document of the binaries, as they were prepared; the exported tokenizer does so too.
    """
    model: ModelConfig
    """Shape of the model."""
    moe: MoEConfig | None = None
    """Experts in the place of FFNs; null: a dense model."""
    parallel: ParallelConfig = ParallelConfig()
    """How the processes share the model."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    data: DataConfig
    """The token binaries."""
    train: TrainConfig
    """Micro-batches, precision, checkpoints and intervals."""
    stability: StabilityConfig = StabilityConfig()
    """What is done about steps that stand out."""
    wandb: WandbConfig | None = None
    """Metrics to Weights & Biases; null: no."""
    prometheus: PrometheusConfig | None = None
    """Metrics to Prometheus; null: no."""
    phases: tuple[Phase, ...]
    """The stretches of the training, in order; a list, or the path of a file (relative to this one) that holds one under `phases:`.

    None only in the checkpoint of a model that was imported and not trained here.
    """

    @pydantic.model_validator(mode="after")
    def _one_start(self) -> "RunConfig":
        if self.moe and self.moe.upcycle_from and self.train.init_from:
            raise ValueError(
                f"moe.upcycle_from ({self.moe.upcycle_from}) and train.init_from ({self.train.init_from}) both say where the run starts: "
                "write null for one of them"
            )
        if self.moe and self.moe.upcycle_from and (reason := self.moe.why_not_upcycled(self.model)):
            raise ValueError(reason)
        return self

    @pydantic.model_validator(mode="after")
    def _phases_agree(self) -> "RunConfig":
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"phases: every name must stand once, these do not: {', '.join(names)}")
        for phase in self.phases:
            if self.data.block_length % phase.sequence_length:
                raise ValueError(
                    f"phases.{phase.name}.sequence_length ({phase.sequence_length}) must divide "
                    f"data.block_length ({self.data.block_length}): change one of them"
                )
            if not self.moe and (named := phase.moe.model_dump(exclude_none=True)):
                raise ValueError(f"phases.{phase.name}.moe.{next(iter(named))} needs a moe section: add it, or leave it out")
        return self


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The configuration in `path` with dotted `key=value` overrides on top; raises UserError."""
    config = read_yaml(path, RunConfig, overrides)
    if not config.phases:
        raise UserError(f"{path}: phases ([]) must hold at least one phase: write one")
    return config


def from_dict(values: dict[str, Any], where: str) -> RunConfig:
    """A configuration that was stored as plain values (in a checkpoint)."""
    return parse(values, RunConfig, where)
