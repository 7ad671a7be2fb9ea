"""Records of WARC and WET archives as they are in the wild: behind what is broken it goes on with the next record.

A record is a head of lines, as many bytes as its Content-Length says, and two line ends; it is believed when these, another record, or
the end follow. In a packed archive each record is a gzip member, so that of a damaged one the next member tells where to go on; else the
next line that begins with WARC/1. does. Archives with LF for CRLF are read, too.

fastwarc reads the heads; `http_body` unpacks what they say is packed.
"""

import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from fastwarc.warc import HeaderMap

from data_prep.steps.http_body import MEMBER, is_unpacked, unpacked
from mujina.files import LONGEST, too_long

PIECE = 1 << 13  # bytes of a packed archive at a time: gzip makes up to 1,000 times as much of them
LONGEST_HEAD = 1 << 16
HTML_TYPES = ("text/html", "application/xhtml+xml")
# These say no more than none does. Then a page is what begins with a tag of "Identifying a resource with an unknown MIME type" of
# https://mimesniff.spec.whatwg.org.
UNKNOWN_TYPES = ("", "unknown/unknown", "application/unknown", "application/octet-stream", "*/*")
PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?"
    rb"<(?:!doctype html|html|head|script|iframe|h1|div|font|table|a|style|title|b|body|br|p|!--)[\s>-]",
    re.IGNORECASE,
)
CUT_OFF = "the file ends within it: copy or build the file again"
BEGIN = b"WARC/"
NEXT, LONGEST_NEXT = re.compile(rb"\nWARC/1\.\d[ \t]{0,8}\r?\n"), 20
END_OF_HEAD = re.compile(rb"\n\r?\n")
END_OF_RECORD = re.compile(rb"\r?\n\r?\n")
CONTENT_LENGTH = re.compile(rb"^content-length[ \t]*:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([^\s\"';,]+)", re.IGNORECASE)
# Not pages, but what is written about them.
BESIDE = ("warcinfo", "request", "metadata")


class Passed(NamedTuple):
    """What is no page of text and was passed over: nothing is wrong with it, but it is counted by this reason."""

    reason: str


@dataclass(frozen=True)
class Page:
    """The bytes of a page, or of a text (which is UTF-8), and what its archive says of it."""

    id: str | None
    url: str | None
    date: str | None
    data: bytes
    is_html: bool
    charset: str | None = None


class Break(NamedTuple):
    """Where the bytes of an archive are lost. `spoils`: so is what came last before, because its checksum did not follow."""

    problem: str
    spoils: bool


def read_warc(path: str) -> Iterator[tuple[int, Page | Passed | str]]:
    """Yields (number from 1, a page, why it is none, or what is wrong) for the records of an archive, but for those beside pages.

    Raises OSError when the file cannot be read.
    """
    for number, record in enumerate(_records(path), start=1):
        found = record if isinstance(record, str) else _page_of(record)
        if found is not None:
            yield number, found


def _records(path: str) -> Iterator[bytes | str]:
    """Yields each record whole, head and body, or what is wrong at that place."""
    window = _Window(_content(path))
    while True:
        window.skip_newlines()
        if not window.fill(1):
            if window.broken is None:
                return
            yield window.mend()
        elif not (window.fill(len(BEGIN)) and window.data.startswith(BEGIN)):
            yield f"{window.skip_to_next():,} bytes are no record: they are passed over up to the next one"
        elif (end := window.end_of_head()) is None or NEXT.search(window.data, 0, end):
            window.skip_to_next()
            if window.data:
                yield "its head has no end: it is passed over up to the next record"
            else:
                yield window.mend() if window.broken else CUT_OFF
        elif (length := CONTENT_LENGTH.search(window.data, 0, end)) is None:
            window.skip_to_next()
            yield "its head has no Content-Length: it is passed over up to the next record"
        else:
            yield window.take(end, int(length[1]))


class _Window:
    """The bytes of an archive from some place on, as far as they are needed, up to a break."""

    def __init__(self, content: Iterator[bytes | Break]) -> None:
        self._content = content
        self._is_at_end = False
        self.data = bytearray()
        self.broken: Break | None = None

    def fill(self, size: int) -> bool:
        """Whether there are so many bytes before the next break."""
        while len(self.data) < size and self.broken is None and not self._is_at_end:
            piece = next(self._content, None)
            if piece is None:
                self._is_at_end = True
            elif isinstance(piece, Break):
                self.broken = piece
            else:
                self.data += piece
        return len(self.data) >= size

    def mend(self) -> str:
        """Goes on behind a break; what was left before it is lost. Returns what is wrong there."""
        assert self.broken is not None
        problem, self.broken = self.broken.problem, None
        self.data.clear()
        return problem

    def skip_newlines(self) -> None:
        while self.fill(1) and self.data[0] in b"\r\n":
            del self.data[: len(self.data) - len(self.data.lstrip(b"\r\n"))]

    def end_of_head(self) -> int | None:
        searched = 0
        while searched < LONGEST_HEAD and self.fill(searched + 1):
            if found := END_OF_HEAD.search(self.data, max(searched - 2, 0)):
                return found.end()
            searched = len(self.data)
        return None

    def skip_to_next(self, start: int = 0) -> int:
        """Passes over what comes before the next line that begins a record, from `start` on, or before a break; how many bytes."""
        skipped = 0
        while not (found := NEXT.search(self.data, start)):
            searched = len(self.data)
            gone = max(searched - LONGEST_NEXT, 0) if self.fill(searched + 1) else searched
            del self.data[:gone]
            skipped, start = skipped + gone, max(start - gone, 0)
            if not self.data:
                return skipped
        del self.data[: found.start() + 1]
        return skipped + found.start() + 1

    def take(self, end_of_head: int, length: int) -> bytes | str:
        """The record whose head is at hand, or what is wrong with it; it is passed over."""
        end = after = end_of_head + length
        if length > LONGEST:
            return self._pass_over(end)
        is_whole = self.fill(end)
        while self.fill(after + 1) and self.data[after] in b"\r\n":
            after += 1
        self.fill(after + len(BEGIN))
        follows = self.data[after : after + len(BEGIN)]
        is_spoilt = not follows and self.broken is not None and self.broken.spoils
        if is_whole and not is_spoilt and (not follows or follows == BEGIN or END_OF_RECORD.match(self.data, end)):
            record = bytes(self.data[:end])
            del self.data[:after]
            return record
        if follows or NEXT.search(self.data, end_of_head - 1):
            self.skip_to_next(end_of_head - 1)
            return f"its Content-Length ({length:,}) is wrong, for no record begins behind it: it is passed over up to the next one"
        if self.broken:
            return self.mend()
        self.data.clear()
        return CUT_OFF

    def _pass_over(self, end: int) -> str:
        """A record that is too long to be held. A line in it that begins another one says that its length is wrong."""
        left = end
        while left > 0 and self.fill(1):
            self.fill(min(left, 1 << 20))
            if found := NEXT.search(self.data, 0, left):
                del self.data[: found.start() + 1]
                return "its Content-Length is wrong, for another record begins before its end: it is passed over up to that one"
            gone = min(left, max(len(self.data) - LONGEST_NEXT, 1))
            del self.data[:gone]
            left -= gone
        return too_long("record", LONGEST)


def _content(path: str) -> Iterator[bytes | Break]:
    """The unpacked bytes of an archive, and the breaks in them: behind one it goes on with the next gzip member."""
    with open(path, "rb") as file:
        if not path.lower().endswith(".gz"):
            yield from iter(lambda: file.read(1 << 16), b"")
            return
        member, start, has_given, rest = None, 0, False, b""
        while piece := rest or file.read(PIECE):
            rest = b""
            if member is None:
                piece = piece.lstrip(b"\0")  # some tools fill the file up with them
                if not piece:
                    continue
                member, start, has_given = zlib.decompressobj(wbits=31), file.tell() - len(piece), False
            try:
                data = member.decompress(piece)
            except zlib.error as error:
                goes_on = _seek_member(file, start + 1)
                what = "it is passed over up to the next one" if goes_on else "the rest of the file is lost: copy or build the file again"
                yield Break(f"a gzip member is damaged, or is none ({error}): {what}", has_given)
                member = None
                continue
            if data:
                has_given = True
                yield data
            if member.eof:
                rest, member = member.unused_data, None
        if member is not None:
            yield Break("the file is cut off: copy or build the file again", has_given)


def _seek_member(file: BinaryIO, start: int) -> bool:
    """Puts the file where the next gzip member begins, from `start` on, or at its end; whether there is one."""
    file.seek(start)
    held = b""
    while piece := file.read(1 << 20):
        held, base = held + piece, start
        at = held.find(MEMBER)
        while at >= 0:
            try:
                zlib.decompressobj(wbits=31).decompress(held[at : at + 512], 1 << 16)
            except zlib.error:
                at = held.find(MEMBER, at + 1)
            else:
                file.seek(base + at)
                return True
        start, held = base + len(held) - min(len(held), 512), held[-512:]
    return False


def _page_of(data: bytes) -> Page | Passed | str | None:
    """The page or text of a record, why it is none, or what is wrong with it; None for what stands beside pages."""
    try:
        _, headers, body = _head_and_body(data)
        kind = headers.get("warc-type", "").lower()
        if kind in BESIDE:
            return None
        if kind not in ("response", "resource", "conversion"):
            return Passed(f"{kind or 'untyped'} records")
        if cut := headers.get("warc-truncated"):
            return Passed(f"truncated by the crawler ({cut.lower()})")
        url = headers.get("warc-target-uri")
        about = (headers.get("warc-record-id") or url, url, headers.get("warc-date"))
        if kind == "conversion":
            return Page(*about, body, is_html=False)
        http = headers  # what is no response of a server has its type there
        is_response = kind == "response" and headers.get("content-type", "application/http").lower().startswith("application/http")
        if is_response:
            status, http, body = _head_and_body(body)
            while status is not None and status < 200 and body.startswith(b"HTTP/"):  # "go on", before the answer
                status, http, body = _head_and_body(body)
            if status is None:
                return "holds no HTTP response: fetch the page again"
            if not 200 <= status < 300 or status in (204, 205, 206):
                return Passed(f"status {status}")
    except OSError as error:
        return f"its head cannot be read ({error}): fetch the page again"
    content_type, charset = _type_of(http.get("content-type", ""))
    identified, _ = _type_of(headers.get("warc-identified-payload-type", ""))
    content_type = content_type if identified in UNKNOWN_TYPES else identified
    if content_type not in (*HTML_TYPES, *UNKNOWN_TYPES):
        return Passed(content_type)
    if is_response:
        told, packed = http.get("content-length", ""), http.get("content-encoding", "")
        is_as_sent = "transfer-encoding" not in http and not (packed and is_unpacked(body))
        if told.isdecimal() and len(body) < int(told) and is_as_sent:
            return Passed("body shorter than the server said")
        content = unpacked(body, http.get("transfer-encoding", ""), packed)
        if isinstance(content, str):
            return content
        body = content
    if not body.strip():
        return Passed("empty body")
    if content_type in UNKNOWN_TYPES and not PAGE.match(body):
        return Passed(content_type or "no Content-Type, and no HTML")
    return Page(*about, body, is_html=True, charset=charset)


def _head_and_body(data: bytes) -> tuple[int | None, dict[str, str], bytes]:
    """The status of a first line, the headers by their names in lower case, and what follows. Of two the first counts, and both of how
    a body is packed, one after the other."""
    found = END_OF_HEAD.search(data)
    end = found.end() if found else len(data)
    headers = HeaderMap()
    headers.parse(io.BytesIO(data[:end].replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")))
    named = {name.lower(): value.strip() for name, value in reversed(headers.items())}
    packed = [value for name, value in headers.items() if name.lower() == "content-encoding"]
    return headers.status_code, named | ({"content-encoding": ", ".join(packed)} if packed else {}), data[end:]


def _type_of(value: str) -> tuple[str, str | None]:
    """The media type of a Content-Type in lower case, "" without one, and its charset."""
    kind, _, parameters = value.partition(";")
    found = CHARSET.search(parameters)
    kind = kind.split(",")[0].strip().lower()
    return kind if "/" in kind else "", found[1] if found else None  # without a slash it is no type
