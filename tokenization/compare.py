"""Compares tokenizers on texts: how many characters a token holds, by source, kind and language.

    python -m tokenization.compare TOKENIZER ... --texts NAME=FILE.jsonl.gz [--texts ...] [--output report.md]
                                                                                    (= mujina compare-tokenizers)

A TOKENIZER is a folder that we or Hugging Face wrote, or a bare sentencepiece model file. The output is Markdown, or JSON for a .json.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import sentencepiece
import typer
from rich.console import Console
from rich.table import Table

from mujina.files import read_rows, write_whole
from mujina.user_input import UserError, command_line
from tokenization.load import load

COLUMNS = ("tokenizer", "texts", "kind", "language", "documents", "chars/token", "bytes/token", "tokens", "byte tokens", "exact")


class Engine(Protocol):
    """What is compared: `Tokenizer`, or a sentencepiece model that was not trained here."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, token: int) -> str: ...


class BareSentencePiece:
    """A sentencepiece model file as it is: no chat pieces, and text that spells a control piece is not held back."""

    def __init__(self, path: Path) -> None:
        try:
            self._engine = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError):
            raise UserError(f"{path}: is not a sentencepiece model: give one, or the folder of a tokenizer") from None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return list(self._engine.encode_as_numpy(list(texts), num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._engine.decode([int(token) for token in ids]))

    def piece(self, token: int) -> str:
        return str(self._engine.id_to_piece(token))


@dataclass
class Counts:
    """What one tokenizer made of one group of texts. A byte token is byte fallback, or a piece that holds a part of a character."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    exact: int = 0
    uses: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))

    def row(self, engine: Engine) -> dict[str, Any]:
        tokens = sum(self.uses.values())
        in_bytes = sum(count for token, count in self.uses.items() if _is_byte(engine, token))
        return {
            "documents": self.documents,
            "chars/token": self.characters / max(tokens, 1),
            "bytes/token": self.bytes / max(tokens, 1),
            "tokens": tokens,
            "byte tokens": in_bytes / max(tokens, 1),
            "exact": self.exact / self.documents,
        }


def compare(tokenizers: list[Path], texts: list[tuple[str, Path]]) -> list[dict[str, Any]]:
    """A row for each tokenizer and each (texts, kind, language), with the keys COLUMNS; shares are between 0 and 1.

    `exact` is the share of documents that decode to themselves. Raises UserError on an unreadable tokenizer or file.
    """
    rows = []
    for path in tokenizers:
        engine = BareSentencePiece(path) if path.is_file() else load(path)
        groups: defaultdict[tuple[str, str, str], Counts] = defaultdict(Counts)
        for name, file in texts:
            for batch in batched(_documents(file), 256):
                for (kind, language, text), ids in zip(batch, engine.encode_batch([text for *_, text in batch]), strict=True):
                    _count(groups[name, kind, language], engine, text, ids)
        for (name, kind, language), counts in sorted(groups.items()):
            rows.append({"tokenizer": str(path), "texts": name, "kind": kind, "language": language} | counts.row(engine))
    return rows


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of what `compare` returns."""
    align = ["---" if column in COLUMNS[:4] else "---:" for column in COLUMNS]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [COLUMNS, align, *map(_cells, rows)])


def _count(counts: Counts, engine: Engine, text: str, ids: np.ndarray) -> None:
    counts.documents += 1
    counts.characters += len(text)
    counts.bytes += len(text.encode())
    counts.exact += engine.decode(ids.tolist()) == text
    for token, uses in zip(*np.unique(ids, return_counts=True), strict=True):
        counts.uses[int(token)] += int(uses)


def _is_byte(engine: Engine, token: int) -> bool:
    piece = engine.piece(token)
    return (piece.startswith("<0x") and len(piece) == 6) or "\ufffd" in engine.decode([token])


def _documents(path: Path) -> Iterator[tuple[str, str, str]]:
    """(kind, language, text) of each row; of a dialogue, what is said."""
    for number, row in read_rows(path):
        text = row.get("text") if "messages" not in row else "\n".join(turn["content"] for turn in row["messages"])
        if not isinstance(text, str):
            raise UserError(f"{path} line {number}: has neither a string `text` nor `messages` with contents: add one")
        yield str(row.get("kind", "")), str(row.get("language", "")), text


def _cells(row: dict[str, Any]) -> list[str]:
    formats = {"chars/token": ".2f", "bytes/token": ".2f", "documents": ",", "tokens": ",", "byte tokens": ".2%", "exact": ".1%"}
    return [format(row[column], formats.get(column, "")) for column in COLUMNS]


def _show(rows: Iterable[dict[str, Any]]) -> None:
    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:4] else "right", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)


def main(
    tokenizers: Annotated[list[Path], typer.Argument(help="tokenizer folders, or sentencepiece model files")],
    texts: Annotated[list[str], typer.Option(help="NAME=FILE of JSONL or JSONL.gz rows; may be repeated")],
    output: Annotated[Path | None, typer.Option(help="a .md or .json file to write as well")] = None,
) -> None:
    """Characters per token, bytes per token, byte tokens and exact round trips of each tokenizer on each group of texts."""
    named = []
    for text in texts:
        name, separator, file = text.partition("=")
        if not separator:
            raise UserError(f"--texts {text}: is not of the form NAME=FILE: write for example --texts web=web_ja.jsonl.gz")
        named.append((name, Path(file)))
    if output and output.suffix not in (".md", ".json"):
        raise UserError(f"--output {output}: its name must end in .md or .json")
    rows = compare(tokenizers, named)
    _show(rows)
    if output:
        written = to_markdown(rows) if output.suffix == ".md" else json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        write_whole(output, written.encode())


if __name__ == "__main__":
    command_line(main)
