"""Answers of an OpenAI-compatible server, or of several that have the same model.

Requests are on their way in a thread of their own, an event loop, while whoever asks does something else; each answer is one request.

    what comes back                                           what follows
    an answer                                                 it is given, with the seconds since this request was sent
    429, 503; nobody answers                                  the server rests (replica.py), and the request is sent again; the try does not
                                                              count, for it is no fault of the request
    408, other 5xx, a lost connection, half a body, what is   another try of this request, of 8, after growing waits and not before
      no chat completion, 600 s without a byte                  Retry-After, at another server where there is one
    another 4xx, an answer whose text is null                 a Failure
    401, 403, 404, a redirection; nobody has ever answered;   UserError: no request can be answered
      all servers have rested 8 times in a row, or ask to
      wait for more than 300 s
"""

import asyncio
import contextlib
import math
import os
import queue
import resource
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from mujina.answers.completions import Broken, answer_in, asked_wait, body_of, refusal, words_of
from mujina.answers.connection import Endpoint, Late, Lost
from mujina.answers.conversation import HALF_A_PAIR, Answer, Answerer, Failure, Request, Session
from mujina.answers.replica import Replica, backoff
from mujina.exits import STOPPED
from mujina.processes import told_to_stop
from mujina.user_input import UserError

NUM_TRIES = 8  # of a request, over about a minute
LONGEST_WAIT = 300.0  # seconds; a server that asks for more is not waited for
TIMEOUT = 600.0  # seconds without a byte from the server: an answer comes in one piece when it is whole
LONGEST_END = 120.0  # seconds that answers are waited for once the process is told to stop
_TICK = 0.25  # seconds from one look for time-outs and the word to stop to the next


class ServerAnswerer(Answerer):
    """Answers of `model` behind `url`/chat/completions, with at most `num_in_flight` requests under way, over all `urls` together.

    The key is the environment's OPENAI_API_KEY, if set. Every request carries a seed that depends on the conversation and the answer's
    number only; whether the same seed gives the same answer is the server's matter.
    Raises UserError when a URL is none, and when the process may not have as many files open as there are requests under way.
    """

    def __init__(self, urls: str | Sequence[str], model: str, num_in_flight: int = 256) -> None:
        self._endpoints = [f"{url.rstrip('/')}/chat/completions" for url in ([urls] if isinstance(urls, str) else urls)]
        self._model, self._num_in_flight = model, num_in_flight
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            if not (key.isascii() and key.isprintable()):
                raise UserError("OPENAI_API_KEY holds a line break, or a sign that is not ASCII: set it to the key alone")
            self._headers["Authorization"] = f"Bearer {key}"
        self.was_reached = False
        for url in self._endpoints:
            self._endpoint(url)
        _allow_files(num_in_flight)

    @property
    def model(self) -> str:
        return self._model

    @contextlib.contextmanager
    def open(self) -> Iterator["_Session"]:
        with told_to_stop() as stop:
            session = _Session(
                self, [_Server(self._endpoint(url), self._num_in_flight) for url in self._endpoints], self._num_in_flight, stop
            )
            try:
                yield session
            finally:
                session.close()
        if stop.is_set():
            raise SystemExit(STOPPED)

    def _endpoint(self, url: str) -> Endpoint:
        try:
            return Endpoint(url, self._headers)
        except ValueError as error:
            raise UserError(f"{url}: {error}: write the server's URL as http://host:port/v1") from None


class _Server:
    """A server, how it fares, and what it said when it last failed."""

    def __init__(self, endpoint: Endpoint, most: int) -> None:
        self.endpoint, self.replica, self.told = endpoint, Replica(most), ""


class _Session(Session):
    """The thread that asks has the event loop; `put` and `take` are called in another."""

    def __init__(self, answerer: ServerAnswerer, servers: list[_Server], most: int, stop: threading.Event) -> None:
        self._answerer, self._servers, self._most, self._stop = answerer, servers, most, stop
        self._num_open = 0
        self._new: deque[tuple[Any, bytes]] = deque()
        self._done: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._is_told = False  # that there are new ones
        self._turn = 0  # of the servers, the next to be looked at
        self._waiting: deque[asyncio.Future[_Server | None]] = deque()  # for a place
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        return self._num_open

    @property
    def most(self) -> int:
        return self._most

    @property
    def has_room(self) -> bool:
        return self._num_open < self._most and not self._stop.is_set()

    def put(self, name: Any, request: Request) -> None:
        self._num_open += 1
        try:
            self._new.append((name, body_of(request, self._answerer.model)))
        except TypeError:
            return self._done.put((name, Failure(HALF_A_PAIR)))
        if not self._is_told:
            self._is_told = True
            self._loop.call_soon_threadsafe(self._begin)

    def take(self) -> tuple[Any, Answer | Failure]:
        while self._num_open:
            name, found = self._done.get()
            self._num_open -= 1
            if isinstance(found, BaseException):
                raise found
            if found is not None:
                return name, found
        raise SystemExit(STOPPED)  # of those open none had been sent

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # What runs in the thread.

    def _run(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        watch = loop.create_task(self._watch())
        try:
            loop.run_forever()
        finally:
            for server in self._servers:
                server.endpoint.close()
            for task in (watch, *self._tasks):
                task.cancel()
            loop.run_until_complete(asyncio.gather(watch, *self._tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    async def _watch(self) -> None:
        end = math.inf
        while True:
            await asyncio.sleep(min(_TICK, TIMEOUT / 4))
            for server in self._servers:
                server.endpoint.end_silent(time.monotonic() - TIMEOUT, f"not a byte in {TIMEOUT:.0f} s")
                if time.monotonic() > end:
                    server.endpoint.end_silent(math.inf, f"told to stop, and no answer in {LONGEST_END:.0f} s")
            if self._stop.is_set():
                end = min(end, time.monotonic() + LONGEST_END)
                while self._waiting:
                    if not (waiting := self._waiting.popleft()).done():
                        waiting.set_result(None)

    def _begin(self) -> None:
        self._is_told = False
        while self._new:
            name, body = self._new.popleft()
            task = asyncio.Task(self._one(name, body), loop=self._loop, eager_start=True)
            if not task.done():
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _one(self, name: Any, body: bytes) -> None:
        try:
            found: Any = await self._ask(body)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a UserError, or a fault of ours: told to whoever takes
            found = error
        self._done.put((name, found))

    async def _ask(self, body: bytes) -> Answer | Failure | None:
        """None: the process was told to stop before there was an answer."""
        num_tries, server = 0, None
        while server := await self._place(server):
            found = await self._try(server, body)
            server.replica.in_flight -= 1
            self._give_places(server)
            if server.replica.rest_until > self._loop.time():
                self._look_at_those_who_rest()
                self._loop.call_at(server.replica.rest_until, self._give_places, server)
            if isinstance(found, Broken):
                num_tries += 1
                if num_tries == NUM_TRIES or found.wait > LONGEST_WAIT:
                    return Failure(_gave_up(server.endpoint.url, found))
                await self._sleep(max(found.wait, backoff(num_tries)))
            elif found:
                return found
        return None

    async def _place(self, last: _Server | None) -> _Server | None:
        """The server that is given a request now, another one than the last where one has room; None once the process is told to stop."""
        if self._stop.is_set():
            return None
        now, num_servers = self._loop.time(), len(self._servers)
        self._turn += 1
        in_turn = (self._servers[(self._turn + number) % num_servers] for number in range(num_servers))
        free = next((server for server in in_turn if server is not last and server.replica.has_room(now)), None)
        if not free and last and last.replica.has_room(now):
            free = last
        if free:
            free.replica.in_flight += 1
            return free
        waiting: asyncio.Future[_Server | None] = self._loop.create_future()
        self._waiting.append(waiting)
        return await waiting

    def _give_places(self, server: _Server) -> None:
        """To those who wait, in their order, as many as the server has."""
        now = self._loop.time()
        while self._waiting and server.replica.has_room(now):
            waiting = self._waiting.popleft()
            if not waiting.done():
                server.replica.in_flight += 1
                waiting.set_result(server)

    async def _sleep(self, seconds: float) -> None:
        end = self._loop.time() + seconds
        while (left := end - self._loop.time()) > 0 and not self._stop.is_set():
            await asyncio.sleep(min(left, _TICK))

    async def _try(self, server: _Server, body: bytes) -> Answer | Failure | Broken | None:
        """None: it is to be sent again, and the try does not count. Raises UserError where no request can be answered."""
        replica, url, sent = server.replica, server.endpoint.url, self._loop.time()
        try:
            response = await server.endpoint.post(body)
        except Late as late:
            replica.is_busy(self._loop.time(), sent, 0.0)
            return Broken(str(late))
        except Lost as lost:
            replica.broke(self._loop.time())
            return Broken(f"the connection failed: {lost}")
        except OSError as error:
            server.told = f"the connection failed: {error}"
            if isinstance(error, (ConnectionRefusedError, socket.gaierror)) and not self._answerer.was_reached:
                if all(server.told for server in self._servers):
                    raise UserError(f"{url}: nobody answers ({error}): start the server, or check host and port") from None
            replica.is_away(self._loop.time())
            return None
        self._answerer.was_reached = True
        if response.status == 200:
            found = answer_in(response.body, self._loop.time() - sent)
        else:
            server.told = words_of(response)
            wait = asked_wait(response.headers.get(b"retry-after", b"").decode("latin-1"))
            if response.status in (429, 503):
                replica.is_busy(self._loop.time(), sent, wait)
                return None
            if response.status == 408 or response.status >= 500:
                found = Broken(server.told, wait)
            else:
                found = refusal(response.status, server.told, url, self._answerer.model)
        if isinstance(found, Broken):
            server.told = found.told
            replica.broke(self._loop.time())
        else:
            replica.answered(self._loop.time())
        return found

    def _look_at_those_who_rest(self) -> None:
        """Raises UserError when no server will be given a request for long."""
        waits = [
            math.inf if server.replica.num_rests >= NUM_TRIES else server.replica.rest_until - self._loop.time() for server in self._servers
        ]
        if (wait := min(waits)) > LONGEST_WAIT:
            server = self._servers[waits.index(wait)]
            raise UserError(_gave_up(server.endpoint.url, Broken(server.told, 0.0 if wait == math.inf else wait)))


def _gave_up(url: str, broken: Broken) -> str:
    if broken.wait > LONGEST_WAIT:
        return f"{url}: {broken.told}, and asks to wait {broken.wait:.0f} s: start again after that"
    return f"{url}: no answer in {NUM_TRIES} tries ({broken.told}): look into the server's log, and start again"


def _allow_files(number: int) -> None:
    """Lets this process have as many files open, and some more; raises UserError where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + 256
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(f"num_in_flight ({number}) needs {needed} open files, and the limit is {hard}: lower it, or raise ulimit -n")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
