"""What is asked and what is answered: the words that whoever asks and whoever answers have in common."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, TypeVar

import pydantic

from mujina.user_input import Section, UserError

T = TypeVar("T")
HALF_A_PAIR = "the prompt holds half of a surrogate pair, which is no character: mend or drop it"
_AHEAD = 4  # answers to how many times as many requests as are open may wait for an earlier one


class Message(Section):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def _end_with_the_user(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if messages[-1].role != "user":
        raise ValueError("the last message must be the user's: leave out the answer, or the model is shown it")
    return messages


# What a row of a file asks.
PromptMessages = Annotated[tuple[Message, ...], pydantic.Field(min_length=1), pydantic.AfterValidator(_end_with_the_user)]


@dataclass(frozen=True)
class Conversation:
    """What was said so far; the answer is the assistant's next turn."""

    messages: tuple[Message, ...]


def question(text: str) -> Conversation:
    """A conversation in which the user has said `text`, and nothing else."""
    return Conversation((Message(role="user", content=text),))


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; `temperature` 0 is greedy decoding. Raises UserError when a value is out of its range.

    `top_p` keeps the likeliest tokens that have this much probability together (Holtzman et al. 2019, arXiv 1904.09751, section 3.1).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_answers: int = 1  # to each conversation
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1: raise it")
        if self.temperature < 0:
            raise UserError(f"temperature ({self.temperature}) must not be negative: 0 is greedy decoding, 1 the model's own distribution")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p ({self.top_p}) must be above 0 and at most 1: 1 keeps every token")
        if self.num_answers < 1:
            raise UserError(f"num_answers ({self.num_answers}) must be at least 1: raise it")
        if self.num_answers > 1 and not self.temperature:
            raise UserError(f"num_answers ({self.num_answers}) with temperature 0 would be the same answer again: raise temperature")


@dataclass(frozen=True, slots=True)
class Request:
    """One answer that is wanted: the `number`-th (from 0) to a conversation."""

    conversation: Conversation
    sampling: Sampling
    number: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """The assistant's turn, without white space around it.

    finish_reason       "stop": the model ended the turn by itself; "length": it ran into max_new_tokens; "context": into the end of the
                        model's context; a server may give others
    num_answer_tokens   includes the token that ended the turn; both numbers are None where a server does not tell them
    model               as a server names it, which may be another than it was asked for
    seconds             from the request that was answered to its answer
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int | None = None
    num_answer_tokens: int | None = None
    model: str | None = field(default=None, compare=False)
    seconds: float | None = field(default=None, compare=False)

    @property
    def stopped(self) -> bool:
        return self.finish_reason == "stop"


@dataclass(frozen=True, slots=True)
class Failure:
    """That a request has no answer, and why, in one line."""

    reason: str


class Session(Protocol):
    """Requests given and answers taken, in whichever order they come: what is answered may lead to what is asked next.

        with answerer.open() as session:
            while True:
                while session.has_room and …: session.put(name, request)
                if not session.num_open: break
                name, found = session.take()

    num_open   requests put whose answers have not been taken
    most       of them at once, which bounds the memory
    has_room   whether another may be put; none once the process is told to stop (SIGINT, SIGTERM)
    """

    @property
    def num_open(self) -> int: ...
    @property
    def has_room(self) -> bool: ...
    @property
    def most(self) -> int: ...

    def put(self, name: Any, request: Request) -> None:
        """Asks for an answer, which will be known by `name`."""
        ...

    def take(self) -> tuple[Any, Answer | Failure]:
        """Waits for an answer, with the name of its request. Raises UserError where no request can be answered, whichever it is."""
        ...


class Answerer(Protocol):
    """Whoever answers: by hand in a session, or in one of these two ways."""

    @property
    def model(self) -> str:
        """What answers, for journals: what has this name gives the same answers, or draws them alike."""
        ...

    def open(self) -> AbstractContextManager[Session]:
        """A session. Told to stop, it ends with SystemExit(STOPPED) once what is under way has been taken."""
        ...

    def ask(self, requests: Iterable[tuple[T, Request]]) -> Iterator[tuple[T, Answer | Failure]]:
        """Yields what was found to each request with the name that came with it, as it comes; `requests` is read on as there is room."""
        with self.open() as session:
            wanted = iter(requests)
            while True:
                while session.has_room and (one := next(wanted, None)):
                    session.put(*one)
                if not session.num_open:
                    break
                yield session.take()

    def answer(self, conversations: Iterable[Conversation], sampling: Sampling) -> Iterator[list[Answer]]:
        """Yields `sampling.num_answers` answers to each conversation, in their order; raises UserError at one that has no answer."""
        wanted = (Request(conversation, sampling, number) for conversation in conversations for number in range(sampling.num_answers))
        found: dict[int, Answer | Failure] = {}  # ahead of their turn
        num_asked = num_told = 0
        answers: list[Answer] = []
        with self.open() as session:
            while True:
                # Some more than are open, so that one slow answer does not leave the others idle.
                while session.has_room and num_asked - num_told < _AHEAD * session.most and (request := next(wanted, None)):
                    session.put(num_asked, request)
                    num_asked += 1
                if not session.num_open:
                    break
                number, one = session.take()
                found[number] = one
                while num_told in found:
                    answer = found.pop(num_told)
                    if isinstance(answer, Failure):
                        raise UserError(answer.reason)
                    num_told += 1
                    answers.append(answer)
                    if len(answers) == sampling.num_answers:
                        yield answers
                        answers = []


def seed_of(request: Request) -> int:
    """The seed of an answer, below 2^31: of the sampling's seed, the conversation and the answer's number, and of nothing else."""
    messages = [[message.role, message.content] for message in request.conversation.messages]
    told = [request.sampling.seed, request.number, messages]
    return int.from_bytes(hashlib.sha256(json.dumps(told).encode()).digest()[:4]) >> 1
