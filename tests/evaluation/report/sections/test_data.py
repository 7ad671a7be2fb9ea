import json
from pathlib import Path

from tests.evaluation.report.pages import build, make_run


def test_the_numbers_of_the_sources_come_from_the_ledger(tmp_path: Path) -> None:
    html = build(tmp_path, make_run(tmp_path / "run", {"web": 30, "chat": 10}))
    for number in ("777,000", "777,001", "1,554,001", "1,111,112", "7,654,321", "333,000", "69.9%"):
        assert number in html, number
    assert "web_ja: 777,000 tokens" in html


def test_the_tokens_that_are_trained_on_are_counted_where_they_differ(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"web": 30, "chat": 10})
    plain = build(tmp_path, run)
    assert '<th class="number">trained on</th>' not in plain
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["phase"] == "chat":
            row["trained_by_source"] = {"web_ja": 0, "<qa>": 1_001}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = build(tmp_path, run)
    assert html.count('<th class="number">trained on</th>') == 1 and html.count('<td class="number">10,010</td>') == 2, "the source, all"
