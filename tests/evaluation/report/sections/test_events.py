import re
from pathlib import Path

from tests.evaluation.report.pages import build, charts, make_full_run, section


def test_events_are_marked_where_they_happened_and_told_below(tmp_path: Path) -> None:
    html = build(tmp_path, make_full_run(tmp_path / "run"))
    chart = charts(html)["Gradient norm, before clipping"]
    start, end, low, high = map(float, re.search(r'data-x="([^"]*)"', chart).group(1).split())
    marks = re.findall(r'<g class="mark" stroke="var\(--event-(\d)\)".*?<title>(.*?)</title><path d="M(\d+)', chart)
    assert sorted(marks, key=lambda mark: int(mark[2])) == [
        ("1", "step 12, skip: the loss is 99 &amp; rising", str(round(start + (end - start) * 12 / 40))),
        ("3", "step 20, restart", str(round(start + (end - start) * 20 / 40))),
        ("0", "step 25, spike: the loss is 9", str(round(start + (end - start) * 25 / 40))),
        ("2", "step 31, rollback: the gradient norm is nan", str(round(start + (end - start) * 31 / 40))),
    ]
    assert "skip (1)" in section(html, "Gradient norm")
    table = section(html, "Events")
    assert table.index("skip</span>") < table.index("restart</span>") < table.index("rollback</span>")
    assert "2027-01-15 08:00:00" in table and "checkpoint" not in table
