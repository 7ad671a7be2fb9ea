"""An OpenAI-compatible server over HTTP that does what a busy or broken one does: the last word of a conversation says what."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """`requests` and `authorizations` hold what was sent. Answers are the question's last word, once the planted fault is over."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.seen: Counter[str] = Counter()
        self.first: dict[str, float] = {}
        self.lock = threading.Lock()
        self.together = threading.Barrier(8)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has gone away


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        word = body["messages"][-1]["content"].split()[-1]
        with self.server.lock:
            self.server.requests.append(body)
            self.server.authorizations.append(self.headers["Authorization"])
            self.server.seen[word] += 1
            number = self.server.seen[word]
            waited = time.monotonic() - self.server.first.setdefault(word, time.monotonic())
        if self.path != "/v1/chat/completions" or body["model"] != "teacher":
            return self._send(404, b'{"error": {"message": "no such model"}}')
        if word == "locked":
            return self._send(401, b"who are you?")
        if word == "too-long":
            return self._send(400, b"the context holds 4096 tokens")
        if word == "tomorrow":
            return self._send(429, b"", {"Retry-After": "86400"})
        if word == "later" and waited < 1:
            return self._send(429, b"slowly", {"Retry-After": "1"})
        if (word == "broken" and number == 1) or word == "dead":
            return self._send(500, b"out of memory")
        if word == "cut" and number == 1:
            return self._send(200, self._answer(word)[:30], {"Content-Length": "300"})
        if word == "lost" and number == 1:
            return self.connection.close()
        if word == "html" and number < 3:
            return self._send(200, [b"<html>busy</html>", b'{"choices": []}'][number - 1])
        if word == "together":
            self.server.together.wait(timeout=60)
        if word == "slow":  # until others have been asked
            deadline = time.monotonic() + 20
            while len(self.server.requests) < 5 and time.monotonic() < deadline:
                time.sleep(0.01)
        self._send(200, self._answer(word))

    def _answer(self, word: str) -> bytes:
        reason = "length" if word == "long" else "stop"
        answer = {"choices": [{"message": {"role": "assistant", "content": f" {word}\n"}, "finish_reason": reason}]}
        usage = {} if word == "bare" else {"usage": {"prompt_tokens": 7, "completion_tokens": 2}}
        return json.dumps(answer | usage).encode()

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    with ChatServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
