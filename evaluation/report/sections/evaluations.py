"""What evaluations found: for each suite a table of its measures, over all prompts and by group, and some of the answers."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from evaluation.report.inputs import Evaluation, Inputs
from evaluation.result import Sample, Suite

_NUM_SAMPLES = 12  # answers shown
_ALL = "all"  # the group of all prompts


def section(inputs: Inputs) -> str:
    by_suite: dict[tuple[str, int], list[Evaluation]] = {}
    for evaluation in inputs.evaluations:
        by_suite.setdefault((evaluation.result.suite.name, evaluation.result.suite.version), []).append(evaluation)
    return "\n".join(map(_of_one_suite, by_suite.values()))


def _of_one_suite(evaluations: list[Evaluation]) -> str:
    suite = evaluations[0].result.suite
    note = " ".join(f"{name[0].upper()}{name[1:]}: {measure.meaning}." for name, measure in suite.measures.items())
    return (
        f'<h2>Evaluation: {escape(suite.name)}</h2><p class="note">{escape(note)}</p>'
        f'<div class="panel">{_table(evaluations, suite)}</div>{_samples(evaluations)}'
    )


def _table(evaluations: list[Evaluation], suite: Suite) -> str:
    groups = [_ALL, *dict.fromkeys(group for evaluation in evaluations for group in evaluation.result.groups)]
    columns = [(group, name) for group in groups for name in suite.measures]
    rows = []
    for evaluation in evaluations:
        values = [_value(evaluation, *column) for column in columns]
        cells = _cells(
            "–" if value is None else suite.measures[name].in_words(value) for value, (_, name) in zip(values, columns, strict=True)
        )
        rows.append(f'<tr><td>{escape(evaluation.label)}</td><td class="number">{evaluation.result.num_prompts:,}</td>{cells}</tr>')
    if len(evaluations) > 1:
        rows.append(_changes(evaluations[0], evaluations[-1], suite, columns))
    over = "".join(f'<th colspan="{len(suite.measures)}">{escape(group)}</th>' for group in groups)
    heads = "".join(f'<th class="number">{escape(name)}</th>' for _, name in columns)
    return (
        f"<table><thead><tr><th></th><th></th>{over}</tr>"
        f'<tr><th>model</th><th class="number">prompts</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _changes(first: Evaluation, last: Evaluation, suite: Suite, columns: list[tuple[str, str]]) -> str:
    changes = []
    for group, name in columns:
        before, after = _value(first, group, name), _value(last, group, name)
        changes.append("–" if before is None or after is None else suite.measures[name].change_in_words(before, after))
    points = ", points" if all(measure.is_share for measure in suite.measures.values()) else ""
    return f'<tr class="total"><td>{escape(first.label)} → {escape(last.label)}{points}</td><td></td>{_cells(changes)}</tr>'


def _cells(texts: Iterable[str]) -> str:
    return "".join(f'<td class="number">{text}</td>' for text in texts)


def _value(evaluation: Evaluation, group: str, measure: str) -> float | None:
    scores = evaluation.result if group == _ALL else evaluation.result.groups.get(group)
    return None if scores is None else scores.measures.get(measure)


def _samples(evaluations: list[Evaluation]) -> str:
    by_prompt = [_by_prompt(evaluation.result.samples) for evaluation in evaluations]
    asked = list(by_prompt[0].items())
    num_shown = min(_NUM_SAMPLES, len(asked))
    rows = []
    # Drawn rather than every n-th: prompt files often go round languages or kinds.
    for prompt, sample in (asked[number] for number in sorted(random.Random(0).sample(range(len(asked)), num_shown))):
        cells = "".join(_answer_cell(samples.get(prompt)) for samples in by_prompt)
        expected = "–" if sample.expected is None else escape(sample.expected)
        rows.append(f"<tr><td>{escape(sample.prompt)}</td><td>{expected}</td>{cells}</tr>")
    heads = "".join(f"<th>{escape(evaluation.label)}</th>" for evaluation in evaluations)
    return (
        f'<h3>Answers</h3><p class="note">{num_shown} of {len(asked)} prompts, drawn at random with a fixed seed.</p>'
        f'<div class="panel long"><table class="samples"><thead><tr><th>prompt</th><th>expected</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _by_prompt(samples: Sequence[Sample]) -> dict[tuple[str, int], Sample]:
    """The samples by their prompts; of several with one prompt the n-th is compared with the n-th."""
    seen: Counter[str] = Counter()
    found = {}
    for sample in samples:
        found[sample.prompt, seen[sample.prompt]] = sample
        seen[sample.prompt] += 1
    return found


def _answer_cell(sample: Sample | None) -> str:
    if sample is None:
        return "<td>–</td>"
    tag, sign = {True: ('<td class="correct">', "✓ "), False: ('<td class="wrong">', "✗ "), None: ("<td>", "")}[sample.right]
    return f'{tag}{escape(sample.answer)}<span class="verdict">{sign}{escape(sample.verdict)}</span></td>'
