"""Charts as inline SVG: lines over tokens with phases behind them, stacked bars, heat maps.

The chart functions return one `<svg>` string that stands alone inside an HTML page. Colours are CSS values (`var(--run-0)`), so that the
page's style sheet decides what they look like in light and dark; the classes used here (`grid`, `axis`, `raw`, …) are styled in `page.py`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

_MAX_POINTS = 1000  # drawn for one line; more cannot be seen at the width of a page
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_MAX_CELLS = 12_000  # of a heat map over time: more make the page slow
_LABEL_WIDTH = 6.6  # pixels of a character at the label size of 11 pixels, on the generous side


@dataclass(frozen=True)
class Line:
    """One line of a chart; `raw` is drawn thin behind `points`. Values that are not finite leave a gap."""

    label: str
    colour: str
    points: Points
    raw: Points = ()


@dataclass(frozen=True)
class Band:
    """A labelled stretch of the x axis."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Mark:
    """Something that happened at one place of the x axis; `label` is shown under the pointer."""

    label: str
    colour: str
    at: float


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: its segments (name, value) from left to right."""

    label: str
    segments: list[tuple[str, float]]


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        share = ((math.log10(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """Round values within the axis, about `count` of them, with their labels."""
        if self.log:
            for mantissas in ((1, 2, 5), (1,)):
                powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                values = [m * 10.0**p for p in powers for m in mantissas if self.low <= m * 10.0**p <= self.high]
                if 3 <= len(values) <= 2 * count:
                    return [(value, short(value)) for value in values]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.75)
        values = [k * step for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        unit, suffix = _unit(max(abs(value) for value in values) if values else self.high)
        decimals = next((d for d in range(6) if round(step / unit, d) == round(step / unit, 9)), 6)
        return [(value, f"{value / unit:.{decimals}f}{suffix}" if value else "0") for value in values]


def short(value: float) -> str:
    """A number in three significant digits with a unit: 0.00123, 4.5k, 12M, 3e-5."""
    value = float(f"{value:.3g}")
    unit, suffix = _unit(abs(value))
    return f"{value / unit:.3g}{suffix}"


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """The mean of the `window` points around each one (fewer at the ends); values that are not finite are left out of it."""
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y if math.isfinite(y) else 0.0))
        counts.append(counts[-1] + math.isfinite(y))
    smoothed = []
    for position, (x, _) in enumerate(points):
        first, last = max(0, position - window // 2), min(len(points), position + window // 2 + 1)
        count = counts[last] - counts[first]
        smoothed.append((x, (sums[last] - sums[first]) / count if count else math.nan))
    return smoothed


def limits(lines: Sequence[Line]) -> tuple[float, float]:
    """The lowest and the highest finite value of `lines`; (0, 1) when there is none."""
    values = [y for line in lines for _, y in [*line.points, *line.raw] if math.isfinite(y)]
    return (min(values), max(values)) if values else (0.0, 1.0)


def line_chart(
    name: str,
    lines: Sequence[Line],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    bands: Sequence[Band] = (),
    log: bool = False,
    size: tuple[int, int] = (560, 220),
    marks: Sequence[Mark] = (),
) -> str:
    """Lines over tokens. `name` is what the y axis measures, with its unit; it stands above the axis and is the chart's accessible name.

    `size` is in pixels; the chart shrinks with its column but does not grow. With `log` the y axis is logarithmic, and values that are
    not positive leave a gap.
    """
    width, height = size
    low, high = _padded(*y_range, log)
    x = Axis(*x_range, 52, width - 14)
    labels = _label_places(bands, x)
    top = 26 + 15 * max((row + 1 for _, row in labels), default=0)
    y = Axis(low, high, height - 40, top, log and low > 0)
    parts = [f'<text class="name" x="0" y="12">{escape(name)}</text>']
    for number, (band, (label_x, row)) in enumerate(zip(bands, labels, strict=True)):
        start, end, label_y = x.at(band.start), x.at(band.end), 38 + 15 * row
        parts.append(
            f'<rect class="band{number % 2}" x="{start:.1f}" y="{label_y - 11}" width="{end - start:.1f}"'
            f' height="{y.start - label_y + 11:.1f}"/><path class="boundary" d="M{start:.1f} {label_y - 11}V{y.start:.1f}"/>'
            f'<text class="phase" x="{label_x:.1f}" y="{label_y}">{escape(band.label)}</text>'
        )
    for value, label in y.ticks(max(3, (height - top - 40) // 40)):
        parts.append(f'<path class="grid" d="M{x.start} {y.at(value):.1f}H{x.end}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{x.start - 6}" y="{y.at(value) + 4:.1f}">{label}</text>')
    for value, label in x.ticks(max(3, width // 110)):
        parts.append(f'<path class="axis" d="M{x.at(value):.1f} {y.start:.1f}v4"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x.at(value):.1f}" y="{y.start + 17:.1f}">{label}</text>')
    parts.append(f'<path class="axis" d="M{x.start} {y.start:.1f}H{x.end}"/>')
    parts.append(f'<text class="tick" text-anchor="end" x="{x.end}" y="{height - 6}">tokens consumed</text>')
    for line in lines:
        if line.raw:
            parts.append(f'<path class="raw" stroke="{line.colour}" d="{_path(line.raw, x, y)}"/>')
        parts.append(f'<path class="line" stroke="{line.colour}" data-label="{escape(line.label)}" d="{_path(line.points, x, y)}"/>')
    parts += _marks(marks, x, y)
    # The page's script turns pixels under the pointer back into values with these.
    axes = f'data-x="{x.start} {x.end} {x.low} {x.high}" data-y="{y.start} {y.end} {y.low} {y.high}" data-log="{int(y.log)}"'
    return _svg(width, height, name, parts, f'class="lines" {axes}')


def _marks(marks: Sequence[Mark], x: Axis, y: Axis) -> list[str]:
    """A thin line for each mark, with a foot on the axis; of those of one colour at one place the first is drawn."""
    places = {(mark.colour, round(x.at(mark.at))): mark for mark in reversed(marks) if x.low <= mark.at <= x.high}
    return [
        f'<g class="mark" stroke="{colour}" fill="{colour}"><title>{escape(mark.label)}</title>'
        f'<path d="M{pixel} {y.end}V{y.start}"/><path d="M{pixel - 4} {y.start + 7}h8l-4 -7z"/></g>'
        for (colour, pixel), mark in places.items()
    ]


def stacked_bars(name: str, bars: Sequence[Bar], colours: dict[str, str], width: int = 1120) -> str:
    """One horizontal bar below the other on a common axis of tokens; `colours` maps each segment's name to its colour."""
    left = 16 + _LABEL_WIDTH * max(len(bar.label) for bar in bars)
    height = 30 + 28 * len(bars) + 24
    x = Axis(0, max(sum(value for _, value in bar.segments) for bar in bars) or 1, left, width - 60)
    parts = [f'<text class="name" x="0" y="12">{escape(name)}</text>']
    for value, label in x.ticks(8):
        parts.append(f'<path class="grid" d="M{x.at(value):.1f} 24V{height - 24}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x.at(value):.1f}" y="{height - 8}">{label}</text>')
    for number, bar in enumerate(bars):
        top, done = 30 + 28 * number, 0.0
        parts.append(f'<text class="label" text-anchor="end" x="{left - 8:.1f}" y="{top + 15}">{escape(bar.label)}</text>')
        for segment, value in bar.segments:
            start, end = x.at(done), x.at(done + value)
            parts.append(
                f'<rect class="segment" fill="{colours[segment]}" x="{start:.1f}" y="{top}" width="{end - start:.1f}" height="20">'
                f"<title>{escape(bar.label)}, {escape(segment)}: {value:,.0f} tokens</title></rect>"
            )
            done += value
        parts.append(f'<text class="tick" x="{x.at(done) + 6:.1f}" y="{top + 15}">{short(done)}</text>')
    return _svg(width, height, name, parts)


def heat_map(name: str, shares: Sequence[Sequence[float]], width: int = 560, every: int = 1) -> str:
    """Layers from top to bottom, experts from left to right; `shares[layer][expert]` sums to 1 over a layer.

    The colour says how far a share is from the uniform one: full strength at twice the uniform share (above), and at none (below).
    `every`: the rows are every so many-th layer.
    """
    num_experts = max(len(layer) for layer in shares)
    x = Axis(0, num_experts, 52, width - 14)
    cell_width, cell_height = (x.end - x.start) / num_experts, 22
    parts = [f'<text class="name" x="0" y="12">{escape(name)}</text>']
    labels_every = math.ceil(num_experts * 24 / (x.end - x.start))
    labelled = range(0, num_experts, labels_every)
    parts += [f'<text class="tick" text-anchor="middle" x="{x.at(e + 0.5):.1f}" y="34">{e}</text>' for e in labelled]
    parts.append('<text class="tick" text-anchor="end" x="44" y="34">expert</text>')
    for number, layer in enumerate(shares):
        top = 42 + cell_height * number
        parts.append(f'<text class="tick" text-anchor="end" x="44" y="{top + 15}">layer {number * every}</text>')
        for expert, share in enumerate(layer):
            ratio = share * len(layer)
            parts.append(
                f'<rect class="cell" {_fill(ratio)} x="{x.at(expert):.1f}" y="{top}" width="{cell_width:.1f}" height="{cell_height}">'
                f"<title>layer {number * every}, expert {expert}: {share:.2%} of tokens, {ratio:.2f} × uniform</title></rect>"
            )
            if cell_width >= 40:
                parts.append(f'<text class="value" text-anchor="middle" x="{x.at(expert + 0.5):.1f}" y="{top + 15}">{share:.1%}</text>')
    return _svg(width, 42 + cell_height * len(shares) + 8, name, parts)


def load_over_time(name: str, tokens: Sequence[int], loads: Sequence[Sequence[Sequence[float]]], width: int = 1120, every: int = 1) -> str:
    """The heat map over the run: tokens from left to right, and below each layer its experts, a thin row each.

    `loads[step][layer][expert]` is the share after `tokens[step]`; a cell is the mean over the steps of its stretch. Colours as in `heat_map`.
    """
    num_layers, num_experts = len(loads[0]), len(loads[0][0])
    num_columns = min(len(loads), max(8, min(96, _MAX_CELLS // (num_layers * num_experts))))
    bounds = [len(loads) * column // num_columns for column in range(num_columns + 1)]
    x = Axis(0, tokens[-1], 62, width - 14)
    cell_height = max(2, min(12, 640 // (num_layers * num_experts)))
    layer_height = cell_height * num_experts + 6
    bottom = 26 + layer_height * num_layers
    parts = [f'<text class="name" x="0" y="12">{escape(name)}</text>']
    for layer in range(num_layers):
        top = 26 + layer_height * layer
        label_y = top + (layer_height - 6) / 2 + 4
        parts.append(f'<text class="tick" text-anchor="end" x="54" y="{label_y:.1f}">layer {layer * every}</text>')
        for first, last in itertools.pairwise(bounds):
            start, end = x.at(tokens[first - 1] if first else 0), x.at(tokens[last - 1])
            for expert in range(num_experts):
                ratio = num_experts * sum(load[layer][expert] for load in loads[first:last]) / (last - first)
                parts.append(
                    f'<rect {_fill(ratio)} x="{start:.1f}" y="{top + cell_height * expert}" width="{end - start:.1f}" height="{cell_height}">'
                    f"<title>layer {layer * every}, expert {expert}, to {short(tokens[last - 1])} tokens: {ratio:.2f} × uniform</title></rect>"
                )
        parts.append(f'<rect class="grid" x="{x.start}" y="{top}" width="{x.end - x.start}" height="{layer_height - 6}"/>')
    for value, label in x.ticks(8):
        parts.append(f'<text class="tick" text-anchor="middle" x="{x.at(value):.1f}" y="{bottom + 12}">{label}</text>')
    parts.append(f'<text class="tick" text-anchor="end" x="{x.end}" y="{bottom + 28}">tokens consumed</text>')
    return _svg(width, bottom + 34, name, parts)


def _fill(ratio: float) -> str:
    """The colour of a share that is `ratio` times the uniform one."""
    colour, strength = ("var(--above)", min(ratio - 1, 1.0)) if ratio >= 1 else ("var(--below)", 1 - ratio)
    return f'fill="{colour}" fill-opacity="{strength:.3f}"'


def _svg(width: int, height: float, name: str, parts: list[str], attributes: str = "") -> str:
    style = f'style="min-width:{0.6 * width:.0f}px;max-width:{width}px"'  # labels stay readable; a narrower panel scrolls
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}" {style} {attributes}>{"".join(parts)}</svg>'


def _unit(size: float) -> tuple[float, str]:
    """What to divide values up to `size` by, and the suffix that says so."""
    if 0 < size < 1e-3:
        power = math.floor(math.log10(size) + 1e-9)
        return 10.0**power, f"e{power}"
    return next(((unit, suffix) for unit, suffix in _UNITS if size >= unit), (1.0, ""))


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """A little room above and below, and some for a line that is constant."""
    if log and low > 0:
        margin = max((high / low) ** 0.05, 1.05)
        return low / margin, high * margin
    margin = (high - low) * 0.05 or abs(high) * 0.5 or 1.0
    return (0.0 if 0 <= low <= margin else low - margin), high + margin


def _label_places(bands: Sequence[Band], x: Axis) -> list[tuple[float, int]]:
    """Where each band's label starts, and its row above the chart, so that no label covers another or leaves the chart."""
    ends: list[float] = []
    places = []
    for band in bands:
        label_width = _LABEL_WIDTH * len(band.label)
        start = max(0.0, min(x.at(band.start) + 4, x.end - label_width))
        row = next((row for row, end in enumerate(ends) if end <= start), len(ends))
        ends[row : row + 1] = [start + label_width + 6]
        places.append((start, row))
    return places


def _path(points: Points, x: Axis, y: Axis) -> str:
    """SVG path data: a stroke for each stretch without gaps."""
    strokes: list[list[tuple[float, float]]] = [[]]
    for value_x, value_y in points:
        if math.isfinite(value_y) and (value_y > 0 or not y.log):
            strokes[-1].append((value_x, value_y))
        elif strokes[-1]:
            strokes.append([])
    data = []
    for stroke in filter(None, strokes):
        pixels = [f"{x.at(value_x):.1f} {y.at(value_y):.1f}" for value_x, value_y in _thinned(stroke)]
        data.append("M" + "L".join(pixels if len(pixels) > 1 else pixels * 2))  # a single point shows as the dot of its round caps
    return "".join(data)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= _MAX_POINTS:
        return points
    stride = math.ceil(2 * len(points) / _MAX_POINTS)
    kept = []
    for start in range(0, len(points), stride):
        stretch = points[start : start + stride]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept
