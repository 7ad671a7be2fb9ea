import re
from pathlib import Path

from tests.evaluation.report.pages import build, charts, make_full_run, section


def test_each_source_has_its_line_and_the_same_colour_everywhere(tmp_path: Path) -> None:
    html = build(tmp_path, make_full_run(tmp_path / "run"))
    colours = []
    for title, sources in (("Loss by source", {"web_ja", "code", "&lt;qa&gt;"}), ("Validation", {"web_ja", "code"})):
        (chart,) = charts(section(html, title)).values()
        lines = dict(re.findall(r'stroke="([^"]*)" data-label="([^"]*)"', chart))
        assert set(lines.values()) == sources
        colours.append({label: colour for colour, label in lines.items()})
        assert all(f"background:{colour}" in section(html, title) for colour in lines)
    assert colours[0] | colours[1] == colours[0] and len(set(colours[0].values())) == 3
    (chart,) = charts(section(html, "Loss by source")).values()
    assert float(re.search(r'qa&gt;" d="M([\d.]+)', chart).group(1)) > 700  # its first sample comes after three quarters
