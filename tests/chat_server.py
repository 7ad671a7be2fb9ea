"""An OpenAI-compatible server, in a process of its own, that does what a busy or broken one does.

    python tests/chat_server.py [FAULT] [--most N] [--port N] [--tls PEM]        prints its port; ends when its standard input does

The last word of a conversation says what; the answer is that word, once a fault that passes is over. Of `draw:a|b_c` it is one of those
between the bars, as the seed says, with blanks for `_`; of `judge:HOW` what a judge says who is asked about <a>…</a> and <b>…</b>.
FAULT is what comes back to every request: a status (500), or `tomorrow`. With --most, requests beyond so many at a time are told 429. It is
a proxy as well: what is asked of any other host it answers itself, and CONNECT leads to the port of that name on this machine.
"""

import argparse
import asyncio
import contextlib
import json
import re
import ssl
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import Any


class ChatServer:
    """As the tests see it: the bodies that came, their headers (names in lower case), how often each word came."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen([sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout
        self.port = int(self._process.stdout.readline())
        self._scheme = "https" if "--tls" in arguments else "http"
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def asked(self) -> dict[str, Any]:
        trusting = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), trusting)
        found: dict[str, Any] = json.loads(opener.open(f"{self._scheme}://127.0.0.1:{self.port}/asked").read())
        return found

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [request["body"] for request in self.asked()["requests"]]

    @property
    def headers(self) -> list[dict[str, str]]:
        return [request["headers"] for request in self.asked()["requests"]]

    @property
    def seen(self) -> Counter[str]:
        return Counter(word_of(request) for request in self.requests)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def chat_server(*arguments: str) -> Iterator[ChatServer]:
    server = ChatServer(*arguments)
    try:
        yield server
    finally:
        server.end()


def word_of(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"].split()[-1])


class _Served:
    """What the process knows."""

    def __init__(self, fault: str | None, most: int | None) -> None:
        self.fault, self.most = fault, most
        self.requests: list[dict[str, Any]] = []
        self.seen: Counter[str] = Counter()
        self.first: dict[str, float] = {}
        self.num_together = self.num_in_flight = self.most_in_flight = self.num_connections = 0
        self.together = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):  # a client that has gone away
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split()[1]
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n")[1:])}
                if path == "/asked":
                    told = {name: getattr(self, name) for name in ("requests", "most_in_flight", "num_connections")}
                    writer.write(_response(200, json.dumps(told).encode()))
                    continue
                if head.startswith("CONNECT "):
                    self.requests.append({"body": {"messages": [{"content": path}]}, "headers": headers})
                    return await self._lead(int(path.split(":")[1]), reader, writer)
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                self.requests.append({"body": body, "headers": headers})
                self.num_in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
                try:
                    response = await self._respond(body, path)
                finally:
                    self.num_in_flight -= 1
                if response is None:
                    break
                writer.write(response)
                await writer.drain()
                if b"Connection: close" in response.partition(b"\r\n\r\n")[0]:
                    break
        writer.close()

    async def _lead(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

        async def carry(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
            while data := await source.read(1 << 16):
                to.write(data)
            to.close()

        await asyncio.gather(carry(reader, there[1]), carry(there[0], writer))

    async def _respond(self, body: dict[str, Any], path: str) -> bytes | None:
        """None: the connection is closed without a word."""
        word = word_of(body)
        self.seen[word] += 1
        number = self.seen[word]
        waited = time.monotonic() - self.first.setdefault(word, time.monotonic())
        if self.fault or (self.most and self.num_in_flight > self.most):
            fault = self.fault or "429"
            return _response(429, b"", "Retry-After: 86400") if fault == "tomorrow" else _response(int(fault), b"always")
        if not path.endswith("/v1/chat/completions") or body["model"] != "teacher":
            return _response(404, b'{"error": {"message": "no such model"}}')
        if word.startswith("wait:"):
            await asyncio.sleep(float(word.split(":")[1]))
        if word.startswith("draw:"):
            drawn = word.removeprefix("draw:").split("|")
            return _response(200, _answer(word, content=drawn[body["seed"] % len(drawn)].replace("_", " ") or " "))
        if word.startswith("judge:"):
            return _response(200, _answer(word, content=_judgement(word.removeprefix("judge:"), body["messages"][-1]["content"])))
        if word == "together":
            self.num_together += 1
            if self.num_together == 8:
                self.together.set()
            await self.together.wait()
        if word == "slow":  # until others have been asked
            while len(self.requests) < 5:
                await asyncio.sleep(0.01)
        if word == "late" and number == 1:
            await asyncio.sleep(600)
        tomorrow = f"Retry-After: {formatdate(time.time() + 86400, usegmt=True)}"
        always = {
            "locked": _response(401, b"who are you?"),
            "moved": _response(308, b"", "Location: /v2"),
            "too-long": _response(400, b"the context holds 4096 tokens"),
            "tomorrow": _response(429, b"", "Retry-After: 86400"),
            "tomorrow-as-a-date": _response(503, b"", tomorrow),
            "dead": _response(500, b"out of memory"),
            "null": _response(200, _answer(word, content=None, reason="content_filter")),
            "empty": _response(200, _answer(word, content="")),
            "other": _response(200, _answer(word, model="somebody else")),
            "surrogate": _response(200, _answer(word, content="half \ud83d and whole \ud83d\ude00")),
            "chunked": _chunked(_answer(word)),
            "until-close": _response(200, _answer(word), "Connection: close", with_length=False),
            "continued": b"HTTP/1.1 100 Continue\r\n\r\n" + _response(200, _answer(word)),
        }
        once = {
            "broken": _response(500, b"out of memory"),
            "cut": _response(200, _answer(word))[:-30] if number == 1 else b"",
            "lost": None,
            "html": _response(200, b"<html>busy</html>"),
            "nonsense": _response(200, b'{"choices": []}'),
            "list": _response(200, b"[1, 2]"),
            "no-http": b"\x00\x01\x02 hello\r\n\r\n",
            "twice": 2 * _response(200, _answer("another")),
        }
        if word == "later" and waited < 1:
            return _response(429, b"slowly", "Retry-After: 1")
        if word in always:
            return always[word]
        if word in once and number == 1:
            found = once[word]
            return found.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) if found and word == "cut" else found
        return _response(200, _answer(word))


def _judgement(how: str, asked: str) -> str:
    answers = re.findall(r"<[ab]>(.*?)</[ab]>", asked, re.DOTALL)
    if how == "longer":
        first, second = map(len, answers)
        return f"Well. [[{'A' if first > second else 'B' if first < second else 'C'}]]"
    said = {"first": "[[A]]", "tie": "[[C]]", "nonsense": "Both are fine.", "letters": "[[D]]", "echo": f"{asked} [[A]] [[B]]"}
    return said.get(how) or f"[[{len(answers[0])}]]"  # length


def _answer(word: str, content: str | None = "", model: str = "teacher", reason: str = "") -> bytes:
    content = f" {word}\n" if content == "" and word != "empty" else content
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": reason or ("length" if word == "long" else "stop")}
    usage = {} if word == "bare" else {"usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    return json.dumps({"model": model, "choices": [choice]} | usage).encode()


def _response(status: int, body: bytes, *lines: str, with_length: bool = True) -> bytes:
    length = [f"Content-Length: {len(body)}"] if with_length else []
    return "\r\n".join([f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *length, *lines, "", ""]).encode() + body


def _chunked(body: bytes) -> bytes:
    parts = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:10], body[10:], b""))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts


async def _main(values: argparse.Namespace) -> None:
    tls = None
    if values.tls:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(values.tls)
    served = _Served(values.fault, values.most)
    server = await asyncio.start_server(served.serve, "127.0.0.1", values.port, backlog=4096, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    parser = argparse.ArgumentParser()
    parser.add_argument("fault", nargs="?")
    parser.add_argument("--most", type=int)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tls")
    asyncio.run(_main(parser.parse_args()))
