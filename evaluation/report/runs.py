"""Run folders as the report reads them: `config.yaml`, `metrics.jsonl`, `events.jsonl`, `rollbacks.json`, `checkpoints/latest/ledger.json`.

A run may still be going on, and older ones recorded less: what is not there is None or empty.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pydantic

from evaluation.report.charts import Band, Line, Mark, Points, smooth
from mujina import gaps
from mujina.checkpoint_folders import resolved, step_folder
from mujina.checkpoint_folders import steps as steps_in
from mujina.user_input import Section, UserError, parse, parse_object, read_object, read_text, read_yaml, reading

_SMOOTHED_SHARE = 1 / 40  # of a run's steps: the window of the smoothed lines, and "the end" of a run
# What `mujina train` writes of its own: a spike that was only logged is "update", since the step's update was made.
EVENT_COLOURS = {
    "update": "var(--event-0)",
    "spike": "var(--event-0)",
    "skip": "var(--event-1)",
    "rollback": "var(--event-2)",
    "restart": "var(--event-3)",
}
OTHER_EVENT_COLOUR = "var(--event-4)"


class _Part(Section):
    """What the page shows of a file; other rooms may write more into it, and a loss that is not finite."""

    model_config = pydantic.ConfigDict(extra="ignore", allow_inf_nan=True)


class GpuHealth(_Part):
    """The worst over all GPUs of a run. `slowed` has for a rank the reasons, in words, why its clock is lowered."""

    hottest_c: float | None = None
    power_w: float | None = None
    slowest_mhz: float | None = None
    ecc_errors: int | None = None
    slowed: dict[str, list[str]] = {}


class Step(_Part):
    """One line of `metrics.jsonl`; `megatron_jobs/monitoring/metrics.py` says what its fields mean."""

    step: int
    tokens: int
    phase: str
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    tokens_per_second: float
    expert_load: list[list[float]] | None = None
    load_entropy: list[float] | None = None
    router_entropy: list[float] | None = None
    dropped: list[float] | None = None
    expert_similarity: list[float] | None = None
    loss_by_source: dict[str, float] = {}
    tokens_by_source: dict[str, int] = {}
    weight_by_source: dict[str, float] = {}
    trained_by_source: dict[str, int] = {}
    z_loss: float | None = None
    load_balancing_loss: float | None = None
    router_z_loss: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    chosen_log_probability: float | None = None
    rejected_log_probability: float | None = None
    validation: dict[str, float] = {}
    layer_norms: dict[str, dict[str, float]] = {}
    fp8_shadow: dict[str, float] = {}
    data_seconds: float | None = None
    tokens_per_second_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    memory_reserved_gib: float | None = None
    gpu: GpuHealth | None = None


class Event(Section):
    """One line of `events.jsonl`; its further fields are in `model_extra`."""

    model_config = pydantic.ConfigDict(extra="allow")

    time: float = pydantic.Field(ge=0, lt=1e11)  # seconds since 1970
    step: int
    what: str


class SourceUse(_Part):
    """What a phase has consumed of one source."""

    tokens: int
    samples: int


class PhaseUse(_Part):
    """What a phase has consumed."""

    name: str
    tokens: int
    steps: int
    sources: dict[str, SourceUse]


class Ledger(_Part):
    """What a checkpoint has consumed."""

    tokens: int
    phases: list[PhaseUse]


class ModelShape(_Part):
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int


class MoEShape(_Part):
    num_experts: int
    top_k: int
    every: int = 1
    upcycle_from: str | None = None


class PlannedPhase(_Part):
    tokens: int


class TrainOptions(_Part):
    init_from: str | None = None


class Config(_Part):
    """What the page's first table says of a run; the whole file stands below it."""

    model: ModelShape
    moe: MoEShape | None = None
    parallel: dict[str, int] = {}
    train: TrainOptions = TrainOptions()
    phases: list[PlannedPhase]


@dataclass(frozen=True)
class Run:
    """A run folder, read. `window` is the number of steps over which lines are smoothed."""

    name: str
    colour: str
    config: Config
    config_text: str
    steps: list[Step]
    events: list[Event]  # without the saves
    saves: list[Event]
    ledger: Ledger
    lost: str = ""  # steps whose lines are gone, in words
    left_out: tuple[str, ...] = ()  # what could not be read, in words

    @property
    def window(self) -> int:
        return max(1, round(len(self.steps) * _SMOOTHED_SHARE))

    @property
    def bands(self) -> list[Band]:
        """The phases that the steps went through, over tokens."""
        bands: list[Band] = []
        start = 0 if self.steps[0].step == 1 else self.steps[0].tokens
        for phase, steps in groupby(self.steps, key=lambda step: step.phase):
            end = list(steps)[-1].tokens
            bands.append(Band(phase, start, end))
            start = end
        return bands

    @property
    def marks(self) -> list[Mark]:
        """The events over tokens."""
        return [
            Mark(event_text(event), EVENT_COLOURS.get(event.what, OTHER_EVENT_COLOUR), self.tokens_at(event.step)) for event in self.events
        ]

    def tokens_at(self, step: int) -> int:
        """Tokens consumed when `step` was done, as far as the steps tell."""
        return max((one.tokens for one in self.steps if one.step <= step), default=0)

    def line(self, field: str, log: bool = False, smoothed: bool = True) -> Line:
        """A field of the steps over tokens; `log` as for the chart that it goes into."""
        return self.series(lambda step: getattr(step, field), self.name, self.colour, log, smoothed)

    def series(
        self,
        value: Callable[[Step], float | None],
        label: str,
        colour: str,
        log: bool = False,
        smoothed: bool = True,
        show_raw: bool = True,
    ) -> Line:
        """`value` of the steps that have it, smoothed within each phase, and unsmoothed behind it."""
        found = [(step, number) for step in self.steps if (number := value(step)) is not None]
        raw = [(step.tokens, number) for step, number in found]
        if not smoothed:
            return Line(label, colour, raw)
        points = smooth_by_phase(raw, [step for step, _ in found], self.window, log)
        return Line(label, colour, points, raw if show_raw else ())

    def largest_sources(self, count: int) -> list[str]:
        """The sources that the steps tell of, those with most tokens first."""
        tokens: Counter[str] = Counter()
        for step in self.steps:
            tokens.update(step.tokens_by_source)
            tokens.update(dict.fromkeys([*step.loss_by_source, *step.validation], 0))
        return [source for source, _ in tokens.most_common(count)]


def event_text(event: Event) -> str:
    """What happened, for people."""
    facts = event.model_extra or {}
    told = facts.get("reason") or ", ".join(f"{key} {value}" for key, value in facts.items())
    return f"step {event.step:,}, {event.what}" + (f": {told}" if told else "")


def smooth_by_phase(points: Points, steps: list[Step], window: int, log: bool = False) -> list[tuple[float, float]]:
    """`points` (one for each step) smoothed within each phase: what jumps at a boundary should be seen to jump.

    With `log` the mean is the geometric one, which a single spike cannot lift for a whole window.
    """
    if log:
        logs = [(x, math.log(y) if y > 0 else math.nan) for x, y in points]
        return [(x, math.exp(y)) for x, y in smooth_by_phase(logs, steps, window)]
    smoothed: list[tuple[float, float]] = []
    for _, group in groupby(zip(points, steps, strict=True), key=lambda pair: pair[1].phase):
        smoothed += smooth([point for point, _ in group], window)
    return smoothed


def read_run(folder: Path, name: str, colour: str) -> Run:
    """Reads a run folder; raises UserError naming the file that is missing or does not fit, and the command that writes it.

    A page can do without lines that are none, and without a ledger: what is left out for that is told on it.
    """
    remedy = f"`mujina train` writes it: train the run, or check that {folder} is a run folder"
    config_path = folder / "config.yaml"
    config_text = read_text(config_path, remedy)
    try:
        config = read_yaml(config_path, Config)
    except UserError as error:
        raise UserError(f"{error}; `mujina train` writes the file anew when the run goes on") from None
    left_out = list[str]()
    by_number = {step.step: step for step in _read_lines(folder / "metrics.jsonl", Step, remedy, left_out)}
    steps = [by_number[number] for number in sorted(by_number)]
    if not steps:
        told = "".join(f" ({one})" for one in left_out)
        raise UserError(
            f"{folder / 'metrics.jsonl'}: holds no finished step{told}: wait for the first one, or start the run with `mujina train`"
        )
    events_path = folder / "events.jsonl"
    events = _read_lines(events_path, Event, remedy, left_out) if events_path.exists() else []
    # "update" is the verdict on a spike that is only logged: the step's update is made.
    events = [event.model_copy(update={"what": "spike"}) if event.what == "update" else event for event in events]
    saves = [event for event in events if event.what == "checkpoint"]
    others = [event for event in events if event.what != "checkpoint"]
    ledger, lost = _ledger(folder / "checkpoints", left_out), _lost(folder, steps, left_out)
    return Run(name, colour, config, config_text, steps, others, saves, ledger, lost, tuple(left_out))


def _ledger(folder: Path, left_out: list[str]) -> Ledger:
    """That of the newest checkpoint that has one; an empty one where none has."""
    for checkpoint in dict.fromkeys([resolved(folder / "latest"), *(step_folder(folder, step) for step in reversed(steps_in(folder)))]):
        path = checkpoint / "ledger.json"
        try:
            return parse(read_object(path), Ledger, str(path))
        except UserError as error:
            if checkpoint.exists():
                left_out.append(str(error))
    return Ledger(tokens=0, phases=[])


def _lost(folder: Path, steps: list[Step], left_out: list[str]) -> str:
    path, passed_over = folder / "rollbacks.json", list[tuple[int, int]]()
    if path.exists():
        try:
            with reading(path, "a list of rollbacks", "steps that were passed over count as lost"):
                passed_over = [(int(back["first"]), int(back["last"])) for back in json.loads(read_text(path))]
        except UserError as error:
            left_out.append(str(error))
    return gaps.lost((step.step for step in steps), steps[-1].step, passed_over)


def _read_lines[T: Section](path: Path, model: type[T], remedy: str, left_out: list[str]) -> list[T]:
    """The lines of a file; those that are none are counted in `left_out`, with what is wrong with the first of them."""
    try:
        # The run may be in the middle of writing its last line, which then has no end yet.
        whole_lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}: {remedy}") from None
    found, wrong = list[T](), list[str]()
    for number, line in enumerate(whole_lines, start=1):
        try:
            found.append(parse(parse_object(line, f"line {number}", "it is left out"), model, f"line {number}"))
        except UserError as error:
            wrong.append(str(error).splitlines()[0])
    if wrong:
        left_out.append(f"{path.name}: {len(wrong):,} of {len(whole_lines):,} lines: {wrong[0]}")
    return found
