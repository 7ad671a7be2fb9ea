"""examples/debian_corpus.py on a package of two pages and no network."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fastwarc.warc import ArchiveIterator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import debian_corpus  # noqa: E402
from build_corpus import Source  # noqa: E402

PAGE = "<html><head><title>題</title></head><body><p class='本文'>{}</p><script>let 本文 = 1</script></body></html>"
MAN = r""".\" comment
.TH PRINTF 3
.SH 名前
printf \- 書式付きの
出力。
これは \fBstdout\fP(3) に
.BR write (2)
する。
.nf
int x;
  int y;
.fi
.TS
lb lb
l l.
a	b
.TE
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small_1_all.deb; `apt-get` is there and finds nothing."""
    root = tmp_path / "small"
    contents = {"DEBIAN/control": "Package: small\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.example>\nDescription: small\n"}
    contents |= {f"usr/html/{n}.html": PAGE.format(" ".join(f"単語{n}と{m}番" for m in range(300))) for n in range(4)}
    contents |= {"usr/share/doc/small/copyright": "free", "usr/lib/a.py": "x = 1\n", "usr/lib/empty.py": ""}
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "usr/lib/latin.py").write_bytes(b"# \xe9\n")
    (root / "bin").mkdir()
    (root / "bin/apt-get").write_text("#!/bin/sh\necho E: no network >&2\nexit 100\n")
    (root / "bin/apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(root / "bin"), prepend=":")
    (tmp_path / "packages").mkdir()
    subprocess.run(["dpkg-deb", "--build", root, tmp_path / "packages"], check=True, capture_output=True)
    web = Source("small", ("small",), "usr/html/*.html", "web", "ja", "MIT")
    code = Source("modules", ("small",), "usr/lib/*.py", "code", "python", "MIT")
    monkeypatch.setattr(debian_corpus, "SOURCES", [web, code, Source("gone", ("gone",), "**/*.html", "web", "en", "MIT")])
    return tmp_path / "packages"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_a_corpus_of_what_can_be_had(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "corpus"
    debian_corpus.main(output, packages, plant_duplicates=0.6, dialogues=5)
    said = capsys.readouterr().out
    assert "left out: E: no network" in said and "could not be had: gone" in said
    pages = {}
    for path in sorted(output.glob("web_ja/*.warc.gz")):
        for record in ArchiveIterator(path.open("rb"), parse_http=True):
            assert (
                record.headers["WARC-Date"].startswith("2023-")
                and record.http_headers.status_code == 200
                and record.http_content_type == "text/html"
            )
            pages[record.record_id] = record.headers["WARC-Target-URI"], record.reader.read().decode()
    planted = [json.loads(line) for line in (output / "planted.jsonl").read_text().splitlines()]
    assert len(pages) == 4 + len(planted) and 0 < len(planted) < 4
    for row in planted:
        (url, page), (copy_url, copy) = pages[row["id"]], pages[row["copy_id"]]
        assert (url, copy_url) == (row["url"], row["copy_url"]) and url != copy_url
        assert (page == copy) == (row["strength"] == 0.0)
    rows = [json.loads(line) for line in gzip.decompress((output / "code/modules.jsonl.gz").read_bytes()).splitlines()]
    assert [(row["path"], row["text"], row["licence"]) for row in rows] == [("usr/lib/a.py", "x = 1\n", "MIT")]
    assert "| `small` | web | small | MIT |" in (output / "LICENCES.md").read_text() and (output / "licences/small.txt").exists()
    first = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    debian_corpus.main(output, packages, plant_duplicates=0.6, dialogues=5)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == first


def test_edits_are_as_strong_as_asked_and_leave_the_markup() -> None:
    page = PAGE.format(" ".join(f"漢 {n} 字" for n in range(2_000)))
    similarities = []
    for strength in debian_corpus.STRENGTHS:
        copy, similarity = debian_corpus.edited(page, strength, debian_corpus.random.Random(1))
        similarities.append(similarity)
        assert debian_corpus.MARKUP.findall(copy) == debian_corpus.MARKUP.findall(page) and "<script>let 本文 = 1</script>" in copy
        words, other = debian_corpus.WORD.findall(page), debian_corpus.WORD.findall(copy)
        assert abs(len(other) - len(words) * (1 - 0.3 * strength)) < 0.02 * len(words)
    assert similarities[0] == 1.0 and similarities == sorted(similarities, reverse=True) and similarities[-1] < 0.7


def test_man_pages_become_text() -> None:
    text = "名前\n\nprintf - 書式付きの出力。これは stdout(3) に write(2) する。\n\nint x;\n  int y;\n\na b"
    assert debian_corpus.man_text(MAN) == text
    assert debian_corpus.man_text(".so man3/printf.3\n") == ""
