"""One HTML page about one or several training runs, side by side: losses, data, experts, and answers before and after.

    python -m evaluation.report RUN_FOLDER… --output report.html [--evaluation LABEL=result.json …]

Reads run folders (runs.py; a run may still be going on) and the result files of `mujina evaluate`, in the order given. The page is one file that loads nothing.
"""

import math
import random
import shlex
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Annotated

import typer

from evaluation.arithmetic import Result, Sample
from evaluation.charts import Bar, Line, heat_map, limits, line_chart, load_over_time, short, stacked_bars
from evaluation.files import parse_object, read_text
from evaluation.runs import EVENT_COLOURS, OTHER_EVENT_COLOUR, PhaseUse, Run, Step, event_text, read_run, smooth_by_phase
from mujina import user_input
from mujina.files import write_whole
from mujina.page import OTHER_RUN_COLOUR, RUN_COLOURS, SOURCE_COLOURS, legend, page, swatch
from mujina.user_input import UserError, parse

_NUM_SAMPLES = 12  # answers shown
_NUM_ROWS = 30  # of a table that may be long
_SMALL = (360, 220)  # pixels of a chart that shares its row with two others
_LANGUAGES = {"en": "English", "ja": "Japanese"}


@dataclass(frozen=True)
class Evaluation:
    """A result of `mujina evaluate` under the name that the page gives it."""

    label: str
    result: Result


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
        _by_source(runs, "loss_by_source", "Loss by source", "Smoothed within a phase.", smoothed=True),
        _by_source(runs, "validation", "Validation", "On what is held out of each source.", smoothed=False),
        _gradients(runs),
        _over_time(runs),
        _gpus(runs),
        _auxiliary_losses(runs),
        _experts([run for run in runs if run.steps[-1].expert_load]),
        _layers(runs),
        _data(runs),
        _events(runs),
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
        "Experts": f"{moe.num_experts} in each {'layer' if moe.every == 1 else f'{moe.every} layers'}, top {moe.top_k}" if moe else "–",
        "Parallel": ", ".join(f"{dimension} {size}" for dimension, size in run.config.parallel.items() if size > 1) or "–",
        "Weights from": run.config.train.init_from or (moe and moe.upcycle_from and f"{moe.upcycle_from}, upcycled") or "–",
        "Steps": f"{last.step:,}",
        "Tokens": f"{last.tokens:,} of {sum(phase.tokens for phase in run.config.phases):,} planned",
        "Time in steps": _duration(sum(step.seconds for step in run.steps)),
        "Tokens per second": f"{short(statistics.median(step.tokens_per_second for step in run.steps))} (median)",
        "Model TFLOP/s per GPU": _median(run, "tflops_per_gpu", short),
        "MFU": _median(run, "mfu", "{:.1%}".format),
        "Checkpoints": _saves(run),
        "Events": ", ".join(f"{count} × {what}" for what, count in Counter(event.what for event in run.events).items()) or "–",
        "Loss at the end": f"{statistics.mean(end):.3f}{over}" if end else "not finite",
        "Steps without a finite loss": f"{num_broken:,}" if num_broken else "–",
    }


def _median(run: Run, field: str, shown: Callable[[float], str]) -> str:
    values = [value for step in run.steps if (value := getattr(step, field)) is not None]
    return f"{shown(statistics.median(values))} (median)" if values else "–"


def _saves(run: Run) -> str:
    facts = [save.model_extra for save in run.saves if save.model_extra and {"seconds", "whole_seconds"} <= save.model_extra.keys()]
    if not facts:
        return "–"
    still, whole = (statistics.median(fact[key] for fact in facts) for key in ("seconds", "whole_seconds"))
    return f"{len(facts)}: training stood still for {still:.2f} s, whole after {whole:.2f} s (medians)"


def _losses(runs: list[Run]) -> str:
    lines = [run.line("loss") for run in runs]
    charts = [
        (
            run,
            line_chart(
                "Loss, nats per token", _before_others(line, lines), _x_range(runs), limits(lines), run.bands, size=_size(runs, 320)
            ),
        )
        for run, line in zip(runs, lines, strict=True)
    ]
    grey = " The other runs' lines stand behind in grey." if len(runs) > 1 else ""
    note = f"Thin: each step. Thick: smoothed within a phase. Dotted: a phase begins.{grey}"
    return f'<h2>Loss</h2><p class="note">{note}</p>{_side_by_side(charts)}'


def _by_source(runs: list[Run], field: str, title: str, note: str, smoothed: bool) -> str:
    """A field that has a number for each source, one panel a run."""
    colours, charts = _source_colours(runs), []
    runs = [run for run in runs if any(getattr(step, field) for step in run.steps)]
    for run in runs:
        sources = run.largest_sources(len(SOURCE_COLOURS))
        lines = [
            run.series(lambda step, source=source: getattr(step, field).get(source), source, colours[source], False, smoothed, False)
            for source in sources
        ]
        charts.append((run, [line for line in lines if line.points]))
    y_range = limits([line for _, lines in charts for line in lines])
    drawn = [
        (run, _line_legend(lines) + line_chart("Loss, nats per token", lines, _x_range(runs), y_range, run.bands, size=_size(runs, 280)))
        for run, lines in charts
    ]
    return f'<h2>{title}</h2><p class="note">{note}</p>{_side_by_side(drawn)}' if drawn else ""


def _gradients(runs: list[Run]) -> str:
    lines = [run.line("grad_norm", log=True) for run in runs]
    low, high = limits(lines)
    if low <= 0:
        low = min((y for line in lines for _, y in line.raw if math.isfinite(y) and y > 0), default=high)
    charts = []
    for run, line in zip(runs, lines, strict=True):
        chart = line_chart(
            "Gradient norm, before clipping", [line], _x_range(runs), (low, high), run.bands, True, _size(runs, 240), run.marks
        )
        charts.append((run, _event_legend(run) + chart))
    note = "Vertical lines: what happened, as the table of events has it." if any(run.events for run in runs) else ""
    return f'<h2>Gradient norm</h2><p class="note">{note}</p>{_side_by_side(charts)}'


def _over_time(runs: list[Run]) -> str:
    is_old = any(run.steps[-1].tokens_per_second_per_gpu is None for run in runs)
    charts = [
        _small_chart(runs, "Learning rate", "lr", smoothed=False),  # has no noise, and corners that should be seen
        _small_chart(runs, "Tokens per second", "tokens_per_second") if is_old else "",
        _small_chart(runs, "Tokens per second and GPU (or process)", "tokens_per_second_per_gpu"),
        _small_chart(runs, "Model TFLOP/s per GPU (or process)", "tflops_per_gpu"),
        _small_chart(runs, "Model FLOPs utilisation (MFU)", "mfu"),
        _small_chart(runs, "Step, seconds", lambda step: step.seconds if step.data_seconds is not None else None),
        _small_chart(runs, "Wait for data, seconds a step", "data_seconds"),
        _save_chart(runs),
        _small_chart(runs, "Memory, GiB, of the rank with most", "memory_gib", smoothed=False),
        _small_chart(runs, "Memory that PyTorch holds, GiB", "memory_reserved_gib", smoothed=False),
    ]
    return _small_section("Learning rate, speed, time and memory", runs, charts)


def _save_chart(runs: list[Run]) -> str:
    """How long training stood still for each checkpoint, and how long the checkpoint took."""
    lines = []
    for run in runs:
        saves = [(run.tokens_at(save.step), save.model_extra or {}) for save in run.saves]
        lines.append(Line(run.name, run.colour, [(x, facts["seconds"]) for x, facts in saves if "seconds" in facts]))
    if not any(line.points for line in lines):
        return ""
    return line_chart("Standstill for a checkpoint, seconds", lines, _x_range(runs), (0.0, limits(lines)[1]), size=_SMALL)


def _auxiliary_losses(runs: list[Run]) -> str:
    charts = [
        _small_chart(runs, "z-loss of the output: mean (log Z)²", lambda step: step.z_loss or None),
        _small_chart(runs, "Load balancing (1 is perfect)", "load_balancing_loss"),
        _small_chart(runs, "z-loss of the router", "router_z_loss"),
        _small_chart(runs, "Loss in fp8 against bf16, relative", lambda step: step.fp8_shadow.get("difference"), smoothed=False),
    ]
    return _small_section("Auxiliary losses", runs, charts, "Before their coefficients.")


def _gpus(runs: list[Run]) -> str:
    def of(field: str) -> Callable[[Step], float | None]:
        return lambda step: getattr(step.gpu, field) if step.gpu else None

    charts = [
        _small_chart(runs, "Hottest GPU, °C", of("hottest_c"), smoothed=False),
        _small_chart(runs, "Highest power, W", of("power_w"), smoothed=False),
        _small_chart(runs, "Slowest SM clock, MHz", of("slowest_mhz"), smoothed=False),
        _small_chart(runs, "Uncorrectable ECC errors", lambda step: (step.gpu.ecc_errors if step.gpu else None) or None, smoothed=False),
    ]
    rows = []
    for run in runs:
        looks = [step.gpu for step in run.steps if step.gpu]
        slowed = Counter((int(rank), reason) for look in looks for rank, reasons in look.slowed.items() for reason in reasons)
        rows += [
            f'<tr><td>{swatch(run.colour, run.name)}</td><td class="number">{rank}</td><td>{escape(reason)}</td>'
            f'<td class="number">{count / len(looks):.1%}</td></tr>'
            for (rank, reason), count in sorted(slowed.items(), key=lambda item: (item[0][1] == "power cap", -item[1]))[:_NUM_ROWS]
        ]
    heads = '<th>run</th><th class="number">rank</th><th>why the clock is lowered</th><th class="number">of the looks</th>'
    table = f'<div class="panel"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>' if rows else ""
    section = _small_section("GPUs", runs, charts, "The worst of all ranks, looked at every ten seconds.")
    return section and section + table


def _layers(runs: list[Run]) -> str:
    """Gradient and weight norms of each layer; layers from light to dark, the matrices outside of them in colours of their own."""
    charts = []
    for run in runs:
        names = list(dict.fromkeys(name for step in run.steps for name in step.layer_norms))
        layers, outside = [name for name in names if name.startswith("layers.")], [name for name in names if not name.startswith("layers.")]
        shade = {
            name: f"color-mix(in srgb, {run.colour} {30 + 70 * k / max(1, len(layers) - 1):.0f}%, var(--surface))"
            for k, name in enumerate(layers)
        }
        shade |= {name: SOURCE_COLOURS[k % len(SOURCE_COLOURS)] for k, name in enumerate(outside)}
        for what, title in (("gradient", "Norm of the gradient"), ("weight", "Norm of the weights")):
            lines = [
                run.series(lambda step, name=name, what=what: step.layer_norms.get(name, {}).get(what), name, shade[name], smoothed=False)
                for name in names
            ]
            if any(line.points for line in lines):
                ends = dict.fromkeys([*layers[:1], *layers[-1:], *outside])
                key = legend([(shade[name], name) for name in ends])
                low = min((y for line in lines for _, y in line.points if math.isfinite(y) and y > 0), default=1.0)
                chart = line_chart(title, lines, _x_range(runs), (low, limits(lines)[1]), run.bands, True, (540, 260))
                charts.append((run, key + chart))
    return (
        f'<h2>Norms of the layers</h2><p class="note">From light to dark: first to last layer.</p>{_side_by_side(charts)}' if charts else ""
    )


def _events(runs: list[Run]) -> str:
    tables = []
    for run in (run for run in runs if run.events):
        rows = "".join(
            f'<tr><td>{datetime.fromtimestamp(event.time, UTC):%Y-%m-%d %H:%M:%S}</td><td class="number">{event.step:,}</td>'
            f"<td>{swatch(_event_colour(event.what), event.what)}</td><td>{escape(event_text(event).partition(': ')[2])}</td></tr>"
            for event in run.events[-_NUM_ROWS:]
        )
        first = f", the last {_NUM_ROWS} of {len(run.events)}" if len(run.events) > _NUM_ROWS else ""
        tables.append(
            f'<div class="panel long"><table><caption>{swatch(run.colour, run.name)}: events{first}</caption><thead><tr><th>UTC</th>'
            f'<th class="number">step</th><th>what</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>'
        )
    return f"<h2>Events</h2>{''.join(tables)}" if tables else ""


def _data(runs: list[Run]) -> str:
    names = list(dict.fromkeys(source for run in runs for phase in run.ledger.phases for source in phase.sources))
    colours = {source: colour for source, colour in _source_colours(runs).items() if source in names}
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
    maps, lines, over_time = [], [], []
    for run in runs:
        every = run.config.moe.every if run.config.moe else 1
        routed = [step for step in run.steps if step.expert_load]
        last = [step.expert_load for step in routed[-run.window :]]
        mean = [[statistics.mean(shares) for shares in zip(*layers, strict=True)] for layers in zip(*last, strict=True)]
        over = f"mean of the last {len(last)} steps" if len(last) > 1 else "last step"
        maps.append(
            f'<div class="panel"><h3>{swatch(run.colour, run.name)}</h3>'
            f"{heat_map(f'Share of routed tokens, {over}', mean, 540, every)}</div>"
        )
        loads = [step.expert_load for step in routed]
        chart = load_over_time("Share of routed tokens over the run", [step.tokens for step in routed], loads, every=every)
        over_time.append(f'<div class="panel"><h3>{swatch(run.colour, run.name)}</h3>{chart}</div>')
        raw = [(step.tokens, max(max(layer) * len(layer) for layer in step.expert_load)) for step in routed]
        lines.append(Line(run.name, run.colour, smooth_by_phase(raw, routed, run.window), raw))
    chart = line_chart("Load of the busiest expert ÷ mean, worst layer", lines, _x_range(runs), (1.0, limits(lines)[1]), size=(540, 260))
    note = (
        f"{swatch('var(--above)', 'above')} and {swatch('var(--below)', 'below')} the uniform share; the full colour means"
        " twice the share, or none. In the line chart 1 is perfect balance."
    )
    imbalance = f'<div class="panel">{_run_legend(runs)}{chart}</div>'
    curves = [
        _small_chart(runs, "Entropy of the load, least even layer", _of_layers("load_entropy", min)),
        _small_chart(runs, "Entropy of the router's mean scores", _of_layers("router_entropy", statistics.mean)),
        _small_chart(runs, "Similarity of experts: mean cosine", _of_layers("expert_similarity", statistics.mean), smoothed=False),
        _small_chart(runs, "Dropped, share of the routed tokens", _of_layers("dropped", statistics.mean)),
    ]
    of_curves = "Entropies: 1 is even, 0 all in one expert. Similarity: between the weights of two experts, 1 for copies."
    return (
        f'<h2>Expert load</h2><p class="note">{note}</p><div class="columns">{"".join(maps)}{imbalance}</div>{"".join(over_time)}'
        f"{_small_section('Experts over time', runs, curves, of_curves)}"
    )


def _of_layers(field: str, summary: Callable[[list[float]], float]) -> Callable[[Step], float | None]:
    """One number for the layers of a step that has the field."""
    return lambda step: None if getattr(step, field) is None else summary(getattr(step, field))


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


def _x_range(runs: list[Run]) -> tuple[float, float]:
    return min(run.bands[0].start for run in runs), max(run.steps[-1].tokens for run in runs)


def _small_chart(runs: list[Run], name: str, field: str | Callable[[Step], float | None], smoothed: bool = True) -> str:
    """All runs in one chart, or nothing where no run has the field."""
    value = field if callable(field) else lambda step: getattr(step, field)
    lines = [run.series(value, run.name, run.colour, smoothed=smoothed) for run in runs]
    if not any(line.points for line in lines):
        return ""
    low, high = limits(lines)
    return line_chart(name, lines, _x_range(runs), (min(0.0, low), high), size=_SMALL)


def _small_section(title: str, runs: list[Run], charts: list[str], note: str = "") -> str:
    panels = "".join(f'<div class="panel">{chart}</div>' for chart in charts if chart)
    note = f'<p class="note">{note}</p>' if note else ""
    return f'<h2>{title}</h2>{note}{_run_legend(runs)}<div class="columns small">{panels}</div>' if panels else ""


def _side_by_side(charts: list[tuple[Run, str]]) -> str:
    """Panels headed by their runs."""
    panels = "".join(f'<div class="panel"><h3>{swatch(run.colour, run.name)}</h3>{chart}</div>' for run, chart in charts)
    return f'<div class="columns">{panels}</div>'


def _size(runs: list[Run], height: int) -> tuple[int, int]:
    return (1120 if len(runs) == 1 else 540), height


def _before_others(line: Line, lines: list[Line]) -> list[Line]:
    return [*(Line(other.label, OTHER_RUN_COLOUR, other.points) for other in lines if other is not line), line]


def _line_legend(lines: list[Line]) -> str:
    return legend([(line.colour, line.label) for line in lines])


def _event_legend(run: Run) -> str:
    kinds = Counter(event.what for event in run.events)
    return legend([(_event_colour(what), f"{what} ({count})") for what, count in kinds.items()]) if kinds else ""


def _event_colour(what: str) -> str:
    return EVENT_COLOURS.get(what, OTHER_EVENT_COLOUR)


def _source_colours(runs: list[Run]) -> dict[str, str]:
    """Each source's colour, the same on the whole page."""
    names = [source for run in runs for phase in run.ledger.phases for source in phase.sources]
    names += [source for run in runs for source in run.largest_sources(len(SOURCE_COLOURS))]
    return {source: SOURCE_COLOURS[number % len(SOURCE_COLOURS)] for number, source in enumerate(dict.fromkeys(names))}


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
