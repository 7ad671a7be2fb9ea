"""Rebuilds examples/corpus: a small real corpus of Japanese and English pages and Python source, out of Debian packages.

    python examples/build_corpus.py PACKAGES OUTPUT

PACKAGES is a folder that holds the .deb files, or an empty one into which `apt-get download` then fetches them (Debian 12).
Every row is {id, text, source, kind, language, licence}. Standard library only.
"""

import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

MIN_CHARACTERS = 300  # a shorter page is a redirect, a menu or a stub
MIN_JAPANESE = 0.3  # share of kana and kanji below which a "Japanese" page is mostly untranslated
JAPANESE = re.compile(r"[぀-ヿ㐀-鿿々〆]")
LATIN_WORD = re.compile(r"[A-Za-z]{2,}")
# Source lines are wrapped in HTML; Japanese has no spaces between words, so a wrap between two full-width characters is nothing.
WRAP = re.compile(r"(?<=[　-鿿＀-￯])[ \t]*\n\s*(?=[　-鿿＀-￯])")

CELL = "\ue000"  # private use, not white space: stands where a table cell starts, so that WRAP does not glue the cells


@dataclass(frozen=True)
class Source:
    """One package (or two that belong together), which files of it are taken, and where the text of a page lies."""

    name: str
    packages: tuple[str, ...]
    pattern: str  # glob below the unpacked package
    kind: str
    language: str
    licence: str
    start: str = ""  # the id, class, role or tag of the element that holds the main content
    skip: frozenset[str] = field(default_factory=frozenset)  # ids and classes of navigation inside it
    exclude: str = "$^"  # file names (regular expression) that are indexes, tables or generated
    max_characters: int = 10**9  # a subset of the files, in an order that their names' hashes give


APACHE = frozenset({"toplang", "bottomlang", "top", "quickview", "permalink", "seealso", "comments_section", "outofdate"})
SPHINX = frozenset({"headerlink", "toctree-wrapper", "contents", "topic-contents", "prev-next-area"})
DOCBOOK = frozenset({"toc", "indexterm", "navheader", "navfooter", "docnav", "footnotes"})
SOURCES = [
    Source(
        "apache2-doc-ja", ("apache2-doc",), "usr/share/doc/apache2-doc/manual/ja/**/*.html", "web", "ja", "Apache-2.0",
        start="page-content", skip=APACHE,
        exclude=r"(index|quickreference|directives|sitemap|license)\.html",
    ),
    Source(
        "libreoffice-help-ja", ("libreoffice-help-ja",), "usr/share/libreoffice/help/ja/text/**/*.html", "web", "ja", "MPL-2.0",
        start="DisplayArea", skip=frozenset({"howtoget", "relatedtopics", "noteicon", "MAC", "icon", "embedded"}),
    ),
    Source(
        "groonga-doc-ja", ("groonga-doc",), "usr/share/doc/groonga-doc/ja/html/**/*.html", "web", "ja", "LGPL-2.1-only",
        start="main", skip=SPHINX, exclude=r"(index|genindex|search)\.html|/news/|/contribution/",
    ),
    Source(
        "debian-handbook-ja", ("debian-handbook",), "usr/share/doc/debian-handbook/html/ja-JP/*.html", "documents", "ja", "CC-BY-SA-3.0",
        start="body", skip=DOCBOOK | {"banner", "title-bar"}, exclude=r"index\.html",
    ),
    Source(
        "debian-reference-ja", ("debian-reference-ja",), "usr/share/debian-reference/ch*.ja.html", "documents", "ja", "GPL-2.0-or-later",
        start="chapter", skip=DOCBOOK,
    ),
    Source(
        "installation-guide-ja", ("installation-guide-amd64",), "usr/share/doc/installation-guide-amd64/ja/*.html", "documents", "ja",
        "GPL-2.0-only", start="body", skip=DOCBOOK, exclude=r"(index|ape\w*|apd\w*|apf\w*)\.html",
    ),
    Source(
        "apache2-doc-en", ("apache2-doc",), "usr/share/doc/apache2-doc/manual/en/**/*.html", "web", "en", "Apache-2.0",
        start="page-content", skip=APACHE,
        exclude=r"(index|quickreference|directives|sitemap|license)\.html", max_characters=900_000,
    ),
    Source(
        "python3.11-doc", ("python3.11-doc",), "usr/share/doc/python3.11/html/*/*.html", "web", "en", "PSF-2.0",
        start="main", skip=SPHINX, exclude=r"index\.html", max_characters=1_300_000,
    ),
    Source(
        "python3.11-stdlib", ("libpython3.11-stdlib", "libpython3.11-minimal"), "usr/lib/python3.11/**/*.py", "code", "python", "PSF-2.0",
        exclude=r"/test/|/encodings/\w+\.py|/(topics|tables)\.py|_sysconfigdata", max_characters=1_500_000,
    ),
]  # fmt: skip

HEADINGS = frozenset("h1 h2 h3 h4 h5 h6".split())
BLOCKS = HEADINGS | frozenset("p div section li ul ol dl dt dd table tr pre blockquote hr figure article main aside header body".split())
VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
UNSEEN = frozenset("script style nav button svg select head".split())


class Page(HTMLParser):
    """Cuts the main content of one HTML page into blocks: (text, kind of block), kind being pre, text, or h1 to h6."""

    def __init__(self, source: Source) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[str, str]] = []
        self._source = source
        self._open: list[tuple[str, bool, bool]] = []  # of every open element: tag, does it start the content, is it left out
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self._close_block()
        elif tag == "br":
            self._text.append("\n" if self._inside("pre") else " ")
        elif tag in ("td", "th"):
            self._text.append(CELL)
        if tag not in VOID:
            values = dict(attributes)
            marks = {values.get("id"), values.get("role"), *(values.get("class") or "").split()}
            starts = self._source.start in marks or self._source.start == tag
            self._open.append((tag, starts, tag in UNSEEN or not self._source.skip.isdisjoint(marks)))

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self._close_block()
        if any(tag == name for name, _, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if any(starts for _, starts, _ in self._open) and not any(left_out for _, _, left_out in self._open):
            self._text.append(data)

    def _inside(self, *tags: str) -> bool:
        return any(tag in tags for tag, _, _ in self._open)

    def _close_block(self) -> None:
        text = "".join(self._text)
        self._text = []
        if self._inside("pre"):
            self.blocks.append((text.replace(CELL, " ").expandtabs(4).strip("\n"), "pre"))
        else:
            heading = next((tag for tag, _, _ in self._open if tag in HEADINGS), "text")
            self.blocks.append((" ".join(WRAP.sub("", text).replace(CELL, " ").split()), heading))


def paragraphs(html: str, source: Source) -> Iterator[tuple[str, str]]:
    """The blocks of a page worth keeping: not empty, and in a Japanese source not a paragraph that was left in English."""
    page = Page(source)
    page.feed(html)
    page.close()
    for text, kind in page.blocks:
        latin_words, japanese_letters = len(LATIN_WORD.findall(text)), len(JAPANESE.findall(text))
        untranslated = source.language == "ja" and kind != "pre" and latin_words > max(3, japanese_letters)
        if text.strip() and not untranslated:
            yield text, kind


def pages(root: Path, source: Source) -> Iterator[dict[str, str]]:
    """Rows of an HTML source. A paragraph occurs once in the source; a line that a tenth of the pages share is boilerplate."""
    files = [path for path in sorted(root.glob(source.pattern)) if not path.is_symlink() and not re.search(source.exclude, str(path))]
    blocks_of = {path: list(paragraphs(path.read_text(encoding="utf-8"), source)) for path in files}
    pages_with = Counter(text for blocks in blocks_of.values() for text in {text for text, _ in blocks})
    base, seen = source.pattern.split("*")[0].rpartition("/")[0], set[str]()
    for path, blocks in blocks_of.items():
        kept: list[tuple[str, str]] = []
        for text, kind in blocks:
            boilerplate = kind not in HEADINGS and pages_with[text] > max(10, len(files) / 10)
            if boilerplate or (len(text) > 30 and text in seen):
                continue
            seen.add(text)
            if kind in HEADINGS and kept and kept[-1][1] in HEADINGS and kept[-1][1] >= kind:
                kept.pop()  # nothing is left of that section
            kept.append((text, kind))
        text = "\n".join("\n" + text if kind in HEADINGS else text for text, kind in kept).strip()
        too_foreign = source.language == "ja" and len(JAPANESE.findall(text)) < MIN_JAPANESE * len(text)
        if len(text) >= MIN_CHARACTERS and not too_foreign:
            yield {"id": f"{source.name}/{path.relative_to(root / base).with_suffix('')}", "text": text}


def modules(root: Path, source: Source) -> Iterator[dict[str, str]]:
    """Rows of a Python source: whole modules, as they are."""
    for path in sorted(root.glob(source.pattern)):
        text = path.read_text(encoding="utf-8", errors="replace")
        if 1_000 <= len(text) <= 60_000 and not re.search(source.exclude, str(path)) and "�" not in text:
            yield {"id": f"{source.name}/{path.relative_to(root / 'usr/lib/python3.11')}", "text": text}


def subset(rows: list[dict[str, str]], max_characters: int) -> list[dict[str, str]]:
    """As many rows as fit, taken in the order of their ids' hashes (so over all topics), returned in their own order."""
    chosen, room = set(), max_characters
    for row in sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest()):
        if len(row["text"]) <= room:
            room -= len(row["text"])
            chosen.add(row["id"])
    return [row for row in rows if row["id"] in chosen]


def unpack(source: Source, packages: Path, root: Path) -> None:
    for name in source.packages:
        if not list(packages.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], cwd=packages, check=True)
        for package in packages.glob(f"{name}_*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)


def main(packages: Path, output: Path) -> None:
    """Writes OUTPUT/<kind>_<language>.jsonl.gz (code.jsonl.gz for code) and prints a line for every source."""
    packages.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, str]]] = {}
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            unpack(source, packages, Path(folder))
            found = modules(Path(folder), source) if source.kind == "code" else pages(Path(folder), source)
            rows = subset(list(found), source.max_characters)
        labels = {"source": source.name, "kind": source.kind, "language": source.language, "licence": source.licence}
        file = "code" if source.kind == "code" else f"{source.kind}_{source.language}"
        files.setdefault(file, []).extend(row | labels for row in rows)
        print(f"{source.name:22} {len(rows):5} documents {sum(len(row['text']) for row in rows):10,} characters")
    for file, rows in files.items():
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        (output / f"{file}.jsonl.gz").write_bytes(buffer.getvalue())
        print(f"{file + '.jsonl.gz':22} {len(rows):5} documents {len(buffer.getvalue()):10,} bytes")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:3]))
