"""The configuration of a training run: what may be written in its YAML file, and the rules that hold between the fields.

`load(path, overrides)` reads a file; `planning.layouts.check(config, world_size)` tells whether it can be on so many processes.
Needs no torch. Counts start with `num_`, `tokens` are tokens, intervals are optimizer steps.
"""

from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_prep.documents import Kind, Origin
from mujina.user_input import Section, UserError, parse, read_yaml

VOCABULARY_MULTIPLE = 128  # one size at every tensor-parallel size, and a shape that GPU kernels like


class RopeScaling(Section):
    """Llama 3.1's stretched rotary positions (`rope_type: llama3` of transformers): for contexts beyond `original_length` tokens."""

    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_length: PositiveInt = 8192

    @pydantic.model_validator(mode="after")
    def _grows(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor}): raise it")
        return self


class ModelConfig(Section):
    """A decoder of the Llama family: RMSNorm, SwiGLU, rotary positions, grouped queries; and what Qwen2 and Qwen3 add to it."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    head_size: PositiveInt  # hidden_size / num_attention_heads where it is left out
    vocab_size: PositiveInt
    norm_epsilon: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10_000
    rope_scaling: RopeScaling | None = None
    init_std: PositiveFloat = 0.02
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm over each query's and each key's head

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
    noise_std: PositiveFloat = 0.01  # noise: relative to the standard deviation of each matrix
    drop_ratio: float = Field(0.5, gt=0, le=1)  # drop: the share of an expert's neurons that are drawn anew
    independent: bool = False  # drop: gate, up and down each draw their neurons, as in the published code
    scaling: Literal["exact", "cube_root"] = "exact"  # granular: on the down projection alone, or Megatron-LM's on all three
    router: Literal["normal", "virtual_groups", "balance_noise"] | None = None  # None: virtual_groups for granular, else normal


class MoEConfig(Section):
    """FFNs that are mixtures of experts. The defaults are Mixtral's: top-k of the router's logits, softmax over the chosen, dropless."""

    num_experts: PositiveInt
    top_k: PositiveInt
    ffn_hidden_size: PositiveInt | None = None  # of one expert; None: the model's
    shared_ffn_hidden_size: NonNegativeInt = 0  # of an expert that every token goes through
    every: PositiveInt = 1  # the first of each so many layers is a mixture, the others are dense
    scores: Literal["topk_softmax", "softmax_topk", "sigmoid"] = "topk_softmax"
    normalize_logits: bool = False  # the router's logits to mean 0 and deviation 1, as in Tanuki; no inference engine knows it
    balancing: Literal["aux_loss", "global_aux_loss", "bias", "none"] = "aux_loss"  # over a micro-batch, over a global batch, aux-free
    load_balancing_loss: NonNegativeFloat = 0.02  # coefficient
    bias_update_rate: PositiveFloat = 1e-3  # a step, of `balancing: bias` (DeepSeek-V3)
    router_z_loss: NonNegativeFloat = 1e-5
    router_init_std: PositiveFloat = 0.01
    capacity_factor: PositiveFloat | None = None  # of an even share of each micro-batch; None: no token is dropped
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    upcycle_from: Path | None = None  # a dense checkpoint or Hugging Face folder that the run starts from
    upcycling: UpcyclingConfig = UpcyclingConfig()

    def expert_width(self, model: ModelConfig) -> int:
        return self.ffn_hidden_size or model.ffn_hidden_size

    def is_mixture(self, layer: int) -> bool:
        """Whether the layer (from 0) has experts."""
        return layer % self.every == 0

    def layers(self, model: ModelConfig) -> list[int]:
        """The layers that are mixtures."""
        return [layer for layer in range(model.num_layers) if self.is_mixture(layer)]

    @property
    def has_load_balancing_loss(self) -> bool:
        return self.load_balancing_loss > 0 and self.balancing in ("aux_loss", "global_aux_loss")

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "MoEConfig":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must not exceed num_experts ({self.num_experts}): lower it")
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


class ParallelConfig(Section):
    """Sizes of the model-parallel dimensions; what is left of the processes is data parallel. Tensor parallel is sequence parallel too.

    Experts divide the tensor, context and data dimensions of a pipeline stage anew: expert_tensor × expert × the copies of each expert.
    """

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1  # chunks of layers in each pipeline stage (interleaved schedule)
    context: PositiveInt = 1
    expert: PositiveInt = 1
    expert_tensor: PositiveInt = 1

    def data(self, world_size: int) -> int:
        return world_size // (self.tensor * self.pipeline * self.context)

    def __str__(self) -> str:
        return ", ".join(f"{field} {size}" for field, size in self if size > 1) or "data parallel only"


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay; none on norms. The learning rate belongs to the phases."""

    beta1: PositiveFloat = 0.9
    beta2: PositiveFloat = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_grad: PositiveFloat = 1.0


class LearningRate(Section):
    """The piece of the learning-rate curve that belongs to one phase: a linear warm-up from 0, then `start` to `end`.

    With `decay_steps` the way down takes only the last steps of the phase, and before it the rate stays at `start`
    (warm-up, stable, decay). "1-sqrt" and "exponential" are the decays of Hägele et al. 2024 (arXiv 2405.18392) and of MiniCPM.
    """

    start: PositiveFloat
    end: NonNegativeFloat
    shape: Literal["constant", "linear", "cosine", "1-sqrt", "exponential"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None

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
    origins: tuple[Origin, ...] = ()
    languages: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()


class Portion(Section):
    """What a phase takes of a source: a share by `weight`, or a fixed amount, so many `tokens` or so many `epochs` of it; one of the three.

    A plain number in the place of this section is a weight.
    """

    weight: PositiveFloat | None = None
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    loss_weight: PositiveFloat = 1.0  # of each of its tokens in the loss

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
    z_loss: NonNegativeFloat = 0.0  # times the mean square of log Z of the output's softmax (PaLM)
    token_weights: str | None = None  # the channel of the binaries that weighs each token; None: all count alike


class BatchRamp(Section):
    """The global batch size grows from `start` by `increment` to the phase's own, in equal stretches of the first `tokens` of the phase."""

    start: PositiveInt
    increment: PositiveInt
    tokens: PositiveInt


class Phase(Section):
    """A stretch of training with one mix.

    A source is given by weight, or by an amount; weights share what the amounts leave of `tokens`. Without `tokens` every source has an
    amount, and the budget is their sum (`phases.resolve` writes it in).
    """

    name: str
    tokens: PositiveInt | None = None
    sequence_length: PositiveInt
    global_batch_size: PositiveInt
    batch_ramp: BatchRamp | None = None
    sources: dict[str, PositiveFloat | Portion] = Field(min_length=1)
    learning_rate: LearningRate
    loss: NextToken = NextToken()
    optimizer: Literal["keep", "reset"] = "keep"  # reset: the phase begins without the moments of the steps before it
    admit: Admit = Admit()
    separate_documents: bool = False  # attention stays within a document, and positions start anew with each

    @pydantic.model_validator(mode="before")
    @classmethod
    def _earlier_spelling(cls, values: Any) -> Any:
        """Checkpoints of version 0.1 have `z_loss` beside the phase's other fields."""
        if isinstance(values, dict) and "z_loss" in values:
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
    block_length: PositiveInt = 8192  # tokens; every phase's sequence_length divides it
    max_epochs: PositiveInt = 1
    validation_tokens: NonNegativeInt = 0  # of each source, in whole blocks, are held out of training and make its validation set


class TrainConfig(Section):
    micro_batch_size: PositiveInt
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"  # fp8: the matrix products only, by Transformer Engine
    recompute: Literal["none", "attention", "layers"] = "none"  # activations that the backward pass computes again
    checkpoint_interval: PositiveInt = 500  # steps; the end of a phase is always saved, and kept
    keep_checkpoints: PositiveInt = 2  # the newest so many
    keep_every: PositiveInt | None = None  # steps: those at its multiples are kept as well
    asynchronous_save: bool = True  # training goes on while a checkpoint is written
    validation_interval: PositiveInt = 500  # steps
    layer_norms_interval: PositiveInt | None = None  # steps between records of each layer's gradient and weight norm
    fp8_shadow_interval: PositiveInt = 100  # steps between comparisons of the loss in fp8 with the one in bf16
    hang_minutes: PositiveFloat = 10  # without an ended step, after which the run counts as hung
    init_from: Path | None = None  # a checkpoint or Hugging Face folder whose weights (and no optimizer state) start the run


class StabilityConfig(Section):
    """What is done about a step whose loss or gradient norm stands out, or is not a number.

    A spike lies more than `deviations` median absolute deviations (scaled to a standard deviation) above the median of the last `window`
    steps. `skip` leaves the update out; `rollback` goes back to the newest checkpoint at or before `pass_over` steps ago and passes over
    the data of those steps, the one that stood out included.
    """

    on_spike: Literal["log", "skip", "rollback"] = "log"
    on_not_finite: Literal["skip", "rollback"] = "rollback"
    window: PositiveInt = 128
    deviations: PositiveFloat = 6.0
    pass_over: PositiveInt = 8
    max_rollbacks: NonNegativeInt = 3
    max_skips: PositiveInt = 8  # one after the other


class WandbConfig(Section):
    """Also sends the metrics to Weights & Biases (`pip install wandb`; WANDB_MODE=offline keeps them here)."""

    project: str
    entity: str | None = None
    name: str | None = None


class PrometheusConfig(Section):
    """Also serves the metrics to Prometheus, at http://HOST:port/metrics on the node of rank 0 (`prometheus.py`)."""

    port: int = Field(9410, ge=1024, le=65520)  # or one of the 15 behind it; 9400 is that of NVIDIA's DCGM exporter
    targets: Path | None = None  # the folder of Prometheus's file_sd_configs, where the run says on which host and port it is


class RunConfig(Section):
    run: Path  # the run folder
    seed: NonNegativeInt = 1
    tokenizer: Path
    model: ModelConfig
    moe: MoEConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig
    train: TrainConfig
    stability: StabilityConfig = StabilityConfig()
    wandb: WandbConfig | None = None
    prometheus: PrometheusConfig | None = None
    phases: tuple[Phase, ...]  # none only in the checkpoint of a model that was imported and not trained here

    @pydantic.field_validator("phases", mode="before")
    @classmethod
    def _phase_file(cls, value: Any) -> Any:
        """`phases:` is a list, or the path of a file that holds such a list under `phases:`."""
        return read_yaml(value, _PhaseFile).phases if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _one_start(self) -> "RunConfig":
        if self.moe and self.moe.upcycle_from and self.train.init_from:
            raise ValueError(
                f"moe.upcycle_from ({self.moe.upcycle_from}) and train.init_from ({self.train.init_from}) both say where the run starts: "
                "write null for one of them"
            )
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
        return self


class _PhaseFile(Section):
    phases: list[dict[str, Any]]


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The configuration in `path` with dotted `key=value` overrides on top; raises UserError."""
    config = read_yaml(path, RunConfig, overrides)
    if not config.phases:
        raise UserError(f"{path}: phases ([]) must hold at least one phase: write one")
    return config


def from_dict(values: dict[str, Any], where: str) -> RunConfig:
    """A configuration that was stored as plain values (in a checkpoint)."""
    return parse(values, RunConfig, where)
