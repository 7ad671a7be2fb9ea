"""What is asked and what is answered: the words that whoever asks and whoever answers have in common."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mujina.user_input import Section, UserError


class Message(Section):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


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


@dataclass(frozen=True)
class Answer:
    """The assistant's turn, without white space around it.

    finish_reason       "stop": the model ended the turn by itself; "length": it ran into max_new_tokens; "context": into the end of the
                        model's context; a server may give others
    num_answer_tokens   includes the token that ended the turn; both numbers are None where a server does not tell them
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int | None = None
    num_answer_tokens: int | None = None

    @property
    def stopped(self) -> bool:
        return self.finish_reason == "stop"


class Answerer(Protocol):
    """Whoever answers."""

    def answer(self, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[list[Answer]]:
        """Yields `sampling.num_answers` answers to each conversation, in the order of the conversations."""
        ...


def seed_of(conversation: Conversation, number: int, sampling: Sampling) -> int:
    """The seed of the conversation's n-th answer, below 2^31; what else is asked plays no part in it."""
    told = [sampling.seed, number, [[message.role, message.content] for message in conversation.messages]]
    return int.from_bytes(hashlib.sha256(json.dumps(told).encode()).digest()[:4]) >> 1
