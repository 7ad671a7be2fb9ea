"""What a step is. A step of a configuration is one section; its key `step` says which.

A `Step` judges (and may rewrite) one document after the other. A `CorpusStep` must see the whole source before it can judge, so the
documents pass it twice: each rank marks its documents, a few tasks compare the marks, and then each rank judges its documents.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from datatrove.data import Document

from data_prep.row import joined
from mujina.user_input import Section

# Called with each document. It may rewrite it. It returns None to keep it, or why it is dropped: a fixed reason of one or two words,
# and, after ": ", what was found in this document ("sentence_ends: 0.02"). Reasons are counted, findings are kept with the document.
Judge = Callable[[Document], str | None]


class Step(Section, ABC):
    """One step over single documents. Subclasses have a field `step: Literal[...]`, their name in a configuration."""

    @abstractmethod
    def start(self) -> Judge:
        """Loads what the step needs, once a process, and returns its judge."""

    def files(self) -> list[Path]:
        """The files of the user's that it reads, which are a part of what it does."""
        return []

    def notes(self) -> list[str]:
        """What the report says of it besides the counts."""
        return []


class CorpusStep(Section, ABC):
    """One step over the whole source. `folder` is its own, on a file system that all ranks share; memory does not grow with the source."""

    @abstractmethod
    def mark(self, documents: Iterable[Document], folder: Path, rank: int) -> Iterator[Document]:
        """Passes the documents of a rank on as they are and writes its marks, in whole files."""

    @abstractmethod
    def find(self, folder: Path, num_ranks: int) -> list[tuple[int, Callable[[int], None]]]:
        """The stages between marking and judging: (number of tasks, work of one task, which can be pickled). A stage starts when all
        tasks of the one before have ended; a task may be run again and then gives the same files."""

    @abstractmethod
    def judge(self, folder: Path, rank: int) -> Judge:
        """The judge of a rank's documents, called with all of them in the order in which they were marked."""


def texts_of(document: Document) -> list[str]:
    """The text, or the contents of a dialogue's turns."""
    messages = document.metadata.get("messages")
    return [document.text] if messages is None else [turn["content"] for turn in messages]


def rewrite(document: Document, function: Callable[[str], str]) -> None:
    """Puts function(text) in the place of the text, or of each turn of a dialogue. `document.text` holds a dialogue's turns by lines."""
    messages = document.metadata.get("messages")
    if messages is None:
        document.text = function(document.text)
    else:
        document.metadata["messages"] = [turn | {"content": function(turn["content"])} for turn in messages]
        document.text = joined(document.metadata["messages"])
