"""The gradient norm of each run, with what happened."""

import math
from collections import Counter

from evaluation.report.charts import limits, line_chart
from evaluation.report.inputs import Inputs
from evaluation.report.parts import event_colour, panel_size, side_by_side, x_range
from evaluation.report.runs import Run
from mujina.page import legend


def section(inputs: Inputs) -> str:
    runs = inputs.runs
    lines = [run.line("grad_norm", log=True) for run in runs]
    low, high = limits(lines)
    if low <= 0:
        low = min((y for line in lines for _, y in line.raw if math.isfinite(y) and y > 0), default=high)
    charts = []
    for run, line in zip(runs, lines, strict=True):
        chart = line_chart(
            "Gradient norm, before clipping", [line], x_range(runs), (low, high), run.bands, True, panel_size(runs, 240), run.marks
        )
        charts.append((run, _event_legend(run) + chart))
    note = "Vertical lines: what happened, as the table of events has it." if any(run.events for run in runs) else ""
    return f'<h2>Gradient norm</h2><p class="note">{note}</p>{side_by_side(charts)}'


def _event_legend(run: Run) -> str:
    kinds = Counter(event.what for event in run.events)
    return legend([(event_colour(what), f"{what} ({count})") for what, count in kinds.items()]) if kinds else ""
