"""Documents: what a row of raw text is, and how files of rows are read.

A row needs `text`, or `messages` ([{role, content}, ...]); `id`, `source`, `kind`, `origin`, `language`, `licence` and `teacher` are
read when they are there, other keys are passed over.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from data_prep.blocks import Block, read_blocks, rows_of
from mujina.user_input import Section, UserError

Kind = Literal["web", "code", "documents", "chat"]
Origin = Literal["human", "synthetic", "rule"]


class SourceFacts(Section):
    """What phases may know of a source. `language`, `licence` and `teacher` hold for the rows that do not state their own."""

    kind: Kind
    """What kind of text it is."""
    origin: Origin = "human"
    """Who wrote it: human, synthetic (a model; `teacher` is its name), or rule (a program)."""
    language: str = "unknown"
    """Of the rows that do not state their own, such as ja."""
    licence: str = "unknown"
    """Of the rows that do not state their own."""
    teacher: str | None = None
    """The model that wrote the rows that do not state their own."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one dialogue: exactly one of `text` and `messages` is there."""

    id: str
    text: str | None
    messages: list[dict[str, str]] | None
    source: str
    kind: Kind
    origin: Origin
    language: str
    licence: str
    teacher: str | None


def find_files(patterns: list[str]) -> list[str]:
    """Resolves file patterns (`web/*.jsonl.gz`) to sorted paths; `datasets:` names stay as they are.

    Raises UserError when a pattern or path matches nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        paths = [pattern] if pattern.startswith("datasets:") else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise UserError(f"documents {pattern!r}: no such file: check the path, which starts at the folder where the command runs")
        found += paths
    return found


def read_documents(path: str, source: str, facts: SourceFacts) -> Iterator[Document]:
    """Yields the documents of one file, in order.

    path    a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or `datasets:NAME[:SPLIT]` for a name or folder that the `datasets`
            library knows
    facts   a row that states another kind or origin is an error, because phases rely on them

    Raises UserError, naming file and line, on anything that is not such a row.
    """
    for block in read_blocks(path):
        yield from documents_of(block, source, facts)


def documents_of(block: Block, source: str, facts: SourceFacts) -> Iterator[Document]:
    """`read_documents` of one block of a file."""
    path = block.path
    for number, row in rows_of(block):
        where = f"{path} line {number}"
        for field, declared, known in (("kind", facts.kind, get_args(Kind)), ("origin", facts.origin, get_args(Origin))):
            if row.get(field) not in (None, declared):
                raise UserError(
                    f"{where}: {field} is {row[field]!r}, but the source declares {declared!r}: put the row into a source of its own "
                    f"(known: {', '.join(known)})"
                )
        messages = row.get("messages")
        text = row.get("text") if messages is None else None
        if messages is not None:
            _check_messages(messages, where)
        elif not isinstance(text, str):
            raise UserError(f"{where}: has neither a string `text` nor `messages`: add one")
        elif facts.kind == "chat":
            raise UserError(f"{where}: a source of kind chat needs `messages`, this row has only `text`: use kind documents or web")
        yield Document(
            id=str(row.get("id") or f"{Path(path).name}:{number}"),
            text=text,
            messages=messages,
            source=str(row.get("source") or source),
            kind=facts.kind,
            origin=facts.origin,
            language=str(row.get("language") or facts.language),
            licence=str(row.get("licence") or facts.licence),
            teacher=row.get("teacher") or facts.teacher,
        )


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: `messages` is not a list of turns: write [{{"role": "user", "content": "..."}}, ...]')
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise UserError(f"{where}: the turn {turn!r} lacks a string `role` or `content`: add it")
