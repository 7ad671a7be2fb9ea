"""What happened in each run."""

from datetime import UTC, datetime
from html import escape

from evaluation.report.inputs import Inputs
from evaluation.report.parts import NUM_ROWS, event_colour
from evaluation.report.runs import event_text
from mujina.page import swatch


def section(inputs: Inputs) -> str:
    tables = []
    for run in (run for run in inputs.runs if run.events):
        rows = "".join(
            f'<tr><td>{datetime.fromtimestamp(event.time, UTC):%Y-%m-%d %H:%M:%S}</td><td class="number">{event.step:,}</td>'
            f"<td>{swatch(event_colour(event.what), event.what)}</td><td>{escape(event_text(event).partition(': ')[2])}</td></tr>"
            for event in run.events[-NUM_ROWS:]
        )
        first = f", the last {NUM_ROWS} of {len(run.events)}" if len(run.events) > NUM_ROWS else ""
        tables.append(
            f'<div class="panel long"><table><caption>{swatch(run.colour, run.name)}: events{first}</caption><thead><tr><th>UTC</th>'
            f'<th class="number">step</th><th>what</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>'
        )
    return f"<h2>Events</h2>{''.join(tables)}" if tables else ""
