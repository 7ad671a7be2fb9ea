"""The loss of each run, the others behind it."""

from evaluation.report.charts import Line, limits, line_chart
from evaluation.report.inputs import Inputs
from evaluation.report.parts import panel_size, side_by_side, x_range
from mujina.page import OTHER_RUN_COLOUR


def section(inputs: Inputs) -> str:
    runs = inputs.runs
    lines = [run.line("loss") for run in runs]
    charts = [
        (
            run,
            line_chart(
                "Loss, nats per token", _before_others(line, lines), x_range(runs), limits(lines), run.bands, size=panel_size(runs, 320)
            ),
        )
        for run, line in zip(runs, lines, strict=True)
    ]
    grey = " The other runs' lines stand behind in grey." if len(runs) > 1 else ""
    pairs = (
        " In a phase of preferences it is the mean over the pairs."
        if any(s.reward_margin is not None for r in runs for s in r.steps)
        else ""
    )
    note = f"Thin: each step. Thick: smoothed within a phase. Dotted: a phase begins.{grey}{pairs}"
    return f'<h2>Loss</h2><p class="note">{note}</p>{side_by_side(charts)}'


def _before_others(line: Line, lines: list[Line]) -> list[Line]:
    return [*(Line(other.label, OTHER_RUN_COLOUR, other.points) for other in lines if other is not line), line]
