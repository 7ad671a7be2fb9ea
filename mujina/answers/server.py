"""Answers of an OpenAI-compatible server."""

import http.client
import json
import os
import random
import socket
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice

from mujina.answers.conversation import Answer, Conversation, Sampling, seed_of
from mujina.user_input import UserError

_NUM_TRIES = 8  # of a request, over about a minute
_FIRST_WAIT = 0.5  # seconds before the second try; each further wait is twice as long
_LONGEST_WAIT = 300.0  # seconds; a server that asks for more is not waited for
_TIMEOUT = 600.0  # seconds without a byte from the server: an answer comes in one piece when it is whole


class _Failure(Exception):
    """A request that may succeed when it is made again, after `wait` seconds or more."""

    def __init__(self, told: str, wait: float = 0.0) -> None:
        super().__init__(told)
        self.wait = wait


class ServerAnswerer:
    """Answers of `model` behind `url`/chat/completions, at most `num_in_flight` requests at a time, one for each answer.

    A busy or broken server (429, 5xx, a lost connection, a body that is cut off or not an answer) is asked again with growing waits, and
    not before its Retry-After. The key is the environment's OPENAI_API_KEY, if set. Every request carries a seed that depends on the
    conversation and the answer's number only; whether the same seed gives the same answer is the server's matter.
    `answer` raises UserError when nobody listens at `url`, when the server does not take a request, or when all tries failed.
    """

    def __init__(self, url: str, model: str, num_in_flight: int = 32) -> None:
        self._endpoint = f"{url.rstrip('/')}/chat/completions"
        self._model, self._num_in_flight = model, num_in_flight
        self._key = os.environ.get("OPENAI_API_KEY")
        self._was_reached = False

    def answer(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[list[Answer]]:
        """Yields the answers to each conversation; the requests for those that follow are under way meanwhile."""
        pool, ended = ThreadPoolExecutor(self._num_in_flight), threading.Event()

        def ask(conversation: Conversation, number: int) -> Future[Answer]:
            return pool.submit(self._ask, self._body(conversation, number, sampling), ended)

        wanted = ((conversation, number) for conversation in conversations for number in range(sampling.num_answers))
        try:
            # Some more than are in flight, so that one slow answer does not leave the server idle.
            pending = deque(ask(*one) for one in islice(wanted, 4 * self._num_in_flight))
            answers: list[Answer] = []
            while pending:
                answers.append(pending.popleft().result())
                pending.extend(ask(*one) for one in islice(wanted, 1))
                if len(answers) == sampling.num_answers:
                    yield answers
                    answers = []
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _body(self, conversation: Conversation, number: int, sampling: Sampling) -> bytes:
        """The request for one answer; `n` is not used, since llama.cpp and transformers pass over it."""
        values = {
            "model": self._model,
            "messages": [message.model_dump() for message in conversation.messages],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed_of(conversation, number, sampling),
            "stream": False,
        }
        return json.dumps(values).encode()

    def _ask(self, body: bytes, ended: threading.Event) -> Answer:
        told, wait = "", 0.0
        for number in range(_NUM_TRIES):
            if ended.wait(wait):
                break
            try:
                return self._post(body)
            except _Failure as failure:
                told = str(failure)
                if failure.wait > _LONGEST_WAIT:
                    raise UserError(f"{self._endpoint}: {told}, and asks to wait {failure.wait:.0f} s: start again after that") from None
                wait = max(failure.wait, _FIRST_WAIT * 2**number * random.uniform(0.5, 1.0))
        raise UserError(f"{self._endpoint}: no answer in {_NUM_TRIES} tries ({told}): look into the server's log, and start again")

    def _post(self, body: bytes) -> Answer:
        request = urllib.request.Request(self._endpoint, body, {"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                self._was_reached = True
                return _parse(response.read())
        except urllib.error.HTTPError as error:
            self._was_reached = True
            raise self._explain(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, (ConnectionRefusedError, socket.gaierror)) and not self._was_reached:
                raise UserError(f"{self._endpoint}: nobody answers ({reason}): start the server, or check host and port") from None
            raise _Failure(f"the connection failed: {reason!r}") from None

    def _explain(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = error.read(500).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException):
            said = "its words were cut off"
        told = f"the server says {error.code} ({said or error.reason})"
        if error.code in (408, 429) or error.code >= 500:
            return _Failure(told, _asked_wait(error.headers.get("Retry-After", "")))
        remedies = {
            401: "set OPENAI_API_KEY to a key of this server",
            403: "set OPENAI_API_KEY to a key that may use this model",
            404: f"check that the URL ends as the server wants it, mostly in /v1, and that {self._model} is the name of a model there",
        }
        return UserError(f"{self._endpoint}: {told}: {remedies.get(error.code, 'mend what it names, and start again')}")


def _parse(body: bytes) -> Answer:
    """The answer in a response; raises _Failure when there is none: servers under load have been seen to send halves and HTML."""
    try:
        values = json.loads(body)
        [choice] = values["choices"]
        text, reason, usage = choice["message"]["content"] or "", choice["finish_reason"] or "", values.get("usage") or {}
        return Answer(text.strip(), reason, usage.get("prompt_tokens"), usage.get("completion_tokens"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Failure(f"not a chat completion: {body[:200].decode(errors='replace')}") from None


def _asked_wait(retry_after: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date (RFC 9110, section 10.2.3); 0 where it does not."""
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
