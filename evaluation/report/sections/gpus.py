"""The GPUs' vitals, and which of them were slowed down."""

from collections import Counter
from collections.abc import Callable
from html import escape

from evaluation.report.inputs import Inputs
from evaluation.report.parts import NUM_ROWS, small_chart, small_section
from evaluation.report.runs import Run, Step
from mujina.page import swatch


def section(inputs: Inputs) -> str:
    runs = inputs.runs
    charts = [
        small_chart(runs, "Hottest GPU, °C", _of("hottest_c"), smoothed=False),
        small_chart(runs, "Highest power, W", _of("power_w"), smoothed=False),
        small_chart(runs, "Slowest SM clock, MHz", _of("slowest_mhz"), smoothed=False),
        small_chart(runs, "Uncorrectable ECC errors", lambda step: (step.gpu.ecc_errors if step.gpu else None) or None, smoothed=False),
    ]
    drawn = small_section("GPUs", runs, charts, "The worst of all ranks, looked at every ten seconds.")
    return drawn and drawn + _slowed(runs)


def _of(field: str) -> Callable[[Step], float | None]:
    return lambda step: getattr(step.gpu, field) if step.gpu else None


def _slowed(runs: list[Run]) -> str:
    """The ranks whose clocks were lowered, and why; a power cap, which is nobody's fault, stands last."""
    rows = []
    for run in runs:
        looks = [step.gpu for step in run.steps if step.gpu]
        slowed = Counter((int(rank), reason) for look in looks for rank, reasons in look.slowed.items() for reason in reasons)
        rows += [
            f'<tr><td>{swatch(run.colour, run.name)}</td><td class="number">{rank}</td><td>{escape(reason)}</td>'
            f'<td class="number">{count / len(looks):.1%}</td></tr>'
            for (rank, reason), count in sorted(slowed.items(), key=lambda item: (item[0][1] == "power cap", -item[1]))[:NUM_ROWS]
        ]
    heads = '<th>run</th><th class="number">rank</th><th>why the clock is lowered</th><th class="number">of the looks</th>'
    return f'<div class="panel"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>' if rows else ""
