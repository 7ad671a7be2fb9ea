"""The HTML page around a report: its style sheet, and the script that reads values off the line charts under the pointer.

The page loads nothing: style, script and charts are inside it. Every room may import this file; it imports no room.
"""

from html import escape

RUN_COLOURS = [f"var(--run-{number})" for number in range(6)]
SOURCE_COLOURS = [f"var(--source-{number})" for number in range(8)]
OTHER_RUN_COLOUR = "var(--other)"  # the other runs, behind the one that a panel is about

_STYLE = """
:root {
  color-scheme: light;
  --page: #f6f5f2; --surface: #ffffff; --ink: #1f1e1c; --muted: #68655f;
  --grid: #e7e5e0; --axis: #a9a59d; --band: #f3f1ec; --other: #cbc7bf;
  --run-0: #2a6fd6; --run-1: #d4521a; --run-2: #2c8a4b; --run-3: #a8399a; --run-4: #7a6a58; --run-5: #157f8c;
  --source-0: #1f9d90; --source-1: #e0a81c; --source-2: #8267d8; --source-3: #e0799a;
  --source-4: #8c9a34; --source-5: #9c6d48; --source-6: #70819a; --source-7: #78b8e0;
  --above: #d98a3d; --below: #6f9bd1; --kept: #9fb3c4;
  --event-0: #d59500; --event-1: #8a5bd1; --event-2: #cf2f3c; --event-3: #2f9c95; --event-4: #7d7a74;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --page: #131312; --surface: #1c1c1a; --ink: #efede8; --muted: #a5a29a;
    --grid: #302f2c; --axis: #6b6862; --band: #252522; --other: #55524c;
    --run-0: #6aa3f5; --run-1: #f58450; --run-2: #5fc080; --run-3: #dc7bd0; --run-4: #b8a58f; --run-5: #4fbccb;
    --source-0: #35b8aa; --source-1: #d6a632; --source-2: #a08af0; --source-3: #e88fac;
    --source-4: #a9b64e; --source-5: #bf8d66; --source-6: #8fa0b8; --source-7: #6ba9d0;
    --above: #c4762b; --below: #4a7ec0; --kept: #56697a;
    --event-0: #e2b23a; --event-1: #b18bf0; --event-2: #f26a72; --event-3: #4cc2b8; --event-4: #9b978f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, "Segoe UI", "Hiragino Sans", "Noto Sans CJK JP", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 14px; }
h2 { font-size: 17px; margin: 34px 0 4px; }
h3 { font-size: 14px; margin: 18px 0 4px; }
p { margin: 0 0 10px; max-width: 92ch; }
.note, footer, caption { color: var(--muted); font-size: 13px; }
.panel { background: var(--surface); border: 1px solid var(--grid); border-radius: 8px; padding: 14px 16px; margin: 0 0 14px;
  break-inside: avoid; overflow-x: auto; }
.columns { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); margin-bottom: 14px; }
.columns.small { grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); }
.columns .panel { margin: 0; }
.panel h3 { margin-top: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 8px; padding: 0; list-style: none; }
.key { white-space: nowrap; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 4px; }
th, td { padding: 4px 22px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; }
thead th, tbody th { color: var(--muted); font-weight: 500; }
thead th.run { color: var(--ink); font-weight: 600; }
.number { text-align: right; }
tr.total > * { border-top: 1px solid var(--axis); font-weight: 600; color: var(--ink); }
.samples td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 8em; }
.verdict { white-space: nowrap; display: block; color: var(--muted); font-size: 12px; }
.correct .verdict { color: var(--run-2); }
table.bars { width: 100%; }
table.bars tbody tr:last-child > *, table.facts tr:last-child > * { border-bottom: none; }
table.bars td, table.bars th { padding-bottom: 8px; }
table.bars .number:last-child { padding-right: 0; }
tbody th[scope=row] { color: var(--ink); font-weight: 600; min-width: 9em; max-width: 22em; overflow-wrap: break-word; }
td.wide { width: 60%; min-width: 260px; }
.bar { display: flex; height: 14px; margin-top: 4px; background: var(--band); border-radius: 3px; overflow: hidden; }
.bar span { flex: none; min-width: 2px; box-shadow: inset -1px 0 var(--surface); }
.bar.thin { height: 4px; margin: 3px 0 5px; }
.bar.thin span { opacity: .6; }
.wide .legend { margin: 0; font-size: 12px; color: var(--muted); }
.facts td { overflow-wrap: anywhere; }
.sample .text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
.problems li { overflow-wrap: anywhere; }
details { margin: 0 0 8px; }
summary + * { margin-top: 8px; }
pre { overflow-x: auto; margin: 8px 0 0; font-size: 12px; line-height: 1.45; }
summary { cursor: pointer; }
a { color: inherit; text-decoration-color: var(--axis); text-underline-offset: 3px; }
code { overflow-wrap: anywhere; }
footer { margin-top: 34px; border-top: 1px solid var(--grid); padding-top: 10px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .name { font-size: 13px; fill: var(--ink); }
svg .label, svg .value, svg .phase { fill: var(--ink); }
svg .grid { stroke: var(--grid); fill: none; }
svg .axis { stroke: var(--axis); fill: none; }
svg .band0 { fill: var(--band); }
svg .band1 { fill: none; }
svg .boundary { stroke: var(--axis); stroke-dasharray: 2 3; fill: none; }
svg .raw { fill: none; stroke-width: 1; stroke-opacity: .35; stroke-linejoin: round; stroke-linecap: round; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .mark path { stroke-width: 1; stroke-opacity: .55; }
svg .segment { stroke: var(--surface); stroke-width: 1; }
svg .cell { stroke: var(--surface); stroke-width: 1; }
svg .pointer { stroke: var(--muted); stroke-width: 1; fill: none; pointer-events: none; }
#tip { position: fixed; pointer-events: none; background: var(--ink); color: var(--page); border-radius: 5px; padding: 4px 8px;
  font-size: 12px;  white-space: pre; font-variant-numeric: tabular-nums; }
@media print {
  @page { margin: 14mm; }
  body { background: none; font-size: 11px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { padding: 0; max-width: none; }
  .panel { border: none; padding: 0; overflow: visible; }
  svg { min-width: 0 !important; }
  .columns { grid-template-columns: 1fr 1fr; }
  .columns.small { grid-template-columns: 1fr 1fr 1fr; }
  .long { break-inside: auto; }
  tr { break-inside: avoid; }
  h2, h3, .note { break-after: avoid; }
  details { display: none; }
}
"""

_SCRIPT = """
const tip = document.getElementById("tip");
const show = value => Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(4)).toString();
for (const svg of document.querySelectorAll("svg.lines")) {
  const [x0, x1, xLow, xHigh] = svg.dataset.x.split(" ").map(Number), [y0, y1, yLow, yHigh] = svg.dataset.y.split(" ").map(Number);
  const valueOf = pixel => {
    const share = (pixel - y0) / (y1 - y0);
    return svg.dataset.log === "1" ? yLow * (yHigh / yLow) ** share : yLow + share * (yHigh - yLow);
  };
  const lines = [...svg.querySelectorAll(".line")].map(path => ({
    label: path.dataset.label,
    points: path.getAttribute("d").split(/[ML]/).filter(Boolean).map(point => point.split(" ").map(Number)),
  })).filter(line => line.points.length);
  const pointer = document.createElementNS(svg.namespaceURI, "path");
  pointer.setAttribute("class", "pointer");
  svg.append(pointer);
  svg.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const x = Math.min(Math.max(at.x, x0), x1);
    pointer.setAttribute("d", `M${x} ${y0}V${y1}`);
    const rows = lines.map(({label, points}) => {
      const nearest = points.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
      return `${label}: ${show(valueOf(nearest[1]))}`;
    });
    tip.textContent = [`${show(xLow + (x - x0) / (x1 - x0) * (xHigh - xLow))} tokens`, ...rows].join("\\n");
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.clientY + 14 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; pointer.removeAttribute("d"); });
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document; `body` is HTML, `title` is text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f'<body>\n<main>\n{body}\n</main>\n<div id="tip" hidden></div>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n'
    )


def swatch(colour: str, label: str) -> str:
    """A square of `colour` and the text that it stands for."""
    return f'<span class="key"><span class="swatch" style="background:{colour}"></span>{escape(label)}</span>'


def legend(entries: list[tuple[str, str]]) -> str:
    """A line of (colour, label) entries."""
    return f'<ul class="legend">{"".join(f"<li>{swatch(colour, label)}</li>" for colour, label in entries)}</ul>'
