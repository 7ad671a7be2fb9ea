"""The configuration of a training run: what may be written in its YAML file, and the rules that hold between the fields.

`load(path, overrides)` reads a file; `planning.layouts.check(config, world_size)` tells whether it can be on so many processes.
Needs no torch. Counts start with `num_`, `tokens` are tokens, intervals are optimizer steps.
"""

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_jobs.config.adapter import AdapterConfig
from megatron_jobs.config.model import ModelConfig, MoEConfig, Size
from megatron_jobs.config.phase import Phase
from mujina.user_input import Section, UserError, parse, read_yaml
from tokenization.tokenizer import BeginDocuments

# Values of the logits of which the loss takes the softmax at a time, in float32: what fits a cache, what keeps a GPU busy.
SOFTMAX_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}


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
    """A checkpoint or Hugging Face folder whose weights (and no optimizer state) start the run; with `adapter`, the frozen base."""


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
    adapter: AdapterConfig | None = None
    """LoRA: low-rank matrices that are trained beside a frozen base, `train.init_from`; null: the model itself is trained."""
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
    def _adapter_fits(self) -> "RunConfig":
        if self.adapter and self.train.init_from is None:
            raise ValueError("adapter needs a base: write train.init_from, a checkpoint or Hugging Face folder, which stays as it is")
        if self.adapter and self.train.precision == "fp8":
            raise ValueError("train.precision (fp8) must be bf16 or fp32 with an adapter: nobody has shown what fp8 does to a frozen base")
        if self.adapter and (reason := self.adapter.why_not_of(self.model, self.moe)):
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
