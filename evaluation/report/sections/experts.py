"""How evenly mixtures of experts are used."""

import statistics
from collections.abc import Callable

from evaluation.report.charts import Line, heat_map, limits, line_chart, load_over_time
from evaluation.report.inputs import Inputs
from evaluation.report.parts import run_legend, small_chart, small_section, x_range
from evaluation.report.runs import Run, Step, smooth_by_phase
from mujina.page import swatch


def section(inputs: Inputs) -> str:
    runs = [run for run in inputs.runs if run.steps[-1].expert_load]
    if not runs:
        return ""
    note = (
        f"{swatch('var(--above)', 'above')} and {swatch('var(--below)', 'below')} the uniform share; the full colour means"
        " twice the share, or none. In the line chart 1 is perfect balance."
    )
    now, over_time = "".join(map(_at_the_end, runs)), "".join(map(_over_the_run, runs))
    return f'<h2>Expert load</h2><p class="note">{note}</p><div class="columns">{now}{_imbalance(runs)}</div>{over_time}{_curves(runs)}'


def _at_the_end(run: Run) -> str:
    last = _routed(run)[1][-run.window :]
    mean = [[statistics.mean(shares) for shares in zip(*layers, strict=True)] for layers in zip(*last, strict=True)]
    over = f"mean of the last {len(last)} steps" if len(last) > 1 else "last step"
    return _panel(run, heat_map(f"Share of routed tokens, {over}", mean, 540, _every(run)))


def _over_the_run(run: Run) -> str:
    routed, loads = _routed(run)
    tokens = [step.tokens for step in routed]
    return _panel(run, load_over_time("Share of routed tokens over the run", tokens, loads, every=_every(run)))


def _imbalance(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        routed, loads = _routed(run)
        raw = [(step.tokens, max(max(layer) * len(layer) for layer in load)) for step, load in zip(routed, loads, strict=True)]
        lines.append(Line(run.name, run.colour, smooth_by_phase(raw, routed, run.window), raw))
    chart = line_chart("Load of the busiest expert ÷ mean, worst layer", lines, x_range(runs), (1.0, limits(lines)[1]), size=(540, 260))
    return f'<div class="panel">{run_legend(runs)}{chart}</div>'


def _curves(runs: list[Run]) -> str:
    curves = [
        small_chart(runs, "Entropy of the load, least even layer", _of_layers("load_entropy", min)),
        small_chart(runs, "Entropy of the router's mean scores", _of_layers("router_entropy", statistics.mean)),
        small_chart(runs, "Similarity of experts: mean cosine", _of_layers("expert_similarity", statistics.mean), smoothed=False),
        small_chart(runs, "Dropped, share of the routed tokens", _of_layers("dropped", statistics.mean)),
    ]
    note = "Entropies: 1 is even, 0 all in one expert. Similarity: between the weights of two experts, 1 for copies."
    return small_section("Experts over time", runs, curves, note)


def _routed(run: Run) -> tuple[list[Step], list[list[list[float]]]]:
    """The steps that tell the experts' loads, and the loads[step][layer][expert]."""
    found = [(step, step.expert_load) for step in run.steps if step.expert_load]
    return [step for step, _ in found], [load for _, load in found]


def _every(run: Run) -> int:
    return run.config.moe.every if run.config.moe else 1


def _panel(run: Run, chart: str) -> str:
    return f'<div class="panel"><h3>{swatch(run.colour, run.name)}</h3>{chart}</div>'


def _of_layers(field: str, summary: Callable[[list[float]], float]) -> Callable[[Step], float | None]:
    """One number for the layers of a step that has the field."""
    return lambda step: None if getattr(step, field) is None else summary(getattr(step, field))
