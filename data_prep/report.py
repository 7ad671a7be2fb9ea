"""The report of a preparation: what every step kept of every source, what it dropped and why, and samples of both to judge it by.

`table` is for the terminal; `write_report` makes one HTML file that loads nothing. They read counts, and files of rows that lie on disk,
so a report can be made again at any time.
"""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from rich.markup import escape as escape_markup
from rich.table import Table

from data_prep.row import LONGEST_OF_OURS
from mujina.files import read_rows, write_whole
from mujina.page import RUN_COLOURS, legend, page, swatch

MAX_BYTES = 2_000_000  # of the page
SEEN_ROWS, SEEN_FILES = 20_000, 200  # that samples are drawn from, for each step: a report on a terabyte must not read the terabyte
# (samples of a reason, characters of a sample): a page that is too large is made again with the next
DETAILS = ((6, 600), (3, 600), (3, 300), (1, 300), (1, 100), (0, 0))
LISTED = 60  # rows of a source's table of reasons, and problems
KEPT_COLOUR = "var(--kept)"
NOT_SAID = "no reason given"
_HOW_TO_READ = "Bars are shares of what came in. Thick: documents. Thin: characters."


@dataclass(frozen=True)
class StepCounts:
    """What went into a step and came out of it; `reasons` maps each reason to the documents dropped for it."""

    name: str
    documents_in: int
    characters_in: int
    documents_out: int
    characters_out: int
    reasons: dict[str, int]
    seconds: float | None = None

    @property
    def dropped(self) -> list[tuple[str, int]]:
        """(reason, documents), the most frequent first. They add up to the difference of documents in and out."""
        missing = self.documents_in - self.documents_out - sum(self.reasons.values())
        return Counter({**self.reasons, **({NOT_SAID: missing} if missing > 0 else {})}).most_common()


@dataclass(frozen=True)
class SourceReport:
    """One source. `kept` and `removed` (by the step's name) are .jsonl, .jsonl.gz or .jsonl.zst files of rows {id, text or messages}.

    A removed row also has a `reason`: the reason, then ": " and what was found in the document ("sentence_ends: 0.02").
    `facts` are (name, value); `problems` are the inputs that were passed over, and why: how many for each reason, then each that is
    damaged.
    """

    source: str
    facts: list[tuple[str, str]]
    steps: list[StepCounts]
    kept: list[Path]
    removed: dict[str, list[Path]]
    problems: list[str]

    @property
    def total(self) -> StepCounts:
        """All steps as one: into the first, out of the last; its reasons are the names of the steps."""
        if not self.steps:
            return StepCounts("all steps", 0, 0, 0, 0, {})
        first, last = self.steps[0], self.steps[-1]
        dropped = {step.name: step.documents_in - step.documents_out for step in self.steps}
        seconds = [step.seconds for step in self.steps if step.seconds is not None]
        return StepCounts(
            "all steps", first.documents_in, first.characters_in, last.documents_out, last.characters_out, dropped,
            sum(seconds) if seconds else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """The beginning of a document, its full length in characters, and what a step found in it."""

    id: str
    beginning: str
    num_characters: int
    finding: str


@dataclass(frozen=True)
class _Drawn:
    """A source with its samples, by reason; `problems` are those of the source and of its files of rows."""

    report: SourceReport
    kept: list[Sample]
    removed: dict[str, dict[str, list[Sample]]]
    problems: list[str]


def table(reports: list[SourceReport]) -> Table:
    """A line for every step of every source, for the terminal."""
    timed = any(report.total.seconds is not None for report in reports)
    result = Table("source", "step")
    for title in ("documents in", "out", "dropped", "characters out", *(["seconds"] if timed else [])):
        result.add_column(title, justify="right")
    result.add_column("most frequent reasons")
    for report in reports:
        result.add_section()
        for step in [*report.steps, *([report.total] if len(report.steps) != 1 else [])]:
            seconds = [_seconds(step)] if timed else []
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in step.dropped[:3] if count)
            numbers = f"{step.documents_in:,}", f"{step.documents_out:,}", _share_dropped(step), f"{step.characters_out:,}"
            result.add_row(escape_markup(report.source), escape_markup(step.name), *numbers, *seconds, escape_markup(reasons))
    return result


def write_report(reports: list[SourceReport], path: Path) -> None:
    """Writes one HTML file of less than `MAX_BYTES`. A file of rows that cannot be read is named in it and costs only its samples."""
    drawn = [_draw(report) for report in reports]
    for num_samples, num_characters in DETAILS:
        html = _page(drawn, num_samples, num_characters).encode()
        if len(html) <= MAX_BYTES:
            break
    write_whole(path, html)


def samples(paths: list[Path], seed: str) -> tuple[dict[str, list[Sample]], list[str]]:
    """Samples of the rows by reason ("" for rows without one), and the problems of files that could not be read to their end.

    Reservoir sampling over the first rows of a number of files: the same for the same files and seed.
    """
    rng = random.Random(seed)
    drawn, seen, problems = defaultdict[str, list[Sample]](list), Counter[str](), list[str]()
    size, _ = DETAILS[0]
    chosen = sorted(rng.sample(sorted(paths), min(len(paths), SEEN_FILES)))
    for path in chosen:
        try:
            for _, row in islice(read_rows(path, LONGEST_OF_OURS), SEEN_ROWS // len(chosen)):
                reason, _, finding = str(row.get("reason") or "").partition(": ")
                seen[reason] += 1
                place = len(drawn[reason]) if len(drawn[reason]) < size else rng.randrange(seen[reason])
                if place < size:
                    drawn[reason][place : place + 1] = [_sample(row, finding)]
        except Exception as error:  # whatever is wrong with a file: the report is there to say so
            problems.append(f"no more samples of {path.name}: {type(error).__name__}: {error}")
    return dict(drawn), problems


def _sample(row: dict[str, Any], finding: str) -> Sample:
    messages = row.get("messages")
    text = row["text"] if messages is None else "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
    _, num_characters = DETAILS[0]
    return Sample(str(row.get("url") or row.get("id") or ""), text[:num_characters], len(text), finding)


def _draw(report: SourceReport) -> _Drawn:
    kept, problems = samples(report.kept, f"{report.source} kept")
    removed = {}
    for step in report.steps:
        removed[step.name], more = samples(report.removed.get(step.name, []), f"{report.source} {step.name}")
        problems += more
    return _Drawn(report, [sample for drawn in kept.values() for sample in drawn], removed, report.problems + problems)


def _page(drawn: list[_Drawn], num_samples: int, num_characters: int) -> str:
    names = [source.report.source for source in drawn]
    sections = [_source(source, number, num_samples, num_characters) for number, source in enumerate(drawn)]
    title = f"Preparation of {names[0]}" if len(names) == 1 else f"Preparation of {len(names)} sources"
    return page(title, f"<h1>{escape(title)}</h1>{_overview([source.report for source in drawn])}{''.join(sections)}")


def _overview(reports: list[SourceReport]) -> str:
    """A bar for each source, if there are several."""
    if len(reports) < 2:
        return ""
    names = [f'<a href="#source-{number}">{escape(report.source)}</a>' for number, report in enumerate(reports)]
    rows = [(name, report.total, report.total) for name, report in zip(names, reports, strict=True)]
    return f'<p class="note">Coloured: the documents that a step dropped. {_HOW_TO_READ}</p>{_bars("source", rows)}'


def _source(drawn: _Drawn, number: int, num_samples: int, num_characters: int) -> str:
    report, total = drawn.report, drawn.report.total
    facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in report.facts)
    parts = [f'<h2 id="source-{number}">{escape(report.source)}</h2>']
    parts += [f'<div class="panel"><table class="facts"><tbody>{facts}</tbody></table></div>'] if facts else []
    if total.documents_in:
        rows = [(escape(step.name), step, total) for step in report.steps]
        came_in = f"{total.documents_in:,} documents and {total.characters_in:,} characters came in."
        parts.append(f'<p class="note">{came_in} {_HOW_TO_READ}</p>{_bars("step", rows)}{_reasons(report.steps)}')
    else:
        parts.append('<p class="note">No documents came in.</p>')
    parts.append(_samples_of("Kept at the end", {"": drawn.kept}, num_samples, num_characters))
    for step in report.steps:
        order = {reason: drawn.removed[step.name][reason] for reason, _ in step.dropped if reason in drawn.removed[step.name]}
        by_reason = {**order, **drawn.removed[step.name]}
        parts.append(_samples_of(f"Dropped by {step.name}", by_reason, num_samples, num_characters))
    parts.append(_problems(drawn.problems))
    return "".join(parts)


def _bars(what: str, rows: list[tuple[str, StepCounts, StepCounts]]) -> str:
    """A table with a line for each (name as HTML, its counts, the counts that its bar is a share of)."""
    titles = ["kept", "documents", "characters", *(["seconds"] if any(step.seconds is not None for _, step, _ in rows) else [])]
    heads = "".join(f'<th class="number">{title}</th>' for title in titles)
    lines = []
    for name, step, whole in rows:
        kept = f"{step.documents_out / step.documents_in:.1%}" if step.documents_in else "–"
        figures = [kept, f"{step.documents_out:,}", f"{step.characters_out:,}", _seconds(step)]
        cells = "".join(f'<td class="number">{figure}</td>' for _, figure in zip(titles, figures, strict=False))
        lines.append(f'<tr><th scope="row">{name}</th><td class="wide">{_bar(step, whole)}</td>{cells}</tr>')
    head = f"<tr><th>{what}</th><th>kept, and dropped</th>{heads}</tr>"
    return f'<div class="panel"><table class="bars"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _bar(step: StepCounts, whole: StepCounts) -> str:
    """The documents kept and dropped, the characters kept, and the legend of the reasons."""
    dropped = [(reason, count) for reason, count in step.dropped if count]
    if len(dropped) > len(RUN_COLOURS):
        first, others = dropped[: len(RUN_COLOURS) - 1], dropped[len(RUN_COLOURS) - 1 :]
        dropped = [*first, (f"{len(others)} others", sum(count for _, count in others))]
    parts = list(zip(RUN_COLOURS, dropped, strict=False))
    segments = [(KEPT_COLOUR, ("kept", step.documents_out)), *parts]
    bar = "".join(_segment(colour, count, whole.documents_in, f"{label}: {count:,} documents") for colour, (label, count) in segments)
    thin = _segment(KEPT_COLOUR, step.characters_out, whole.characters_in, f"{step.characters_out:,} characters")
    named = legend([(colour, f"{label} {count:,}") for colour, (label, count) in parts])
    return f'<div class="bar">{bar}</div><div class="bar thin">{thin}</div>{named}'


def _segment(colour: str, count: int, whole: int, label: str) -> str:
    width = min(100.0, 100 * count / whole) if whole else 0.0
    return f'<span style="width:{width:.2f}%;background:{colour}" title="{escape(label)}"></span>' if count else ""


def _reasons(steps: list[StepCounts]) -> str:
    ranked = [(step, reason, count) for step in steps for reason, count in step.dropped if count]
    rows = "".join(
        f'<tr><td>{escape(step.name)}</td><td>{escape(reason)}</td><td class="number">{count:,}</td>'
        f'<td class="number">{count / step.documents_in:.2%}</td></tr>'
        for step, reason, count in ranked[:LISTED]
    )
    heads = '<th>step</th><th>reason</th><th class="number">documents</th><th class="number">of those that came into the step</th>'
    more = f'<p class="note">… and {len(ranked) - LISTED:,} more</p>' if len(ranked) > LISTED else ""
    body = f'<div class="panel"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>{more}</div>'
    return f"<details><summary>All reasons ({len(ranked):,})</summary>{body}</details>" if ranked else ""


def _samples_of(title: str, by_reason: dict[str, list[Sample]], num_samples: int, num_characters: int) -> str:
    groups = []
    for reason, drawn in by_reason.items():
        shown = "".join(_shown(sample, num_characters) for sample in drawn[:num_samples])
        heading = f"<h3>{escape(reason)}</h3>" if reason else ""
        groups += [f'{heading}<div class="columns">{shown}</div>'] if shown else []
    return f"<details><summary>{escape(title)}: samples</summary>{''.join(groups)}</details>" if groups else ""


def _shown(sample: Sample, num_characters: int) -> str:
    beginning = sample.beginning[:num_characters]
    cut = " …" if len(beginning) < sample.num_characters else ""
    finding = f"{swatch(RUN_COLOURS[1], sample.finding)} " if sample.finding else ""
    head = f'<p class="note">{finding}<code>{escape(sample.id[:200])}</code>, {sample.num_characters:,} characters</p>'
    return f'<div class="panel sample">{head}<div class="text">{escape(beginning)}{cut}</div></div>'


def _problems(problems: list[str]) -> str:
    items = "".join(f"<li>{escape(problem[:1_000])}</li>" for problem in problems[:LISTED])
    more = f"<li>… and {len(problems) - LISTED:,} more</li>" if len(problems) > LISTED else ""
    return f'<div class="panel problems"><h3>Passed over</h3><ul>{items}{more}</ul></div>' if problems else ""


def _share_dropped(step: StepCounts) -> str:
    return f"{1 - step.documents_out / step.documents_in:.1%}" if step.documents_in else "–"


def _seconds(step: StepCounts) -> str:
    return "–" if step.seconds is None else f"{step.seconds:,.1f}"
