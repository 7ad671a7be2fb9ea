"""Answers with a bar that says how many are there, for the commands that wait for them."""

from collections.abc import Iterator, Sequence

from mujina.answers import Answer, Answerer, Conversation, Sampling


def answered(answerer: Answerer, conversations: Sequence[Conversation], sampling: Sampling) -> Iterator[list[Answer]]:
    """`answerer.answer`, with a bar on the error stream."""
    from rich.console import Console
    from rich.progress import track

    found = answerer.answer(conversations, sampling)
    yield from track(found, description="generating", total=len(conversations), console=Console(stderr=True))
