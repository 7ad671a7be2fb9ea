"""HTTP/1.1 to one server: a request, its whole response, and the connection is kept for the next.

aiohttp costs 110 to 165 microseconds of CPU a request and httpx thousands, more than all else that a request costs us; httptools' parser
(llhttp, Node's) behind an asyncio protocol costs 25. What is done for it by hand stands in this file: where the server is, by way of
which proxy (`https_proxy` and `no_proxy`, as urllib reads them), and when the connection may be used again.
"""

import asyncio
import base64
import http.client
import ssl
import time
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httptools

MOST = 64 << 20  # bytes of a response; one that never ends would fill the memory
CONNECT_TIMEOUT = 30.0  # seconds


class Lost(OSError):
    """The connection ended, or could not be made sense of, before the response was whole.

    was_silent   not a byte of the response had come
    """

    def __init__(self, reason: str, was_silent: bool) -> None:
        super().__init__(reason)
        self.was_silent = was_silent


class Late(Lost):
    """The server was silent for too long."""


class Response(NamedTuple):
    """`headers` by their names in lower case; `reason` is the status in words."""

    status: int
    reason: str
    headers: dict[bytes, bytes]
    body: bytes


class Endpoint:
    """Where requests to `url` go, with `headers`. Raises ValueError where the URL names no host, or a port that is none."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise ValueError("names no host")
        self.url, self.host, self.port = url, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        proxy = urlsplit("" if proxy_bypass(self.host) else getproxies().get(parts.scheme, ""))
        self._proxy = (proxy.hostname, proxy.port or 80) if proxy.hostname else None
        user = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}".encode()
        self.authorization = b"Proxy-Authorization: Basic " + base64.b64encode(user) + b"\r\n" if proxy.username else b""
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = f"http://{parts.netloc}{target}" if self._proxy and not self.tls else target
        lines = [f"POST {target} HTTP/1.1", f"Host: {parts.netloc}", *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "\r\n".join(lines).encode("latin-1") + b"\r\n" + (b"" if self.tls else self.authorization) + b"Content-Length: "
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()

    async def post(self, body: bytes) -> Response:
        """Raises Lost where the request may have been read, Late being one of these, and other OSErrors where it was not sent."""
        request = b"%b%d\r\n\r\n%b" % (self._head, len(body), body)
        while True:
            while self._idle and not self._idle[-1].is_open:  # one that the server has closed since
                self._idle.pop()
            is_used = bool(self._idle)
            connection = self._idle.pop() if is_used else await self._connect()
            self._busy.add(connection)
            try:
                response = await connection.post(request)
            except Lost as lost:
                # A server may close a connection that it has kept, just when it is used again.
                if is_used and lost.was_silent and not isinstance(lost, Late):
                    continue
                raise
            finally:
                self._busy.discard(connection)
                if connection.is_open:
                    self._idle.append(connection)
            return response

    async def _connect(self) -> "Connection":
        loop = asyncio.get_running_loop()
        host, port = self._proxy or (self.host, self.port)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, connection = await loop.create_connection(Connection, host, port, ssl=None if self._proxy else self.tls)
                if self._proxy and self.tls:
                    await connection.tunnel(self)
                return connection
        except TimeoutError:
            raise TimeoutError(f"{host} does not answer in {CONNECT_TIMEOUT:.0f} s") from None

    def end_silent(self, since: float, reason: str) -> None:
        """Connections from which nothing was heard since that time end; their requests are Late."""
        for connection in [connection for connection in self._busy if connection.last_heard < since]:
            connection.close(Late(reason, was_silent=True))

    def close(self) -> None:
        for connection in [*self._idle, *self._busy]:
            connection.close(Lost("closed by us", was_silent=True))


class Connection(asyncio.Protocol):
    """A connection that carries one request at a time.

    is_open      whether it can carry another
    last_heard   when the last byte came from the server, or the request was sent (of time.monotonic)
    """

    def __init__(self) -> None:
        self.is_open, self.last_heard, self._is_silent = False, 0.0, True
        self._transport: asyncio.Transport
        self._response: asyncio.Future[Response] | None = None
        self._tunnel: asyncio.Future[bytes] | None = None

    async def post(self, request: bytes) -> Response:
        """Sends a request and returns its response; raises Lost."""
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._size, self._is_silent, self._has_headers = 0, True, False
        self._response = asyncio.get_running_loop().create_future()
        self.last_heard = time.monotonic()
        self._transport.write(request)
        return await self._response

    async def tunnel(self, endpoint: Endpoint) -> None:
        """Through a proxy to the endpoint, and TLS over that. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._tunnel, self._body = loop.create_future(), []
        place = f"{endpoint.host}:{endpoint.port}"
        self._transport.write(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n".encode() + endpoint.authorization + b"\r\n")
        said = await self._tunnel
        self._tunnel = None
        if said.split(b" ", 2)[1:2] != [b"200"]:
            self._fail("no tunnel")
            raise ConnectionError(f"the proxy says {said.partition(b'\r\n')[0].decode(errors='replace')!r}")
        assert endpoint.tls
        transport = await loop.start_tls(self._transport, self, endpoint.tls, server_hostname=endpoint.host)
        assert transport
        self._transport = transport

    def close(self, error: Lost) -> None:
        """With this error for whoever waits for a response."""
        self.is_open = False
        self._transport.abort()
        self._lose(error)

    def _fail(self, reason: str) -> None:
        self.close(Lost(reason, was_silent=False))

    def _lose(self, error: Lost) -> None:
        for waiting in (self._response, self._tunnel):
            if waiting and not waiting.done():
                waiting.set_exception(error)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        self.last_heard = time.monotonic()
        if self._tunnel:
            self._body.append(data)
            if b"\r\n\r\n" in (said := b"".join(self._body)) and not self._tunnel.done():
                self._tunnel.set_result(said)
            return
        if not self._response or self._response.done():
            return self._fail("the server goes on behind its response")
        self._is_silent = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._response and not self._response.done() and self._has_headers and self._ends_with_the_connection and not error:
            return self.on_message_complete()
        self._lose(Lost(str(error) if error else "the server closed it", was_silent=self._is_silent))

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._response and self._response.done():  # a second response to one request: the next would be taken for another's
            self._fail("the server goes on behind its response")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._has_headers = self._parser.get_status_code() >= 200
        self._ends_with_the_connection = not {b"content-length", b"transfer-encoding"} & self._headers.keys()

    def on_body(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > MOST:
            return self._fail(f"the response has more than {MOST >> 20} MiB")
        self._body.append(part)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue and its like: the response is still to come
            self._headers = {}
            return
        if not self._response or self._response.done():
            return
        if self.is_open and not self._parser.should_keep_alive():
            self.is_open = False
            self._transport.close()
        self._response.set_result(Response(status, http.client.responses.get(status, ""), self._headers, b"".join(self._body)))
