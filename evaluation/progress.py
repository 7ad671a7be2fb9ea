"""Answers with a bar that says how many are there, for the commands that wait for them."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from mujina.answers import Answer, Answerer, Conversation, Failure, Request, Sampling

T = TypeVar("T")
_TICK = 0.1  # seconds from one look of the bar to the next


def answered(answerer: Answerer, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[list[Answer]]:
    """`answerer.answer`, with a bar on the error stream."""
    found = answerer.answer(conversations, sampling)
    return _shown(found, "generating", len(conversations), lambda answers: sum(answer.num_answer_tokens or 0 for answer in answers))


def asked(answerer: Answerer, requests: Iterable[tuple[T, Request]], total: int, what: str) -> Iterator[tuple[T, Answer | Failure]]:
    """`answerer.ask`, with a bar on the error stream."""
    return _shown(answerer.ask(requests), what, total, lambda one: (isinstance(one[1], Answer) and one[1].num_answer_tokens) or 0)


def _shown(found: Iterator[T], what: str, total: int, num_tokens_of: Callable[[T], int]) -> Iterator[T]:
    """How many of them are there, tokens a second, and the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    began = told = time.monotonic()
    count = num_tokens = 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, speed="")
        for one in found:
            yield one
            count, num_tokens, now = count + 1, num_tokens + num_tokens_of(one), time.monotonic()
            if now > told + _TICK or count == total:
                speed = f"{num_tokens / max(now - began, 1e-3):,.0f} tokens/s" if num_tokens else ""
                bar.update(task, completed=count, speed=speed)
                told = now
