"""Answers with a bar that says how many are there, for the commands that wait for them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from mujina.answers import Answer, Answerer, Conversation, Failure, Request, Sampling

T = TypeVar("T")


def answered(answerer: Answerer, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[list[Answer]]:
    """`answerer.answer`, with a bar on the error stream."""
    return _shown(answerer.answer(conversations, sampling), "generating", len(conversations))


def asked(answerer: Answerer, requests: Iterable[tuple[T, Request]], total: int, what: str) -> Iterator[tuple[T, Answer | Failure]]:
    """`answerer.ask`, with a bar on the error stream."""
    return _shown(answerer.ask(requests), what, total)


def _shown(found: Iterator[T], what: str, total: int) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track

    yield from track(found, description=what, total=total, console=Console(stderr=True))
