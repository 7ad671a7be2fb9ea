"""What each run has consumed of each source, by phase."""

from collections import Counter
from html import escape

from evaluation.report.charts import Bar, stacked_bars
from evaluation.report.inputs import Inputs
from evaluation.report.parts import source_colours
from evaluation.report.runs import PhaseUse, Run
from mujina.page import legend, swatch


def section(inputs: Inputs) -> str:
    runs = [run for run in inputs.runs if run.ledger.phases]
    if not runs:
        return ""
    names = list(dict.fromkeys(source for run in runs for phase in run.ledger.phases for source in phase.sources))
    colours = {source: colour for source, colour in source_colours(runs).items() if source in names}
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
    note = (
        "As the ledger of each run's latest checkpoint records it. Trained on: those that have a weight in the loss (what assistants say), as "
        "the steps of the phase tell it."
    )
    return f'<h2>Tokens by source and phase</h2><p class="note">{note}</p><div class="panel">{key}{chart}</div>{"".join(tables)}'


def _source_table(run: Run, phases: list[PhaseUse], colours: dict[str, str]) -> str:
    sources = [source for source in colours if any(source in phase.sources for phase in phases)]
    trained = _trained(run)
    heads = "".join(
        f'<th class="number">{escape(phase.name)}</th><th class="number">share</th>'
        + ('<th class="number">trained on</th>' if phase.name in trained else "")
        for phase in phases
    )
    rows = []
    for source in sources:
        uses = [phase.sources.get(source) for phase in phases]
        cells = "".join(
            (
                f'<td class="number">{use.tokens:,}</td><td class="number">{_share(use.tokens, phase.tokens)}</td>'
                if use
                else '<td class="number">–</td><td class="number">–</td>'
            )
            + (f'<td class="number">{_count(trained[phase.name][source])}</td>' if phase.name in trained else "")
            for use, phase in zip(uses, phases, strict=True)
        )
        tokens, samples = sum(use.tokens for use in uses if use), sum(use.samples for use in uses if use)
        rows.append(
            f'<tr><td>{swatch(colours[source], source)}</td>{cells}<td class="number">{tokens:,}</td><td class="number">{samples:,}</td></tr>'
        )
    totals = "".join(
        f'<td class="number">{phase.tokens:,}</td><td></td>'
        + (f'<td class="number">{trained[phase.name].total():,}</td>' if phase.name in trained else "")
        for phase in phases
    )
    num_samples = sum(use.samples for phase in phases for use in phase.sources.values())
    return (
        f'<div class="panel"><table><caption>{swatch(run.colour, run.name)}: tokens by phase, after'
        f" {sum(phase.steps for phase in phases):,} steps</caption>"
        f'<thead><tr><th>source</th>{heads}<th class="number">all phases</th><th class="number">samples</th></tr></thead>'
        f'<tbody>{"".join(rows)}<tr class="total"><td>all sources</td>{totals}<td class="number">{run.ledger.tokens:,}</td>'
        f'<td class="number">{num_samples:,}</td></tr></tbody></table></div>'
    )


def _trained(run: Run) -> dict[str, Counter[str]]:
    """Tokens that have a weight, by phase and source; only phases in whose loss tokens differ."""
    trained: dict[str, Counter[str]] = {}
    for step in run.steps:
        if step.trained_by_source:
            trained.setdefault(step.phase, Counter()).update(step.trained_by_source)
    return trained


def _count(tokens: int) -> str:
    return f"{tokens:,}" if tokens else "–"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
