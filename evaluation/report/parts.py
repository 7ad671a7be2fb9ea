"""What several sections draw with: panels side by side, small charts of all runs, legends and colours."""

from collections.abc import Callable

from evaluation.report.charts import Line, limits, line_chart
from evaluation.report.runs import EVENT_COLOURS, OTHER_EVENT_COLOUR, Run, Step
from mujina.page import SOURCE_COLOURS, legend, swatch

NUM_ROWS = 30  # of a table that may be long
SMALL = (360, 220)  # pixels of a chart that shares its row with two others


def x_range(runs: list[Run]) -> tuple[float, float]:
    return min(run.bands[0].start for run in runs), max(run.steps[-1].tokens for run in runs)


def small_chart(runs: list[Run], name: str, field: str | Callable[[Step], float | None], smoothed: bool = True) -> str:
    """All runs in one chart, or nothing where no run has the field."""
    value = field if callable(field) else lambda step: getattr(step, field)
    lines = [run.series(value, run.name, run.colour, smoothed=smoothed) for run in runs]
    if not any(line.points for line in lines):
        return ""
    low, high = limits(lines)
    return line_chart(name, lines, x_range(runs), (min(0.0, low), high), size=SMALL)


def small_section(title: str, runs: list[Run], charts: list[str], note: str = "") -> str:
    panels = "".join(f'<div class="panel">{chart}</div>' for chart in charts if chart)
    note = f'<p class="note">{note}</p>' if note else ""
    return f'<h2>{title}</h2>{note}{run_legend(runs)}<div class="columns small">{panels}</div>' if panels else ""


def by_source(runs: list[Run], field: str, title: str, note: str, smoothed: bool, axis: str = "Loss, nats per token") -> str:
    """A field that has a number for each source, one panel a run."""
    colours, charts = source_colours(runs), []
    runs = [run for run in runs if any(getattr(step, field) for step in run.steps)]
    for run in runs:
        sources = run.largest_sources(len(SOURCE_COLOURS))
        lines = [run.series(_of_source(field, source), source, colours[source], False, smoothed, False) for source in sources]
        charts.append((run, [line for line in lines if line.points]))
    y_range = limits([line for _, lines in charts for line in lines])
    drawn = [
        (run, line_legend(lines) + line_chart(axis, lines, x_range(runs), y_range, run.bands, size=panel_size(runs, 280)))
        for run, lines in charts
    ]
    return f'<h2>{title}</h2><p class="note">{note}</p>{side_by_side(drawn)}' if drawn else ""


def _of_source(field: str, source: str) -> Callable[[Step], float | None]:
    return lambda step: getattr(step, field).get(source)


def side_by_side(charts: list[tuple[Run, str]]) -> str:
    """Panels headed by their runs."""
    panels = "".join(f'<div class="panel"><h3>{swatch(run.colour, run.name)}</h3>{chart}</div>' for run, chart in charts)
    return f'<div class="columns">{panels}</div>'


def panel_size(runs: list[Run], height: int) -> tuple[int, int]:
    return (1120 if len(runs) == 1 else 540), height


def line_legend(lines: list[Line]) -> str:
    return legend([(line.colour, line.label) for line in lines])


def run_legend(runs: list[Run]) -> str:
    return legend([(run.colour, run.name) for run in runs]) if len(runs) > 1 else ""


def event_colour(what: str) -> str:
    return EVENT_COLOURS.get(what, OTHER_EVENT_COLOUR)


def source_colours(runs: list[Run]) -> dict[str, str]:
    """Each source's colour, the same on the whole page."""
    names = [source for run in runs for phase in run.ledger.phases for source in phase.sources]
    names += [source for run in runs for source in run.largest_sources(len(SOURCE_COLOURS))]
    return {source: SOURCE_COLOURS[number % len(SOURCE_COLOURS)] for number, source in enumerate(dict.fromkeys(names))}
