"""The report of a preparation: its figures add up, its samples are the same each time, and no document or file can break it."""

import gzip
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.report import MAX_BYTES, SourceReport, StepCounts, samples, table, write_report

ATTACK = '</script></div><script>alert(1)</script><img src=x onerror=alert(2)>" onerror="alert(3)'


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def make_source(folder: Path, name: str = "web", text: str = "本文") -> SourceReport:
    """100 documents in, 60 out: 30 and 5 with a reason, 5 without one."""
    steps = [
        StepCounts("quality", 100, 5_000, 70, 4_000, {"short": 20, "symbols": 10}),
        StepCounts("minhash", 70, 4_000, 60, 3_000, {"near duplicate": 5}, seconds=2.5),
    ]
    kept = write_rows(folder / f"{name}-kept.jsonl.gz", [{"id": f"{name}-{n}", "text": f"{text} {n}"} for n in range(60)])
    chat = [{"role": "user", "content": f"{text} 問い"}, {"role": "assistant", "content": "答え"}]
    short = [{"id": f"{text} {n}", "messages": chat, "reason": f"short: {text}"} for n in range(20)]
    symbols = [{"id": f"s{n}", "text": text * 900, "reason": "symbols"} for n in range(10)]
    removed = {"quality": [write_rows(folder / f"{name}-quality.jsonl.gz", short + symbols)]}
    return SourceReport(name, [("language", "ja")], steps, [kept], removed, [])


def written(tmp_path: Path, *reports: SourceReport) -> str:
    path = tmp_path / "out" / "report.html"
    write_report(list(reports), path)
    assert list(path.parent.iterdir()) == [path]
    return path.read_text(encoding="utf-8")


def test_nothing_in_a_document_becomes_html(tmp_path: Path) -> None:
    report = make_source(tmp_path, text=ATTACK)
    removed = write_rows(tmp_path / "attack.jsonl.gz", [{"id": ATTACK, "text": ATTACK, "reason": f"{ATTACK}: {ATTACK}"}])
    steps = [StepCounts(ATTACK, 100, 10, 90, 9, {ATTACK: 10}), *report.steps]
    report = SourceReport(f"web {ATTACK}", [(ATTACK, ATTACK)], steps, report.kept, {**report.removed, ATTACK: [removed]}, [ATTACK])
    elements = Elements(written(tmp_path, report, make_source(tmp_path, "other")))
    assert elements.tags.count("script") == 1 and "img" not in elements.tags and "onerror" not in elements.attributes


def test_the_figures_add_up(tmp_path: Path) -> None:
    report = make_source(tmp_path)
    assert report.total.dropped == [("quality", 30), ("minhash", 10)]
    assert dict(report.steps[1].dropped) == {"near duplicate": 5, "no reason given": 5}
    html = written(tmp_path, report)
    bars = re.findall(r'<div class="bar">(.*?)</div>', html)
    widths = [[float(width) for width in re.findall(r"width:([\d.]+)%", bar)] for bar in bars]
    assert widths == [[70, 20, 10], [60, 5, 5]], "kept and dropped, of the 100 documents that came in"
    assert [float(width) for width in re.findall(r'<div class="bar thin"><span style="width:([\d.]+)%', html)] == [80, 60]
    console = Console(file=io.StringIO(), width=150)
    console.print(table([report]))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines() if "web" in line]
    assert lines[0] == ["web", "quality", "100", "70", "30.0%", "4,000", "–", "short", "20,", "symbols", "10"]
    assert lines[2] == ["web", "all", "steps", "100", "60", "40.0%", "3,000", "2.5", "quality", "30,", "minhash", "10"]


def test_samples_are_drawn_from_everywhere_and_the_same_again(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "text": "x" * n, "reason": f"{'rare' if n == 17 else 'short'}: {n}"} for n in range(400)]
    paths = [write_rows(tmp_path / f"{n:03}.jsonl.gz", rows[n::4]) for n in range(4)]
    drawn, problems = samples(paths, "seed")
    assert samples(paths[::-1], "seed") == (drawn, problems) and problems == []
    assert samples(paths, "another")[0] != drawn
    assert [(sample.id, sample.finding, sample.num_characters) for sample in drawn["rare"]] == [("17", "17", 17)]
    assert len({sample.id for sample in drawn["short"]}) == 6 and all(len(sample.beginning) <= 600 for sample in drawn["short"])
    counts = [int(sample.id) for n in range(100) for sample in samples(paths, str(n))[0]["short"]]
    assert 180 < sum(counts) / len(counts) < 220, "the first rows are no likelier than the last"


def test_samples_stand_under_their_reason(tmp_path: Path) -> None:
    html = written(tmp_path, make_source(tmp_path))
    short, symbols = html.split("<h3>short</h3>")[1].split("<h3>symbols</h3>")
    assert "user: 本文 問い\nassistant: 答え" in short and "1,800 characters" not in short
    assert "1,800 characters" in symbols and "本文" * 300 + " …" in symbols


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"no gzip", lambda data: gzip.compress(b'{"id": 1}\n[]')]
)
def test_a_damaged_file_costs_only_its_samples(tmp_path: Path, damage) -> None:
    report = make_source(tmp_path)
    path = report.removed["quality"][0]
    path.write_bytes(damage(path.read_bytes()))
    report.kept.append(tmp_path / "gone.jsonl.gz")
    html = written(tmp_path, report)
    assert "Passed over<" in html and "no more samples of web-quality.jsonl.gz" in html and "no more samples of gone.jsonl.gz" in html
    assert "Kept at the end" in html


def test_a_source_without_documents_or_steps(tmp_path: Path) -> None:
    nothing = StepCounts("quality", 0, 0, 0, 0, {})
    reports = [SourceReport("no-steps", [], [], [], {}, []), SourceReport("no-documents", [], [nothing], [], {"quality": []}, [])]
    assert written(tmp_path, *reports).count("No documents came in.") == 2
    assert table(reports).row_count == 2
    assert "<h1>" in written(tmp_path)


def test_many_long_samples_leave_the_page_small(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "text": "漢" * 2_000, "reason": f"reason {n % 40}"} for n in range(400)]
    path = write_rows(tmp_path / "removed.jsonl.gz", rows)
    steps = [StepCounts(f"step {n}", 1_000, 9, 600, 9, {f"reason {r}": 10 for r in range(40)}) for n in range(30)]
    html = written(tmp_path, SourceReport("web", [], steps, [], {step.name: [path] for step in steps}, ["…" * 9_000] * 500))
    assert len(html.encode()) <= MAX_BYTES and "漢" * 100 in html
