"""Gradient and weight norms of each layer: from light to dark, with the matrices outside of the layers in colours of their own."""

import math
from collections.abc import Callable, Iterator

from evaluation.report.charts import limits, line_chart
from evaluation.report.inputs import Inputs
from evaluation.report.parts import side_by_side, x_range
from evaluation.report.runs import Run, Step
from mujina.page import SOURCE_COLOURS, legend


def section(inputs: Inputs) -> str:
    charts = [(run, chart) for run in inputs.runs for chart in _charts(run, x_range(inputs.runs))]
    note = '<p class="note">From light to dark: first to last layer.</p>'
    return f"<h2>Norms of the layers</h2>{note}{side_by_side(charts)}" if charts else ""


def _charts(run: Run, over: tuple[float, float]) -> Iterator[str]:
    names = list(dict.fromkeys(name for step in run.steps for name in step.layer_norms))
    shade = _shades(run, names)
    for what, title in (("gradient", "Norm of the gradient"), ("weight", "Norm of the weights")):
        lines = [run.series(_norm(name, what), name, shade[name], smoothed=False) for name in names]
        if any(line.points for line in lines):
            layers = [name for name in names if _is_layer(name)]
            ends = dict.fromkeys([*layers[:1], *layers[-1:], *(name for name in names if not _is_layer(name))])
            key = legend([(shade[name], name) for name in ends])
            low = min((y for line in lines for _, y in line.points if math.isfinite(y) and y > 0), default=1.0)
            yield key + line_chart(title, lines, over, (low, limits(lines)[1]), run.bands, True, (540, 260))


def _norm(name: str, what: str) -> Callable[[Step], float | None]:
    return lambda step: step.layer_norms.get(name, {}).get(what)


def _shades(run: Run, names: list[str]) -> dict[str, str]:
    layers, outside = [name for name in names if _is_layer(name)], [name for name in names if not _is_layer(name)]
    shares = [30 + 70 * number / max(1, len(layers) - 1) for number in range(len(layers))]
    shades = {name: f"color-mix(in srgb, {run.colour} {share:.0f}%, var(--surface))" for name, share in zip(layers, shares, strict=True)}
    return shades | {name: SOURCE_COLOURS[number % len(SOURCE_COLOURS)] for number, name in enumerate(outside)}


def _is_layer(name: str) -> bool:
    return name.startswith("layers.")
