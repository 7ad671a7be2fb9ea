"""Makes a raw corpus for trials of `mujina prepare` out of Debian packages: WARC archives, HTML, text, code and chat.

    python examples/debian_corpus.py OUTPUT [--packages FOLDER] [--plant-duplicates 0.1]

    OUTPUT/web_ja/, web_en/      WARC archives of HTML pages as they are: menus, stubs, and in web_ja pages of other languages
    OUTPUT/documents/            HTML pages of books, man pages as text
    OUTPUT/code/                 Python modules: rows {id, text, path, source, language, licence}
    OUTPUT/chat/                 rule-based dialogues, and held-out questions (data_prep/synthetic/rules.py)
    OUTPUT/planted.jsonl         the near-duplicates: {id, url, copy_id, copy_url, strength, similarity}
    OUTPUT/LICENCES.md           the licence of each source, with its package's copyright file in OUTPUT/licences/

Packages that FOLDER lacks are fetched into it with `apt-get download` (Debian 12); what cannot be had is named and left out. OUTPUT
appears when it is whole. The same packages and arguments give the same pages, archives and duplicates.
"""

import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from build_corpus import WRAP, Source, unpack
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_prep.synthetic import rules
from mujina.files import whole_folder
from mujina.user_input import command_line

ARCHIVE_BYTES = 8 << 20  # of the pages in one archive: small enough that a trial has several for each process
STRENGTHS = (0.0, 0.01, 0.03, 0.1, 0.3)  # of the planted copies: the share of their words that is edited
HELD_OUT = 200  # questions
GFDL = "GFDL-1.2-or-later"
SOURCES = [
    Source("libreoffice-help-ja", ("libreoffice-help-ja",), "usr/share/libreoffice/help/ja/**/*.html", "web", "ja", "MPL-2.0"),
    Source("gimp-help-ja", ("gimp-help-ja",), "usr/share/gimp/2.0/help/ja/**/*.html", "web", "ja", GFDL),
    Source("groonga-doc-ja", ("groonga-doc",), "usr/share/doc/groonga-doc/ja/**/*.html", "web", "ja", "LGPL-2.1-only"),
    Source("lilypond-doc-ja", ("lilypond-doc-html-ja",), "usr/share/doc/lilypond/**/*.html", "web", "ja", "GFDL-1.3-or-later"),
    # Not only Japanese: this is for the language filter.
    Source("apache2-doc", ("apache2-doc",), "usr/share/doc/apache2-doc/manual/**/*.html", "web", "ja", "Apache-2.0", exclude="/manual/en/"),
    Source("libreoffice-help-en", ("libreoffice-help-en-us",), "usr/share/libreoffice/help/en-US/**/*.html", "web", "en", "MPL-2.0"),
    Source("gimp-help-en", ("gimp-help-en",), "usr/share/gimp/2.0/help/en/**/*.html", "web", "en", GFDL),
    Source("groonga-doc-en", ("groonga-doc",), "usr/share/doc/groonga-doc/en/**/*.html", "web", "en", "LGPL-2.1-only"),
    Source("apache2-doc-en", ("apache2-doc",), "usr/share/doc/apache2-doc/manual/en/**/*.html", "web", "en", "Apache-2.0"),
    Source("python3.11-doc", ("python3.11-doc",), "usr/share/doc/python3.11/html/**/*.html", "web", "en", "PSF-2.0"),
    Source("debian-policy", ("debian-policy",), "usr/share/doc/debian-policy/**/*.html", "web", "en", "GPL-2.0-or-later"),
    Source("postgresql-doc-15", ("postgresql-doc-15",), "usr/share/doc/postgresql-doc-15/html/**/*.html", "web", "en", "PostgreSQL"),
    Source("debian-handbook", ("debian-handbook",), "usr/share/doc/debian-handbook/html/ja-JP/*.html", "documents", "ja", "CC-BY-SA-3.0"),
    Source("debian-reference", ("debian-reference-ja",), "usr/share/debian-reference/*.ja.html", "documents", "ja", "GPL-2.0-or-later"),
    Source(
        "installation-guide", ("installation-guide-amd64",), "usr/share/doc/installation-guide-amd64/ja/*.html", "documents", "ja",
        "GPL-2.0-only",
    ),
    Source("manpages-ja", ("manpages-ja",), "usr/share/man/ja/**/*.gz", "documents", "ja", "various, each page's own"),
    Source("manpages-ja-dev", ("manpages-ja-dev",), "usr/share/man/ja/**/*.gz", "documents", "ja", "various, each page's own"),
    Source(
        "python3.11-stdlib", ("libpython3.11-stdlib", "libpython3.11-minimal"), "usr/lib/python3.11/**/*.py", "code", "python", "PSF-2.0"
    ),
    Source("python-stdlib", (), "**/*.py", "code", "python", "PSF-2.0", exclude="/site-packages/|/dist-packages/"),  # of this interpreter
]  # fmt: skip

# Tags, comments, and what is between the tags of elements that show no text.
MARKUP = re.compile(r"<(script|style|head)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.DOTALL | re.IGNORECASE)
WORD = re.compile(r"[^\W_぀-ヿ㐀-鿿]+|[゠-ヿ]+|[㐀-鿿]{1,2}|[぀-ゟ]{1,2}")  # of Japanese: what is near enough to a word
CHARSET = re.compile(rb"charset=[\"']?([\w-]+)", re.IGNORECASE)


class Unavailable(Exception):
    """A package cannot be downloaded or unpacked here; the message says why."""


def fetch(name: str, packages: Path) -> None:
    """Downloads a package unless it is there."""
    if not list(packages.glob(f"{name}_*.deb")):
        with tempfile.TemporaryDirectory(dir=packages, prefix=".partial-") as folder:
            os.chmod(folder, 0o755)
            subprocess.run(["apt-get", "download", "-q", name], cwd=folder, check=True, capture_output=True)
            for path in Path(folder).glob("*.deb"):
                os.replace(path, packages / path.name)


@contextmanager
def unpacked(source: Source, packages: Path) -> Iterator[Path]:
    """The folder of the source's packages; without packages, that of the standard library of this Python. Raises Unavailable."""
    if not source.packages:
        yield Path(sysconfig.get_path("stdlib"))
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in source.packages:
                fetch(name, packages)
            unpack(source, packages, Path(folder))
        except FileNotFoundError as error:  # no Debian
            raise Unavailable(str(error)) from None
        except subprocess.CalledProcessError as error:
            said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
            raise Unavailable(said[-1] if said else str(error)) from None
        yield Path(folder)


def files_of(source: Source, root: Path) -> list[Path]:
    found = (path for path in sorted(root.glob(source.pattern)) if path.is_file() and not path.is_symlink())
    return [path for path in found if not re.search(source.exclude, f"/{path.relative_to(root)}")]


def edited(html: str, strength: float, rng: random.Random) -> tuple[str, float]:
    """A copy of a page in which about `strength` of the words are deleted or replaced by others of the page; tags stay as they are.

    Also returns how similar the two are: the Jaccard similarity of the character 5-grams of their text.
    """
    cuts = [0, *(end for match in MARKUP.finditer(html) for end in match.span()), len(html)]
    texts = [html[start:end] for start, end in zip(cuts[::2], cuts[1::2], strict=True)]
    words = WORD.findall(" ".join(texts)) or [""]

    def edit(match: re.Match[str]) -> str:
        if rng.random() >= strength:
            return match[0]
        return rng.choice(words) if rng.random() < 0.7 else ""

    changed = [WORD.sub(edit, text) for text in texts]
    tags = [html[start:end] for start, end in zip(cuts[1::2], [*cuts[2::2], len(html)], strict=True)]
    grams, other_grams = _grams(texts), _grams(changed)
    similarity = len(grams & other_grams) / max(1, len(grams | other_grams))
    return "".join(part for pair in zip(changed, tags, strict=True) for part in pair), similarity


def _grams(texts: list[str]) -> set[str]:
    text = " ".join(unescape(" ".join(texts)).split())
    return {text[start : start + 5] for start in range(max(1, len(text) - 4))}


class Archives:
    """Writes pages into <folder>/<name>-00000.warc.gz and so on, a new file after every ARCHIVE_BYTES of pages."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._stream: Any = None
        self._bytes = self.num_files = 0

    def add(self, url: str, page: bytes) -> str:
        """Returns the record's id, which follows from the address."""
        if self._stream is None or self._bytes >= ARCHIVE_BYTES:
            self.close()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stream = open(self._folder / f"{self._name}-{self.num_files:05}.warc.gz", "wb")
            self._bytes, self.num_files = 0, self.num_files + 1
        charset = CHARSET.search(page, 0, 2048)
        kind = "text/html" + (f"; charset={charset[1].decode()}" if charset else "")
        headers = StatusAndHeaders("200 OK", [("Content-Type", kind), ("Content-Length", str(len(page)))], protocol="HTTP/1.1")
        id = f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url)}>"
        writer = WARCWriter(self._stream, gzip=True)
        fixed = {"WARC-Record-ID": id, "WARC-Date": "2023-06-10T00:00:00Z"}  # the release of Debian 12
        record = writer.create_warc_record(url, "response", payload=io.BytesIO(page), http_headers=headers, warc_headers_dict=fixed)
        writer.write_record(record)
        self._bytes += len(page)
        return id

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def write_web(source: Source, root: Path, output: Path, fraction: float, seed: int) -> tuple[str, list[dict[str, Any]]]:
    """Packs the pages, and edited copies of `fraction` of them; returns what was written, and the rows of planted.jsonl."""
    folder, num_bytes, planted = output / f"web_{source.language}", 0, []
    archives, mirror = Archives(folder, source.name), Archives(folder, f"mirror-{source.name}")
    files = files_of(source, root)
    for path in files:
        page = path.read_bytes()
        address = f"{source.packages[0]}.example/{quote(str(path.relative_to(root)))}"
        id = archives.add(f"https://{address}", page)
        num_bytes += len(page)
        rng = random.Random(f"{seed} {address}")
        if rng.random() < fraction:
            strength = rng.choice(STRENGTHS)
            copy, similarity = edited(page.decode("utf-8", "surrogateescape"), strength, rng)
            copy_id = mirror.add(f"https://mirror-{address}", copy.encode("utf-8", "surrogateescape"))
            row = {"id": id, "url": f"https://{address}", "copy_id": copy_id, "copy_url": f"https://mirror-{address}"}
            planted.append(row | {"strength": strength, "similarity": round(similarity, 4)})
    archives.close()
    mirror.close()
    num_archives = archives.num_files + mirror.num_files
    return f"{_count(files, num_bytes)}, {len(planted):,} copies, {num_archives} archives in {folder.name}", planted


def write_documents(source: Source, root: Path, output: Path) -> str:
    """Copies HTML pages and turns man pages into text, under documents/<source>."""
    num_bytes, files = 0, files_of(source, root)
    base = root / source.pattern.split("*")[0].rpartition("/")[0]
    written = []
    for path in files:
        target = output / "documents" / source.name / path.relative_to(base)
        data = path.read_bytes()
        if path.suffix == ".gz":
            text = man_text(gzip.decompress(data).decode("utf-8", "replace"))
            target, data = target.with_suffix(".txt"), text.encode()
        if data:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            written.append(target)
            num_bytes += len(data)
    return f"{_count(written, num_bytes)} in documents/{source.name}"


ESCAPES = {r"\-": "-", r"\e": "\\", r"\ ": " ", r"\~": " ", r"\(aq": "'", r"\(dq": '"', r"\(bu": "•", r"\(em": "—", r"\(en": "–"}
ESCAPE = re.compile(r"\\(?:f(?:\(..|\[[^]]*\]|.)|s[+-]?\d+|\*(?:\(..|\[[^]]*\]|.)|\(..|\[[^]]*\]|.)")
KEPT = "\ue000"  # private use
ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')


def man_text(roff: str) -> str:
    """The text of a man page: sections, paragraphs, examples and cells of tables, without fonts and without a formatter's hyphens.

    Empty for a page that only points to another one.
    """
    paragraphs = [""]  # in them "\n" is a line's end in the source, KEPT one that is to be seen
    end, in_table_format = "\n", False
    for line in roff.splitlines():
        macro = re.match(r"[.'][ \t]*(\\\"|\w*)(.*)", line)
        if macro is None:
            if not in_table_format:
                paragraphs[-1] += _unescaped(line) + end
                paragraphs += [""] if not line.strip() and end != KEPT else []
            in_table_format = in_table_format and not line.rstrip().endswith(".")
            continue
        name, arguments = macro[1], [_unescaped(quoted or bare) for quoted, bare in ARGUMENT.findall(macro[2])]
        if name in ("SH", "SS"):
            paragraphs += [" ".join(arguments), ""]
        elif name in ("PP", "P", "LP", "TP", "HP", "sp", "IP", "TQ", "RS", "RE"):
            paragraphs.append(arguments[0] + " " if name == "IP" and arguments else "")
        elif name in ("nf", "EX", "fi", "EE"):
            end = KEPT if name in ("nf", "EX") else "\n"
            paragraphs.append("")
        elif name in ("B", "I", "SM", "SB"):
            paragraphs[-1] += " ".join(arguments) + end
        elif name in ("BR", "RB", "BI", "IB", "IR", "RI"):
            paragraphs[-1] += "".join(arguments) + end
        elif name == "TS":
            in_table_format = True
    filled = (text if KEPT in text else " ".join(WRAP.sub("", text).split()) for text in paragraphs)
    return "\n\n".join(text.replace(KEPT, "\n").strip("\n") for text in filled if text.strip(KEPT + "\n "))


def _unescaped(text: str) -> str:
    return ESCAPE.sub(lambda match: ESCAPES.get(match[0], ""), text)


def write_code(source: Source, root: Path, output: Path) -> str:
    """Writes a row for every module that is UTF-8 and not empty."""
    rows = []
    for path in files_of(source, root):
        text, relative = path.read_text(encoding="utf-8", errors="replace"), str(path.relative_to(root))
        if text.strip() and "�" not in text:
            labels = {"path": relative, "source": source.name, "language": source.language, "licence": source.licence}
            rows.append({"id": f"{source.name}/{relative}", "text": text} | labels)
    (output / "code").mkdir(parents=True, exist_ok=True)
    (output / "code" / f"{source.name}.jsonl.gz").write_bytes(gzip.compress(_lines(rows), mtime=0))
    return f"{_count(rows, sum(len(row['text']) for row in rows))} in code"


def _count(items: list[Any], num_bytes: int) -> str:
    return f"{len(items):6,} documents {num_bytes / 1e6:8.1f} MB"


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _licence_row(source: Source, root: Path, output: Path) -> str:
    """The source's line of LICENCES.md; the packages' copyright files go into licences/."""
    (output / "licences").mkdir(exist_ok=True)
    for name in source.packages:
        copyright = root / "usr/share/doc" / name / "copyright"
        if copyright.is_file():
            shutil.copyfile(copyright, output / "licences" / f"{name}.txt")
    packages = ", ".join(source.packages) or f"Python {sys.version.split()[0]}"
    return f"| `{source.name}` | {source.kind} | {packages} | {source.licence} |"


def main(
    output: Annotated[Path, typer.Argument(help="folder to make; an older one of this command is replaced")],
    packages: Annotated[Path | None, typer.Option(help="folder of .deb files, OUTPUT.packages unless given")] = None,
    plant_duplicates: Annotated[float, typer.Option(min=0, max=1, help="share of the web pages that get an edited copy")] = 0.0,
    dialogues: Annotated[int, typer.Option(min=1, help="rule-based dialogues")] = 10_000,
    seed: Annotated[int, typer.Option(help="of the copies and the dialogues")] = 1,
) -> None:
    """Makes a raw corpus for trials out of Debian packages: WARC archives, HTML, text, code and chat."""
    packages = packages or output.with_name(f"{output.name}.packages")
    packages.mkdir(parents=True, exist_ok=True)
    planted: list[dict[str, Any]] = []
    licences = ["# Licences", "", "| source | kind | from | licence |", "| --- | --- | --- | --- |"]
    missing = []
    with whole_folder(output, mark="LICENCES.md") as folder:
        for source in SOURCES:
            print(f"{source.name:20} ", end="", flush=True)
            try:
                with unpacked(source, packages) as root:
                    if source.kind == "web":
                        done, more = write_web(source, root, folder, plant_duplicates, seed)
                        planted += more
                    else:
                        done = (write_code if source.kind == "code" else write_documents)(source, root, folder)
                    licences.append(_licence_row(source, root, folder))
            except Unavailable as error:
                done = f"left out: {error}"
                missing.append(source.name)
            print(done, flush=True)
        print(f"{'rules':20} ", end="", flush=True)
        training, held_out, _ = rules.generate(dialogues, HELD_OUT, seed)
        (folder / "chat").mkdir()
        (folder / "chat" / "chat.jsonl.gz").write_bytes(gzip.compress(_lines(training), mtime=0))
        (folder / "chat" / "held_out.jsonl").write_bytes(_lines(held_out))
        print(f"{len(training):6,} dialogues, {len(held_out)} questions held out, in chat")
        licences += [f"| `rules` | chat | data_prep/synthetic/rules.py | {rules.LICENCE} |", ""]
        if plant_duplicates:
            (folder / "planted.jsonl").write_bytes(_lines(planted))
        (folder / "LICENCES.md").write_text("\n".join(licences), encoding="utf-8")
    if missing:
        print(f"left out, because their packages could not be had: {', '.join(missing)}: call this again to try once more")


if __name__ == "__main__":
    command_line(main)
