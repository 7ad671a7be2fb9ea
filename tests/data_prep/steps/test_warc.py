"""Whatever is wrong with a record costs that record; what is no page is counted by its reason, and what was cut off is no page."""

import gzip
import random
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import brotli
import pytest
import zstandard

from data_prep.executors import prepare
from data_prep.steps import http_body, warc
from data_prep.steps.read import read
from mujina.user_input import UserError
from tests.data_prep.steps.test_read import DEFAULTS, record
from tests.data_prep.test_pipeline import config, rows_of

PAGES = [b"<p>page %d" % number for number in range(5)]
GOOD = [record(number, page) for number, page in enumerate(PAGES)]
TEXTS = [page.decode() for page in PAGES]
zipped = partial(gzip.compress, mtime=0)  # the same at every time
PACK: dict[str, Callable[[list[bytes]], bytes]] = {
    "a.warc": b"".join,
    "a.warc.gz": lambda records: b"".join(map(zipped, records)),  # as it is meant
    "one.warc.gz": lambda records: zipped(b"".join(records)),
}


def skip(path: Path) -> tuple[list[str], list[str], Counter[str]]:
    """Texts, problems, and why something was passed over."""
    problems, passed = list[str](), Counter[str]()
    texts = [document.text for document in read(str(path), DEFAULTS, "skip", problems.append, lambda reason: passed.update([reason]))]
    return texts, problems, passed


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (record(2, b"<p>short", length=50), r"its Content-Length \(50\) is wrong"),
        (record(2, b"<p>long", length=150), r"its Content-Length \(150\) is wrong|the file ends within it"),
        (record(2, b"<p>very long", length=10**15), r"its Content-Length is wrong|the record is longer than"),
        (record(2, b"<p>none").replace(b"Content-Length", b"Content-Lengths"), "its head has no Content-Length"),
        (record(2, b"<p>words").replace(b"Content-Length: ", b"Content-Length: about "), "its head has no Content-Length"),
        (b"this is no record\r\n\r\n", "bytes are no record"),
        (GOOD[2][5:], "bytes are no record"),
        (b"WARC/1.0\r\nWARC-Type: response\r\n", "its head has no end|the file ends within it"),
        (record(2, b"x" * 2000), "the record is longer than"),
        (record(2, zipped(b"<p>" + b"x" * 2000)), "the record, unpacked, is longer than"),
        (record(2, b"\x1f\x8bx" * 9, header="text/html\r\nContent-Encoding: gzip"), "its body cannot be unpacked"),
        (record(2, zipped(bytes(PAGES[2]) * 20)[:-9], header="text/html\r\nContent-Encoding: gzip"), "unpacked .it breaks off"),
        (record(2, b"9\r\n<p>page 2\r\n5\r\nand", header="text/html\r\nTransfer-Encoding: chunked"), "is chunked and breaks off"),
        (record(2, b"9\r\n<p>page 2\r\n", header="text/html\r\nTransfer-Encoding: chunked"), "is chunked and breaks off"),
        (record(2, b"x", header="text/html\r\nContent-Encoding: br"), "its body cannot be unpacked"),
        (record(2, b"x", header="text/html\r\nContent-Encoding: zstd"), "its body cannot be unpacked"),
        (record(2, b"\0\1x", header="text/html\r\nContent-Encoding: sdch"), r"is packed in a way that is not known \(sdch\)"),
        (record(2, b"\xff", type="conversion"), "byte 0xff at 0 is not UTF-8"),
        (record(2, b"").replace(b"HTTP/1.1 200 X", b"hello everybody"), "holds no HTTP response"),
    ],
)
def test_a_bad_record_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: int, bad: bytes, problem: str
) -> None:
    for part in (warc, http_body):
        monkeypatch.setattr(part, "LONGEST", 1000)
    path = tmp_path / name
    path.write_bytes(PACK[name]([*GOOD[:place], bad, *GOOD[place + 1 :]]))
    texts, problems, passed = skip(path)
    assert texts == TEXTS[:place] + TEXTS[place + 1 :]
    assert len(problems) == sum(passed.values()) == 1
    with pytest.raises(UserError, match=f"{name} record {place + 1}: .*(?:{problem}).*: "):
        list(read(str(path), DEFAULTS, "stop", pytest.fail))


def test_a_damaged_member_costs_its_record(tmp_path: Path) -> None:
    for place in range(5):
        members = list(map(zipped, GOOD))
        middle = bytearray(members[place])
        middle[-6] ^= 1  # of the checksum
        for damaged in (bytes(middle), members[place][:40] + b"\xff" * 20 + members[place][60:], b"\xff" * 100, members[place][30:]):
            (tmp_path / "a.warc.gz").write_bytes(b"".join([*members[:place], damaged, *members[place + 1 :]]))
            texts, problems, _ = skip(tmp_path / "a.warc.gz")
            assert texts == TEXTS[:place] + TEXTS[place + 1 :] and len(problems) == 1, (place, damaged, problems)
            assert "gzip" in problems[0]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_random_damage_costs_two_records_at_most(tmp_path: Path, name: str) -> None:
    draw = random.Random(1)
    pages = [f"<p>{number} {draw.randbytes(300).hex()}" for number in range(12)]
    records = [record(number, page.encode()) for number, page in enumerate(pages)]
    packed = [PACK[name]([one]) for one in records]
    for _ in range(150):
        place, data = draw.randrange(12), bytearray(b"".join(packed))
        start = sum(map(len, packed[:place]))
        at = start + draw.randrange(len(packed[place]))
        size = min(draw.choice([1, 3, 40]), start + len(packed[place]) - at)
        data[at : at + size] = draw.choice([b"", draw.randbytes(size), draw.randbytes(30)])
        (tmp_path / name).write_bytes(data)
        texts, problems, passed = skip(tmp_path / name)
        lost = [number for number, page in enumerate(pages) if page not in texts]
        assert set(lost) <= {place, place + 1} and (passed or len(texts) == 12), (place, lost, problems)


@pytest.mark.parametrize("name", PACK)
def test_a_file_that_is_cut_off_loses_its_last_record(tmp_path: Path, name: str) -> None:
    whole = PACK[name](GOOD)
    for cut in (1, 6, 30, 60):
        (tmp_path / name).write_bytes(whole[:-cut])
        texts, problems, _ = skip(tmp_path / name)
        if name == "a.warc" and cut == 1:
            assert (texts, problems) == (TEXTS, []), "an empty line is not missed"
        else:
            assert texts == TEXTS[: len(texts)] and (len(texts) in (3, 4) or name == "one.warc.gz")
            assert "cut off" in problems[-1] or "ends within" in problems[-1]


def test_what_is_no_archive_and_zeros_behind_one(tmp_path: Path) -> None:
    (tmp_path / "a.warc").write_bytes(b"no archive at all")
    texts, (problem,), _ = skip(tmp_path / "a.warc")
    assert not texts and "a.warc record 1: 17 bytes are no record" in problem
    (tmp_path / "a.warc.gz").write_bytes(b"no archive at all")
    texts, (problem,), _ = skip(tmp_path / "a.warc.gz")
    assert "record 1: a gzip member is damaged, or is none" in problem and "the rest of the file is lost" in problem
    (tmp_path / "a.warc.gz").write_bytes(PACK["a.warc.gz"](GOOD) + bytes(20_000))
    assert skip(tmp_path / "a.warc.gz")[:2] == (TEXTS, [])


@pytest.mark.parametrize("name", PACK)
def test_lines_may_end_in_lf(tmp_path: Path, name: str) -> None:
    def lf(number: int) -> bytes:
        head, _, rest = record(number, PAGES[number], header="text/html; charset=utf-8").partition(b"\r\n\r\n")
        body = rest.removesuffix(b"\r\n\r\n").replace(b"\r\n", b"\n")
        head = head.replace(b"Content-Length: %d" % (len(rest) - 4), b"Content-Length: %d" % len(body)).replace(b"\r\n", b"\n")
        return head + b"\n\n" + body + b"\n\n"

    (tmp_path / name).write_bytes(PACK[name]([GOOD[0], lf(1), lf(2), GOOD[3], lf(4)]))
    assert skip(tmp_path / name)[:2] == (TEXTS, [])


def test_a_byte_order_mark_of_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.wet").write_bytes(record(0, "\ufeff本文".encode(), type="conversion"))
    assert skip(tmp_path / "a.wet")[0] == ["本文"]


def test_a_body_that_looks_like_records_is_a_body(tmp_path: Path) -> None:
    page = b"<pre>WARC/1.0\r\nWARC-Type: response\r\n\r\n\r\nWARC/1.0 is a format</pre>"
    (tmp_path / "a.warc").write_bytes(b"".join([GOOD[0], record(1, page), GOOD[2]]))
    assert skip(tmp_path / "a.warc")[:2] == ([TEXTS[0], page.decode(), TEXTS[2]], [])


def deflated(page: bytes, wbits: int) -> bytes:
    stream = zlib.compressobj(wbits=wbits)
    return stream.compress(page) + stream.flush()


CHUNKED = b"4\r\n<p>p\r\n5;name=value\r\nage 1\r\n0\r\n\r\n"
PAGE = PAGES[1]
ZIPPED = zipped(PAGE)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("TEXT/HTML", PAGE),
        ("Text/Html ;Charset=UTF-8", PAGE),
        ("text/html, text/html", PAGE),
        ("application/XHTML+xml", PAGE),
        ("text/html\r\nTransfer-Encoding: chunked", CHUNKED),
        ("text/html\r\ntransfer-encoding: Chunked", CHUNKED.replace(b"\r\n", b"\n")),
        ("text/html\r\nTransfer-Encoding: chunked", PAGE),  # unpacked by the crawler, which left the header
        ("text/html\r\nContent-Encoding: gzip", zipped(PAGE)),
        ("text/html", zipped(PAGE)),
        ("text/html\r\nContent-Encoding: GZIP\r\nTransfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(ZIPPED), ZIPPED)),
        ("text/html\r\nContent-Encoding: br", brotli.compress(PAGE)),
        ("text/html\r\nContent-Encoding: br", PAGE),
        ("text/html\r\nContent-Encoding: zstd", zstandard.compress(PAGE)),
        ("text/html\r\nContent-Encoding: deflate", deflated(PAGE, 15)),
        ("text/html\r\nContent-Encoding: deflate", deflated(PAGE, -15)),
        ("text/html\r\nContent-Encoding: br, gzip", zipped(brotli.compress(PAGE))),
        ("text/html\r\nContent-Encoding: identity", PAGE),
        ("text/html\r\nContent-Length: 9", PAGE),
        ("text/html\r\nContent-Encoding: gzip\r\nContent-Encoding: br", brotli.compress(zipped(PAGE))),
        ("text/html\r\nContent-Encoding: gzip", zipped(PAGE[:4]) + zipped(PAGE[4:]) + b"\0\0"),
        ("text/html\r\nContent-Encoding: gzip\r\nContent-Length: 900", PAGE),  # of what was sent, and the page is what came of it
        ("text/html\r\nTransfer-Encoding: chunked", b"\r\n0009 ;a=\"x;y\"\r\n<p>page 1\r\n000\r\nTrailer: x\r\n\r\n"),
        ("text/html\r\nTransfer-Encoding: gzip, chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(ZIPPED), ZIPPED)),
        ("text/html\r\nContent-Encoding: utf-8", PAGE),
        ("text/html;\r\n charset=utf-8", PAGE),
        ("html", PAGE),  # is no type
        ("", PAGE),
        ("application/octet-stream", PAGE),
    ],
)  # fmt: skip
def test_pages_are_found_however_they_are_sent(tmp_path: Path, header: str, body: bytes) -> None:
    (tmp_path / "a.warc").write_bytes(record(1, body, header=header))
    assert skip(tmp_path / "a.warc") == ([TEXTS[1]], [], Counter())


@pytest.mark.parametrize("start", ["<!DOCTYPE html>", "\n <HTML lang=ja>", "<!-- x -->", '<?xml version="1.0"?>\n<html >', "\ufeff<title>"])
def test_a_page_without_a_type_is_known_by_its_beginning(tmp_path: Path, start: str) -> None:
    page = f"{start}<p>本文".encode()
    typed = record(1, page, length=len(b"HTTP/1.1 200 X\r\n\r\n" + page))
    (tmp_path / "a.warc").write_bytes(typed.replace(b"Content-Type: text/html\r\n", b""))
    (text,), problems, passed = skip(tmp_path / "a.warc")
    assert text.endswith("<p>本文") and not problems and not passed


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (record(1, b"\x89PNG", header="IMAGE/png"), "image/png"),
        (record(1, b"\x1f\x8bx" * 9, header="image/png\r\nContent-Encoding: gzip"), "image/png"),
        (record(1, b"plain", header="text/plain"), "text/plain"),
        (record(1, b"nothing known", header=""), "no Content-Type, and no HTML"),
        (record(1, PAGE, status=404), "status 404"),
        (record(1, b"", status=204), "status 204"),
        (record(1, PAGE, status=206), "status 206"),
        (record(1, b"  \r\n"), "empty body"),
        (record(1, PAGE, header="text/html\r\nContent-Length: 50000"), "body shorter than the server said"),
        (record(1, PAGE, type="revisit"), "revisit records"),
        (record(1, PAGE).replace(b"WARC-Type", b"WARC-Truncated: Length\r\nWARC-Type"), r"truncated by the crawler (length)"),
        (record(1, PAGE).replace(b"WARC-Type", b"WARC-Identified-Payload-Type: image/gif\r\nWARC-Type"), "image/gif"),
    ],
)
@pytest.mark.parametrize("damaged", ["stop", "skip"])
def test_what_is_no_page_is_counted_and_stops_nothing(tmp_path: Path, one: bytes, reason: str, damaged) -> None:
    (tmp_path / "a.warc").write_bytes(GOOD[0] + one + one + GOOD[2])
    passed = Counter[str]()
    texts = [document.text for document in read(str(tmp_path / "a.warc"), DEFAULTS, damaged, pytest.fail, lambda why: passed.update([why]))]
    assert (texts, passed) == ([TEXTS[0], TEXTS[2]], Counter({reason: 2}))


def test_the_report_counts_what_was_passed_over(tmp_path: Path) -> None:
    bad = record(1, b"x", header="text/html\r\nContent-Encoding: br")
    for name in "ab":
        (tmp_path / f"{name}.warc").write_bytes(
            GOOD[0] + record(1, PAGE, status=404) + bad + record(2, b"GIF", header="image/gif") + GOOD[4]
        )
    prepare(config(str(tmp_path / "*.warc"), tmp_path / "out", source={"kind": "web", "damaged": "skip", "steps": [{"step": "extract"}]}))
    assert [row["text"] for row in rows_of(tmp_path / "out/code/documents")] == ["page 0", "page 4"] * 2
    report = (tmp_path / "out/code/report.html").read_text()
    for line in ("2 × status 404", "2 × image/gif", "2 × its body cannot be unpacked", "a.warc record 3: its body cannot be unpacked"):
        assert line in report


@pytest.mark.parametrize("first", [b"HTTP/2 200\r\n", b"ICY", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"])
def test_status_lines(tmp_path: Path, first: bytes) -> None:
    http = record(1, PAGE).partition(b"\r\n\r\n")[2].removesuffix(b"\r\n\r\n").replace(b"HTTP/1.1 200 X\r\n", first)
    (tmp_path / "a.warc").write_bytes(
        record(1, http, type="resource").replace(b"resource", b"response").replace(b"text/plain", b"application/http")
    )
    assert skip(tmp_path / "a.warc")[0] == ([TEXTS[1]] if first != b"ICY" else [])


def test_problems_are_counted_whatever_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.warc").write_bytes(b"no record\r\n" + GOOD[0] + b"nor is this\r\n" + GOOD[1])
    assert skip(tmp_path / "a.warc")[2] == Counter({"bytes are no record": 2})


def test_other_records_that_hold_pages(tmp_path: Path) -> None:
    resource = record(1, PAGE, type="resource").replace(b"text/plain", b"Text/HTML; charset=utf-8")
    others = [record(number, PAGE, status=status) for number, status in ((2, 203), (3, 201))]
    others[0] = others[0].replace(b"WARC-Type: response", b"warc-type: Response").replace(b"Content-Length", b"content-length")
    (tmp_path / "a.warc").write_bytes(b"".join([record(0, b"", type="warcinfo"), resource, record(9, b"x", type="request"), *others]))
    assert skip(tmp_path / "a.warc") == ([TEXTS[1]] * 3, [], Counter())
