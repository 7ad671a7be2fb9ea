"""The body of an HTTP response without the packing that its headers name: chunks, gzip, deflate, brotli, zstd.

fastwarc reads brotli and zstd, zlib the rest. What breaks off is told, and so is a packing that is not known.
"""

import io
import re
import zlib
from collections.abc import Callable

from fastwarc.stream_io import BrotliReader, WarcReader, ZstdReader

from mujina.files import LONGEST, too_long

CHUNK = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\n]*)?\r?\n")
AFTER_CHUNK = re.compile(rb"\r?\n")
MEMBER = b"\x1f\x8b\x08"  # how one of gzip begins
BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # bytes that no text has
PLAIN = ("", "identity", "none")
PIECE = 1 << 13  # bytes at a time: gzip makes up to 1,000 times as much of them


def unpacked(data: bytes, transfer: str, content: str) -> bytes | str:
    """A body without the packing that its headers name (Transfer-Encoding, Content-Encoding; "" without one), or what is wrong."""
    try:
        if "chunked" in transfer.lower() and CHUNK.match(chunks := data.lstrip(b"\r\n")):
            data = _unchunked(chunks)
        names = [name.strip().lower() for name in content.split(",")]
        for name in reversed(names):
            if is_unpacked(data):
                break
            if name in UNPACK:
                data = UNPACK[name](data)
            elif name not in PLAIN and not data.startswith(MEMBER) and BINARY.search(data):
                return f"its body is packed in a way that is not known ({name}): fetch the page again"
        data = _gunzip(data)  # whatever the header says
    except (OSError, zlib.error) as error:
        return f"its body cannot be unpacked ({error}): fetch the page again"
    return data if len(data) <= LONGEST else too_long("record, unpacked,", LONGEST)


def is_unpacked(data: bytes) -> bool:
    """Some crawlers store a page unpacked and leave its header as it was, so that what begins like a page is one."""
    return data.lstrip().startswith(b"<")


def _unchunked(data: bytes) -> bytes:
    parts, at = list[bytes](), 0
    while found := CHUNK.match(data, at):
        start, size = found.end(), int(found[1], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(data[start : start + size])
        after = AFTER_CHUNK.match(data, start + size)
        if after is None:
            break
        at = after.end()
    raise OSError("it is chunked and breaks off")


def _inflate(data: bytes, wbits: int) -> bytes:
    content, at, stream = bytearray(), 0, None
    while at < len(data) and (stream or not at or data.startswith(MEMBER, at)):  # members of gzip may follow one another
        stream = stream or zlib.decompressobj(wbits)
        piece = data[at : at + PIECE]
        content += stream.decompress(piece)
        if len(content) > LONGEST:
            return bytes(content)
        at += len(piece) - len(stream.unused_data)
        stream = None if stream.eof else stream
    if stream or not data:
        raise OSError("it breaks off")
    return bytes(content)


def _gunzip(data: bytes) -> bytes:
    return _inflate(data, 31) if data.startswith(MEMBER[:2]) else data


def _deflate(data: bytes) -> bytes:
    """HTTP means zlib's format by that name; some servers send it bare."""
    try:
        return _inflate(data, 15)
    except zlib.error:
        return _inflate(data, -15)


def _read_all(reader: WarcReader) -> bytes:
    """What it has, as far as it is not too long."""
    data = bytearray()
    while len(data) <= LONGEST and (piece := reader.read(1 << 16)):
        data += piece
    return bytes(data)


UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": _gunzip,
    "x-gzip": _gunzip,
    "deflate": _deflate,
    "br": lambda data: _read_all(BrotliReader(io.BytesIO(data))),
    "zstd": lambda data: _read_all(ZstdReader(io.BytesIO(data))),
}
