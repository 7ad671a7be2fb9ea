"""One HTML page about one or several training runs, side by side: losses, data, experts, and answers before and after.

    python -m evaluation.report RUN_FOLDER… --output report.html [--evaluation LABEL=result.json …]

Reads `config.yaml`, `metrics.jsonl` and `checkpoints/latest/ledger.json` of each run folder (a run may still be going on), and the result
files of `mujina evaluate` in the order given. The page is one file that loads nothing.
"""

import math
import random
import shlex
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import pydantic
import typer
import yaml

import user_input
from evaluation.arithmetic import Result, Sample
from evaluation.charts import Band, Bar, Line, Points, heat_map, limits, line_chart, short, smooth, stacked_bars
from evaluation.files import parse_object, read_text
from files import write_whole
from page import OTHER_RUN_COLOUR, RUN_COLOURS, SOURCE_COLOURS, legend, page, swatch
from user_input import Section, UserError, parse

_SMOOTHED_SHARE = 1 / 40  # of a run's steps: the window of the smoothed lines, and "the end" of a run
_NUM_SAMPLES = 12  # answers shown
_LANGUAGES = {"en": "English", "ja": "Japanese"}


class _Part(Section):
    """What the page shows of a file; other rooms may write more into it."""

    model_config = pydantic.ConfigDict(extra="ignore")


class Step(_Part):
    """One line of `metrics.jsonl`. `tokens` are those consumed after the step; `expert_load[layer][expert]` sums to 1 over a layer."""

    step: int
    tokens: int
    phase: str
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    tokens_per_second: float
    expert_load: list[list[float]] | None = None


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


class PlannedPhase(_Part):
    tokens: int


class TrainOptions(_Part):
    init_from: str | None = None


class Config(_Part):
    """What the page's first table says of a run; the whole file stands below it."""

    model: ModelShape
    moe: MoEShape | None = None
    parallel: dict[str, Any] = {}
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
    ledger: Ledger

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

    def line(self, field: str, log: bool = False) -> Line:
        """A field of the steps over tokens, with its smoothed line; `log` as for the chart that it goes into."""
        raw = [(step.tokens, getattr(step, field)) for step in self.steps]
        if field == "lr":  # has no noise, and corners that should be seen
            return Line(self.name, self.colour, raw)
        return Line(self.name, self.colour, _smooth_by_phase(raw, self.steps, self.window, log), raw)


@dataclass(frozen=True)
class Evaluation:
    """A result of `mujina evaluate` under the name that the page gives it."""

    label: str
    result: Result


def read_run(folder: Path, name: str, colour: str) -> Run:
    """Reads a run folder; raises UserError naming the file that is missing or does not fit, and the command that writes it."""
    remedy = f"`mujina train` writes it: train the run, or check that {folder} is a run folder"
    config_path = folder / "config.yaml"
    config_text = read_text(config_path, remedy)
    try:
        values = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise UserError(f"{config_path}: is not YAML ({error}): {remedy}") from None
    if not isinstance(values, dict):
        raise UserError(f"{config_path}: holds no keys: {remedy}")
    config = parse(values, Config, str(config_path))

    ledger_path = folder / "checkpoints" / "latest" / "ledger.json"
    ledger_remedy = "`mujina train` writes it with the first checkpoint: wait for that, or lower train.checkpoint_interval"
    ledger = parse(parse_object(read_text(ledger_path, ledger_remedy), str(ledger_path), ledger_remedy), Ledger, str(ledger_path))
    return Run(name, colour, config, config_text, _read_steps(folder / "metrics.jsonl", remedy), ledger)


def _read_steps(path: Path, remedy: str) -> list[Step]:
    # The run may be in the middle of writing its last line, which then has no end yet.
    whole_lines = read_text(path, remedy).split("\n")[:-1]
    if not whole_lines:
        raise UserError(f"{path}: holds no finished step: wait for the first one, or start the run with `mujina train`")
    remedy = "take the line out, or go on with `mujina train`, which tidies the file"
    wheres = [f"{path}: line {number}" for number in range(1, len(whole_lines) + 1)]
    return [parse(parse_object(line, where, remedy), Step, where) for line, where in zip(whole_lines, wheres, strict=True)]


def read_evaluation(text: str) -> Evaluation:
    """Reads what `LABEL=result.json` names; raises UserError when it is not of that form, or the file is not a result."""
    label, separator, path = text.partition("=")
    if not (label and separator and path):
        raise UserError(f"--evaluation {text!r} is not of the form LABEL=result.json: write for example before=result.json")
    remedy = "`mujina evaluate` writes it"
    return Evaluation(label, parse(parse_object(read_text(Path(path), remedy), path, remedy), Result, path))


def build(runs: list[Run], evaluations: list[Evaluation], command: str) -> str:
    """The page as HTML. `command` is what it was made with."""
    names = ", ".join(run.name for run in runs)
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        f"<h1>Training report: {escape(names)}</h1>",
        _overview(runs),
        _losses(runs),
        _vital_signs(runs),
        _data(runs),
        _experts([run for run in runs if run.steps[-1].expert_load]),
        _evaluations(evaluations),
        f"<footer>Made on {moment} with <code>{escape(command)}</code></footer>",
    ]
    return page(f"Training report: {names}", "\n".join(filter(None, sections)))


def _overview(runs: list[Run]) -> str:
    heads = "".join(f'<th class="run">{swatch(run.colour, run.name)}</th>' for run in runs)
    facts = [_facts(run) for run in runs]
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(fact[name])}</td>' for fact in facts)}</tr>"
        for name in facts[0]
        if any(fact[name] != "–" for fact in facts)
    )
    configs = "".join(
        f"<details><summary>Configuration of {escape(run.name)}</summary><pre>{escape(run.config_text)}</pre></details>" for run in runs
    )
    return f'<div class="panel"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{configs}'


def _facts(run: Run) -> dict[str, str]:
    model, moe, last = run.config.model, run.config.moe, run.steps[-1]
    end = [step.loss for step in run.steps[-run.window :] if math.isfinite(step.loss)]
    over = f" (mean of the last {run.window} steps)" if run.window > 1 else ""
    num_broken = sum(not math.isfinite(step.loss) for step in run.steps)
    return {
        "Model": f"{model.num_layers} layers × {model.hidden_size:,} hidden, FFN {model.ffn_hidden_size:,}",
        "Attention": f"{model.num_attention_heads} heads, {model.num_query_groups} query groups",
        "Vocabulary": f"{model.vocab_size:,}",
        "Experts": f"{moe.num_experts} in each layer, top {moe.top_k}" if moe else "–",
        "Parallel": ", ".join(f"{dimension} {size}" for dimension, size in run.config.parallel.items()) or "–",
        "Weights from": run.config.train.init_from or "–",
        "Steps": f"{last.step:,}",
        "Tokens": f"{last.tokens:,} of {sum(phase.tokens for phase in run.config.phases):,} planned",
        "Time in steps": _duration(sum(step.seconds for step in run.steps)),
        "Tokens per second": f"{short(statistics.median(step.tokens_per_second for step in run.steps))} (median)",
        "Loss at the end": f"{statistics.mean(end):.3f}{over}" if end else "not finite",
        "Steps without a finite loss": f"{num_broken:,}" if num_broken else "–",
    }


def _losses(runs: list[Run]) -> str:
    lines = [run.line("loss") for run in runs]
    x_range, y_range = _x_range(runs), limits(lines)
    width = 1120 if len(runs) == 1 else 540
    panels = []
    for run, line in zip(runs, lines, strict=True):
        others = [Line(other.label, OTHER_RUN_COLOUR, other.points) for other in lines if other is not line]
        chart = line_chart("Loss, nats per token", [*others, line], x_range, y_range, run.bands, size=(width, 320))
        panels.append(f'<div class="panel"><h3>{swatch(run.colour, run.name)}</h3>{chart}</div>')
    grey = " The other runs' lines stand behind in grey." if len(runs) > 1 else ""
    note = f"Thin: each step. Thick: smoothed within a phase. Dotted: a phase begins.{grey}"
    return f'<h2>Loss</h2><p class="note">{note}</p><div class="columns">{"".join(panels)}</div>'


def _vital_signs(runs: list[Run]) -> str:
    signs = [
        ("lr", "Learning rate", False),
        ("grad_norm", "Gradient norm, before clipping", True),
        ("tokens_per_second", "Tokens per second", False),
    ]
    panels = []
    for field, name, log in signs:
        lines = [run.line(field, log) for run in runs]
        low, high = limits(lines)
        if not log:
            low = 0.0
        elif low <= 0:
            low = min((y for line in lines for _, y in line.raw if math.isfinite(y) and y > 0), default=high)
        panels.append(f'<div class="panel">{line_chart(name, lines, _x_range(runs), (low, high), log=log, size=(360, 220))}</div>')
    return f'<h2>Optimizer and speed</h2>{_run_legend(runs)}<div class="columns small">{"".join(panels)}</div>'


def _data(runs: list[Run]) -> str:
    names = list(dict.fromkeys(source for run in runs for phase in run.ledger.phases for source in phase.sources))
    colours = {source: SOURCE_COLOURS[number % len(SOURCE_COLOURS)] for number, source in enumerate(names)}
    bars, tables = [], []
    for run in runs:
        phases = [phase for phase in run.ledger.phases if phase.steps]
        bars += [
            Bar(f"{run.name}: {phase.name}", [(source, phase.sources[source].tokens) for source in names if source in phase.sources])
            for phase in phases
        ]
        tables.append(_source_table(run, phases, colours))
    chart = stacked_bars("Tokens consumed", bars, colours) if bars else ""
    key = legend([(colours[source], source) for source in names])
    note = "As the ledger of each run's latest checkpoint records it."
    return f'<h2>Tokens by source and phase</h2><p class="note">{note}</p><div class="panel">{key}{chart}</div>{"".join(tables)}'


def _source_table(run: Run, phases: list[PhaseUse], colours: dict[str, str]) -> str:
    sources = [source for source in colours if any(source in phase.sources for phase in phases)]
    heads = "".join(f'<th class="number">{escape(phase.name)}</th><th class="number">share</th>' for phase in phases)
    rows = []
    for source in sources:
        uses = [phase.sources.get(source) for phase in phases]
        cells = "".join(
            f'<td class="number">{use.tokens:,}</td><td class="number">{_share(use.tokens, phase.tokens)}</td>'
            if use
            else '<td class="number">–</td><td class="number">–</td>'
            for use, phase in zip(uses, phases, strict=True)
        )
        tokens, samples = sum(use.tokens for use in uses if use), sum(use.samples for use in uses if use)
        rows.append(
            f'<tr><td>{swatch(colours[source], source)}</td>{cells}<td class="number">{tokens:,}</td><td class="number">{samples:,}</td></tr>'
        )
    totals = "".join(f'<td class="number">{phase.tokens:,}</td><td></td>' for phase in phases)
    num_samples = sum(use.samples for phase in phases for use in phase.sources.values())
    return (
        f'<div class="panel"><table><caption>{swatch(run.colour, run.name)}: tokens by phase, after'
        f" {sum(phase.steps for phase in phases):,} steps</caption>"
        f'<thead><tr><th>source</th>{heads}<th class="number">all phases</th><th class="number">samples</th></tr></thead>'
        f'<tbody>{"".join(rows)}<tr class="total"><td>all sources</td>{totals}<td class="number">{run.ledger.tokens:,}</td>'
        f'<td class="number">{num_samples:,}</td></tr></tbody></table></div>'
    )


def _experts(runs: list[Run]) -> str:
    if not runs:
        return ""
    maps, lines = [], []
    for run in runs:
        routed = [step for step in run.steps if step.expert_load]
        last = [step.expert_load for step in routed[-run.window :]]
        mean = [[statistics.mean(shares) for shares in zip(*layers, strict=True)] for layers in zip(*last, strict=True)]
        over = f"mean of the last {len(last)} steps" if len(last) > 1 else "last step"
        maps.append(
            f'<div class="panel"><h3>{swatch(run.colour, run.name)}</h3>{heat_map(f"Share of routed tokens, {over}", mean, 540)}</div>'
        )
        raw = [(step.tokens, max(max(layer) * len(layer) for layer in step.expert_load)) for step in routed]
        lines.append(Line(run.name, run.colour, _smooth_by_phase(raw, routed, run.window), raw))
    chart = line_chart("Load of the busiest expert ÷ mean, worst layer", lines, _x_range(runs), (1.0, limits(lines)[1]), size=(540, 260))
    note = (
        f"{swatch('var(--above)', 'above')} and {swatch('var(--below)', 'below')} the uniform share; the full colour means"
        " twice the share, or none. In the line chart 1 is perfect balance."
    )
    imbalance = f'<div class="panel">{_run_legend(runs)}{chart}</div>'
    return f'<h2>Expert load</h2><p class="note">{note}</p><div class="columns">{"".join(maps)}{imbalance}</div>'


def _evaluations(evaluations: list[Evaluation]) -> str:
    if not evaluations:
        return ""
    results = [evaluation.result for evaluation in evaluations]
    languages = list(dict.fromkeys(language for result in results for language in result.by_language))
    measures = [(group, measure) for group in ("all", *languages) for measure in ("well_formed", "correct")]
    rows = []
    for evaluation in evaluations:
        cells = "".join(f'<td class="number">{_percent(_measured(evaluation.result, *measure))}</td>' for measure in measures)
        rows.append(f'<tr><td>{escape(evaluation.label)}</td><td class="number">{evaluation.result.num_prompts:,}</td>{cells}</tr>')
    if len(evaluations) > 1:
        changes = "".join(
            f'<td class="number">{_change(_measured(results[0], *measure), _measured(results[-1], *measure))}</td>' for measure in measures
        )
        first, last = escape(evaluations[0].label), escape(evaluations[-1].label)
        rows.append(f'<tr class="total"><td>{first} → {last}, points</td><td></td>{changes}</tr>')
    groups = "".join(f'<th colspan="2">{escape(_LANGUAGES.get(group, group))}</th>' for group in ("all", *languages))
    heads = '<th class="number">well-formed</th><th class="number">correct</th>' * (len(languages) + 1)
    table = (
        f"<table><thead><tr><th></th><th></th>{groups}</tr>"
        f'<tr><th>model</th><th class="number">prompts</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    note = (
        "Well-formed: the model stopped by itself and closed with the fixed form (“The answer is 12.”, 「答えは12です。」)."
        " Correct: well-formed, and the number is right."
    )
    return f'<h2>Arithmetic, before and after</h2><p class="note">{note}</p><div class="panel">{table}</div>{_samples(evaluations)}'


def _samples(evaluations: list[Evaluation]) -> str:
    by_prompt = [{sample.prompt: sample for sample in evaluation.result.samples} for evaluation in evaluations]
    asked = evaluations[0].result.samples
    num_shown = min(_NUM_SAMPLES, len(asked))
    rows = []
    # Drawn rather than every n-th: prompt files often go round languages or kinds.
    for sample in (asked[number] for number in sorted(random.Random(0).sample(range(len(asked)), num_shown))):
        cells = "".join(_answer_cell(samples.get(sample.prompt)) for samples in by_prompt)
        rows.append(f'<tr><td>{escape(sample.prompt)}</td><td class="number">{escape(sample.expected)}</td>{cells}</tr>')
    heads = "".join(f"<th>{escape(evaluation.label)}</th>" for evaluation in evaluations)
    return (
        f'<h3>Answers</h3><p class="note">{num_shown} of {len(asked)} prompts, drawn at random with a fixed seed.</p>'
        f'<div class="panel long"><table class="samples"><thead><tr><th>prompt</th><th class="number">expected</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _answer_cell(sample: Sample | None) -> str:
    if sample is None:
        return "<td>–</td>"
    verdict = "✓ correct" if sample.correct else "✗ wrong number" if sample.well_formed else "✗ not well-formed"
    return f'<td class="{"correct" if sample.correct else "wrong"}">{escape(sample.answer)}<span class="verdict">{verdict}</span></td>'


def _measured(result: Result, group: str, measure: str) -> float | None:
    shares = result if group == "all" else result.by_language.get(group)
    return None if shares is None else getattr(shares, measure)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _change(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{(after - before) * 100:+.1f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _smooth_by_phase(points: Points, steps: list[Step], window: int, log: bool = False) -> list[tuple[float, float]]:
    """`points` (one for each step) smoothed within each phase: what jumps at a boundary should be seen to jump.

    With `log` the mean is the geometric one, which a single spike cannot lift for a whole window.
    """
    if log:
        logs = [(x, math.log(y) if y > 0 else math.nan) for x, y in points]
        return [(x, math.exp(y)) for x, y in _smooth_by_phase(logs, steps, window)]
    smoothed: list[tuple[float, float]] = []
    for _, group in groupby(zip(points, steps, strict=True), key=lambda pair: pair[1].phase):
        smoothed += smooth([point for point, _ in group], window)
    return smoothed


def _x_range(runs: list[Run]) -> tuple[float, float]:
    return min(run.bands[0].start for run in runs), max(run.steps[-1].tokens for run in runs)


def _run_legend(runs: list[Run]) -> str:
    return legend([(run.colour, run.name) for run in runs]) if len(runs) > 1 else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def main(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_FOLDER...", help="Run folders that `mujina train` wrote.")],
    output: Annotated[Path, typer.Option(help="The HTML file to write.")],
    evaluation: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=RESULT", help="A result of `mujina evaluate`; may be repeated.")
    ] = None,
) -> None:
    """Draws training runs and evaluations into one HTML file."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(folder, name, RUN_COLOURS[k % len(RUN_COLOURS)]) for k, (folder, name) in enumerate(zip(folders, names, strict=True))]
    evaluations = [read_evaluation(text) for text in evaluation or []]
    command = ["mujina", "report", *map(str, folders), "--output", str(output)]
    command += [word for text in evaluation or [] for word in ("--evaluation", text)]
    write_whole(output, build(runs, evaluations, shlex.join(command)).encode())
    print(f"{output}: {', '.join(names)}")


if __name__ == "__main__":
    user_input.run(main)
