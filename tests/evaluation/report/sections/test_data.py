from pathlib import Path

from tests.evaluation.report.pages import build, make_run


def test_the_numbers_of_the_sources_come_from_the_ledger(tmp_path: Path) -> None:
    html = build(tmp_path, make_run(tmp_path / "run", {"web": 30, "chat": 10}))
    for number in ("777,000", "777,001", "1,554,001", "1,111,112", "7,654,321", "333,000", "69.9%"):
        assert number in html, number
    assert "web_ja: 777,000 tokens" in html
