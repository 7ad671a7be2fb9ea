"""A phase of a run's configuration: its mix, its budget, its batches, its learning rate, its loss."""

from typing import Annotated, Any, ClassVar, Literal

import pydantic
from annotated_types import Gt, Le
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_prep.row import Kind, Origin
from megatron_jobs.config.model import PhaseMoE, Size
from mujina.user_input import Section

MOST_INCREMENTS = 1_000  # of a batch ramp
Share = Annotated[float, Gt(0), Le(10**15)]


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


class Answers(Section):
    """The cross-entropy of what the assistant has to say, in whole dialogues that are packed into samples (`data/packing.py`).

    Attention stays within a dialogue. Sources are of kind chat, prepared with `answer_weights: true`.
    """

    kind: Literal["answers"] = "answers"
    mean_over: Literal["tokens", "dialogues"] = "tokens"
    """What the loss is a mean over: all that is said in the global batch, token by token, or its dialogues, each of which then counts
    alike, however long its answers are.
    """
    too_long: Literal["stop", "cut", "drop"] = "stop"
    """What a dialogue of more than `sequence_length` tokens does: stop the run before it begins, be cut (and left out where no answer
    begins before the cut), or be left out.
    """

    token_weights: ClassVar[str] = "weights"
    """The channel of the binaries that tells what the assistant says."""


class Preference(Section):
    """Of two answers to a prompt the chosen one gains probability over the rejected one, compared with the weights that the phase begins
    with, or in a run with an adapter with its base: direct preference optimization (`losses/preference.py`). Sources are of kind
    preferences.
    """

    kind: Literal["preference"] = "preference"
    form: Literal["dpo", "ipo"] = "dpo"
    """The loss of a pair: of Rafailov et al. 2023 (arXiv 2305.18290), or of Azar et al. 2023 (arXiv 2310.12036), by token."""
    beta: PositiveFloat = Field(default=0.1, le=1000)
    """How much of the difference to the reference counts; small: far from it costs little."""
    label_smoothing: NonNegativeFloat = Field(default=0.0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round; for `dpo`."""
    nll_weight: NonNegativeFloat = Field(default=0.0, le=1000)
    """Coefficient of the chosen answers' own cross-entropy, a mean by answer (arXiv 2404.19733), which keeps them likely."""
    too_long: Literal["stop", "drop"] = "stop"
    """What a pair does whose two dialogues have more than `sequence_length` tokens together: stop the run before it begins, or be left out.
    """

    token_weights: ClassVar[str] = "weights"
    """The channel of the binaries that tells which tokens are the two answers'."""

    @pydantic.model_validator(mode="after")
    def _smooths(self) -> "Preference":
        if self.label_smoothing and self.form != "dpo":
            raise ValueError(f"label_smoothing ({self.label_smoothing:g}) means nothing for form {self.form}: leave it out")
        return self


Loss = Annotated[NextToken | Answers | Preference, Field(discriminator="kind")]


class BatchRamp(Section):
    """The global batch size grows from `start` by `increment` to the phase's own, in equal stretches of the first `tokens` of the phase."""

    start: PositiveInt
    """Samples of the first global batch; below the phase's `global_batch_size`."""
    increment: PositiveInt
    """Samples by which it grows; whole increments lead to the phase's `global_batch_size`."""
    tokens: PositiveInt
    """The first so many tokens of the phase, shared evenly by the smaller batches."""


class Phase(Section):
    """A stretch of training with one mix.

    A source is given by weight, or by an amount; weights share what the amounts leave of `tokens`. Without `tokens` every source has an
    amount, and the budget is their sum (`phases.resolve` writes it in). A phase of dialogues (`loss.kind: answers` or `preference`) is
    always given by amounts, and its budget is what their packs take, in whole global batches, the last one filled up with nothing.
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
    loss: Loss = NextToken()
    """What is minimised."""
    moe: PhaseMoE = PhaseMoE()
    """How its routers are trained, where it differs from the section `moe`."""
    optimizer: Literal["keep", "reset"] = "keep"
    """`reset`: the phase begins without AdamW's moments of the steps before it."""
    admit: Admit = Admit()
    """Which sources may stand here; one that may not is an error that names it."""
    separate_documents: bool = False
    """Attention stays within a document, and positions start anew with each. In a phase of dialogues it always does."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _loss_without_a_kind(cls, values: Any) -> Any:
        """Is that of next tokens. Checkpoints of version 0.1 have `z_loss` beside the phase's other fields."""
        if isinstance(values, dict) and isinstance(loss := values.get("loss", {}), dict):
            z_loss = {"z_loss": values["z_loss"]} if "z_loss" in values else {}
            loss = {"kind": "next_token"} | z_loss | loss
            return {name: value for name, value in values.items() if name != "z_loss"} | {"loss": loss}
        return values

    def portion(self, source: str) -> Portion:
        value = self.sources[source]
        return value if isinstance(value, Portion) else Portion(weight=value)

    @property
    def is_of_dialogues(self) -> bool:
        """Whether its samples are packed with whole dialogues (or pairs of them), and no stretches of a stream."""
        return isinstance(self.loss, Answers | Preference)

    @property
    def keeps_apart(self) -> bool:
        """Whether attention stays within documents."""
        return self.separate_documents or self.is_of_dialogues

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
        if self.is_of_dialogues and self.batch_ramp:
            raise ValueError(
                f"phase {self.name}: batch_ramp means nothing in a phase of dialogues (loss.kind {self.loss.kind}): leave it out"
            )
        for source in self.sources if self.is_of_dialogues else ():
            if (weight := self.portion(source).weight) is not None:
                raise ValueError(
                    f"phase {self.name}: takes whole dialogues (loss.kind {self.loss.kind}), and source {source} has a weight "
                    f"({weight:g}): write how much of it, such as {source}: {{epochs: 1}}"
                )
            if self.loss.kind == "preference" and (factor := self.portion(source).loss_weight) != 1:
                raise ValueError(f"phase {self.name}: loss_weight ({factor:g}) of source {source} means nothing for pairs: leave it out")
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
