import json
from pathlib import Path

from tests.evaluation.report.pages import build, charts, make_full_run, section


def test_the_shares_are_drawn_where_sources_are_weighed(tmp_path: Path) -> None:
    run = make_full_run(tmp_path / "run")
    assert "Share of the loss" not in build(tmp_path, run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["weight_by_source"] = {source: 1 / len(row["loss_by_source"]) for source in row["loss_by_source"]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (chart,) = charts(section(build(tmp_path, run), "Share of the loss by source")).values()
    assert chart.count("data-label=") == 3
