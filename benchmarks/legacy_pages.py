"""Japanese pages in the encodings of the old web, through the reader and the step `extract`: which share of their characters survives.

    python -m benchmarks.legacy_pages FOLDER_OF_HTML [...]        (a minute; needs the extra `data`)

A seeded sample of the Japanese pages under the folders gets PLANTED before its first paragraphs: nodes of one character, links in
sentences, ruby, dates, references. Each page is then written in each encoding, what that lacks as references, declared rightly or wrongly
by header or meta element, and read from a WARC archive; last with one byte that is none of the encoding's. A planted character survives
with its whole line; one of the page's own survives where the same page in UTF-8 gives it too.
"""

import datetime
import io
import random
import re
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_prep.steps.extract import Extract
from data_prep.steps.read import PAGES, find_inputs, read
from mujina.user_input import UserError

NUM_PAGES = 50
SEED = 0
PLACES = 3  # in a page
PLANTED = {
    "<h2>序{}</h2><h3>序</h3>": "序{}序",
    "<p><a href=x>東京</a>と<a href=x>大阪</a>。{}</p>": "東京と大阪。{}",
    "<p>{}価格：<span>5</span><span>円</span>です。<time>5月</time>に①㈱髙～</p>": "{}価格：5円です。5月に①㈱髙～",
    "<p>彼は<em>私</em>の<strong>夫</strong>です。&#26149;<b>&#22799;</b>{}</p>": "彼は私の夫です。春夏{}",
    "<table><tr><td>{}</td><td>春</td><td>\n夏 </td></tr></table>": "{}春夏",
    "<p>{}<ruby>漢字<rt>かんじ</rt></ruby>と<ruby>本<rp>(</rp><rt>ほん</rt><rp>)</rp>無<rt>む</ruby>を読む。</p>": "{}漢字と本無を読む。",
    "<ul><li>{}</li><li><a href=x>茶筅</a></li><li>茶</li></ul>": "{}•茶筅•茶",
}
# What these encodings have at one place and Unicode at two: the ones that browsers read are the page's to begin with.
SAME = str.maketrans("〜−‖¢£¬", "～－∥￠￡￢")
BACK = str.maketrans("～－∥￠￡￢", "〜−‖¢£¬")
META = re.compile(r"<meta[^>]*charset[^>]*>", re.IGNORECASE)
ENCODINGS = {
    "utf-8": lambda text: text.encode(),
    "shift_jis": lambda text: text.encode("cp932", "xmlcharrefreplace"),
    "euc-jp": lambda text: _encoded(text, "euc_jp"),
    "iso-2022-jp": lambda text: _encoded(text, "iso2022_jp"),
}
OTHERS = ("iso-8859-1", "windows-1251", "euc-kr", "gb2312", "big5")


def _encoded(text: str, codec: str) -> bytes:
    """Through Python's codecs, whose tables have other characters than browsers' at a few places."""
    return text.translate(BACK).encode(codec, "xmlcharrefreplace")


def sample(folders: list[str]) -> list[str]:
    paths = [path for path in find_inputs(folders) if path.endswith(PAGES)]
    random.Random(SEED).shuffle(paths)
    pages: list[str] = []
    for path in paths:
        for document in read(path, {}, "skip", print):
            if len(re.findall("[ぁ-ん]", document.text)) > 200:
                pages.append(META.sub("", document.text).translate(SAME))
        if len(pages) == NUM_PAGES:
            break
    if not pages:
        raise UserError(f"{', '.join(folders)}: no Japanese .html files there: name folders that hold some")
    return pages


def planted(page: str, number: int) -> tuple[str, list[str]]:
    """The page with PLANTED in it, and what of that must come out, without white space."""
    before, *rest = re.split(r"(?=<p[ >])", page, maxsplit=PLACES)
    lines = []
    for place, part in enumerate(rest):
        before += "".join(html.format(f"{number}の{place}の{kind}番") for kind, html in enumerate(PLANTED)) + part
        lines += [text.format(f"{number}の{place}の{kind}番") for kind, text in enumerate(PLANTED.values())]
    return before, lines


def texts_of(pages: list[str], encoding: str, header: str | None, meta: str | None, bad: bytes = b"") -> tuple[dict[int, str], int]:
    """What comes out of each page, without white space, by its number; and how many were told as damaged. `bad` bytes go into each."""
    told: list[str] = []
    judge = Extract().start()
    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pages.warc.gz"
        with path.open("wb") as stream:
            writer = WARCWriter(stream, gzip=True)
            for number, page in enumerate(pages):
                head = f"<meta charset={meta}>" if meta else ""
                body = ENCODINGS[encoding](re.sub("(<head[^>]*>)", rf"\1{head}", page, count=1)).replace(b"<body", bad + b"<body", 1)
                kind = "text/html" + (f"; charset={header}" if header else "")
                headers = StatusAndHeaders("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body)))], protocol="HTTP/1.1")
                writer.write_record(
                    writer.create_warc_record(f"http://a.example/{number}", "response", payload=io.BytesIO(body), http_headers=headers)
                )
        for document in read(str(path), {}, "skip", told.append):
            number = int(document.metadata["url"].rpartition("/")[2])
            texts[number] = "" if judge(document) else "".join(document.text.split())
    return texts, len(told)


def main(folders: list[str]) -> None:
    pages, lines = zip(*(planted(page, number) for number, page in enumerate(sample(folders))), strict=True)
    whole, _ = texts_of(pages, "utf-8", "utf-8", "utf-8")
    print(f"\n{datetime.date.today()}, {len(pages):,} pages, resiliparse {version('resiliparse')}\n")
    print("| encoding | declared | pages | planted characters that survive | the page's own | pages told as damaged |")
    print("| --- | --- | --- | --- | --- | --- |")
    for encoding in ENCODINGS:
        wrong = [name for name in (*ENCODINGS, *OTHERS) if name != encoding]
        ways = {
            "rightly, by both": [(encoding, encoding)],
            "rightly, by the page": [(None, encoding)],
            "wrongly, by both": list(zip(wrong, wrong, strict=True)),
            "wrongly, by the header": [(name, encoding) for name in wrong],
            "not": [(None, None)],
            "rightly, and one bad byte": [(encoding, encoding)],
        }
        for way, declarations in ways.items():
            grown = lost = num_told = 0
            for header, meta in declarations:
                texts, told = texts_of(pages, encoding, header, meta, b"\xff" if "bad" in way else b"")
                grown += sum(len(line) for number, text in texts.items() for line in lines[number] if line in text)
                lost += sum((Counter(text) - Counter(texts.get(number, ""))).total() for number, text in whole.items())
                num_told += told
            sown = len(declarations) * sum(len(line) for page in lines for line in page)
            own = len(declarations) * sum(map(len, whole.values()))
            shares = f"{grown / sown:.4%} of {sown:,} | {1 - lost / own:.4%} of {own:,}"
            print(f"| {encoding} | {way} | {len(declarations) * len(pages):,} | {shares} | {num_told} |")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
