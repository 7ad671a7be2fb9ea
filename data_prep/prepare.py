"""Documents to token binaries: one <output>/<source>.bin/.idx/.json for every source of a configuration.

    python -m data_prep.prepare CONFIG.yaml [key=value ...]        (= mujina prepare)

A source whose tokenizer, input files and labels are unchanged is kept as it is; any other is built anew, under temporary names, and
counts only when its manifest is written. So an interrupted run is simply started again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic
import typer
from pydantic import Field
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_prep.documents import Document, Kind, Origin, find_files, read_documents
from data_prep.indexed import BinaryWriter, Labels, Manifest, open_binary, token_dtype
from files import sha256_of
from tokenization.tokenizer import Tokenizer
from user_input import Section, UserError, read_yaml, run

BATCH = 256  # documents tokenized at once, over all cores


class SourceConfig(Section):
    """One source: the files it comes from, and what phases may know of it.

    documents   paths or patterns of .jsonl, .jsonl.gz, .parquet files, or `datasets:NAME[:SPLIT]`, in order
    kind        web, code, documents or chat        origin   human or synthetic
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    documents: list[str] = Field(min_length=1)
    kind: Kind
    origin: Origin = "human"


class PrepareConfig(Section):
    """The tokenizer's folder, the folder to write to, and the sources."""

    tokenizer: str
    output: str
    sources: list[SourceConfig] = Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _names_differ(self) -> "PrepareConfig":
        twice = [name for name, count in Counter(source.name for source in self.sources).items() if count > 1]
        if twice:
            raise ValueError(f"sources: the name {twice[0]!r} occurs twice: every source is a file of its own, rename one")
        return self


def prepare(config: PrepareConfig) -> list[Manifest]:
    """Builds the sources that are not there yet or have changed; returns the manifests of all, in order.

    Raises UserError on unreadable files and on sources without documents.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    # Names are resolved for all sources first, so that a misspelled path is not found out after hours.
    files = {source.name: find_files(source.documents) for source in config.sources}
    columns = SpinnerColumn(finished_text="✓"), TextColumn("{task.description:20} {task.fields[state]}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        return [_prepare_source(source, files[source.name], Path(config.output), tokenizer, progress) for source in config.sources]


def _prepare_source(source: SourceConfig, files: list[str], output: Path, tokenizer: Tokenizer, progress: Progress) -> Manifest:
    task = progress.add_task(source.name, total=None, state="checking the input files")
    prefix = output / source.name
    fingerprint = _fingerprint(source, files, tokenizer)
    manifest = _finished(prefix, fingerprint)
    done = "unchanged, kept"
    if manifest is None:
        done = "written"
        writer = BinaryWriter(prefix, token_dtype(tokenizer.vocab_size))
        languages, licences, num_characters = Counter[str](), Counter[str](), 0
        for document, ids, characters in _tokenized(source, files, tokenizer):
            writer.add_document(ids)
            languages[document.language] += 1
            licences[document.licence] += 1
            num_characters += characters
            if writer.num_documents % BATCH == 0:
                progress.update(task, state=f"{writer.num_documents:,} documents, {writer.num_tokens:,} tokens")
        if writer.num_documents == 0:
            raise UserError(f"source {source.name}: holds no documents ({', '.join(files)}): leave it out, or give files that hold some")
        manifest = writer.finish(
            Labels(
                name=source.name,
                kind=source.kind,
                origin=source.origin,
                languages=dict(sorted(languages.items())),
                licences=dict(sorted(licences.items())),
                num_characters=num_characters,
                tokenizer_hash=tokenizer.hash,
                vocab_size=tokenizer.vocab_size,
                fingerprint=fingerprint,
            )
        )
    progress.update(task, total=1, completed=1, state=f"{done}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    return manifest


def _tokenized(source: SourceConfig, files: list[str], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray, int]]:
    """Yields (document, its ids with the end-of-document token, its characters)."""
    documents = (document for path in files for document in read_documents(path, source.name, source.kind, source.origin))
    for batch in batched(documents, BATCH):
        texts = iter(tokenizer.encode_batch([document.text for document in batch if document.text is not None]))
        for document in batch:
            if document.messages is None:
                ids, characters = next(texts), len(document.text or "")
            else:
                ids, characters = tokenizer.encode_chat(document.messages), sum(len(turn["content"]) for turn in document.messages)
            yield document, np.array([*ids, tokenizer.eod_id], dtype=np.int32), characters


def _fingerprint(source: SourceConfig, files: list[str], tokenizer: Tokenizer) -> str:
    """Changes with whatever changes the binary or its labels. A `datasets:` name stands for itself: its rows are not checksummed."""
    checksums = [path if path.startswith("datasets:") else sha256_of(path) for path in files]
    facts = [tokenizer.hash, source.name, source.kind, source.origin, checksums]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _finished(prefix: Path, fingerprint: str) -> Manifest | None:
    try:
        manifest = open_binary(prefix).manifest
    except UserError:
        return None  # missing, damaged or half-written: built anew
    return manifest if manifest.fingerprint == fingerprint else None


def _print_table(manifests: list[Manifest]) -> None:
    table = Table("source", "kind", "origin")
    for title in ("documents", "tokens", "characters per token"):
        table.add_column(title, justify="right")
    for m in manifests:
        table.add_row(m.name, m.kind, m.origin, f"{m.num_documents:,}", f"{m.num_tokens:,}", f"{m.num_characters / m.num_tokens:.2f}")
    table.add_section()
    table.add_row("all", "", "", f"{sum(m.num_documents for m in manifests):,}", f"{sum(m.num_tokens for m in manifests):,}", "")
    Console().print(table)


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the tokenizer, the output and the sources, see PrepareConfig")],
    overrides: Annotated[list[str] | None, typer.Argument(help="values that replace the file's, such as output=runs/data")] = None,
) -> None:
    """Tokenizes documents into Megatron's indexed binaries, one for every source."""
    _print_table(prepare(read_yaml(config, PrepareConfig, overrides)))


if __name__ == "__main__":
    run(main)
