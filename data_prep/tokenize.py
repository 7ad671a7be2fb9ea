"""Documents to token binaries: one <output>/<source>.bin/.idx/.json for every source of a configuration.

    python -m data_prep.prepare CONFIG.yaml [key=value ...]        (= mujina prepare)

A source whose tokenizer, input files and labels are unchanged is kept as it is; any other is built anew, under temporary names, and
counts only when its manifest is written. So an interrupted run is simply started again.

One process reads the files in blocks of lines, and one process for each core turns blocks into shards: binaries like any other, in
<output>/.<source>.shards until the source is written. A shard that is whole is not built again, so a run that was killed goes on where
it stopped. Shards are joined in the order of their blocks: the bytes do not depend on the number of processes.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
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

from data_prep.blocks import Block, read_blocks
from data_prep.documents import Document, Kind, Origin, documents_of, find_files
from data_prep.indexed import BinaryWriter, Labels, Manifest, open_binary, path_of, token_dtype
from data_prep.workers import Workers
from files import sha256_of
from tokenization.tokenizer import Tokenizer
from user_input import Section, UserError, read_yaml, run

BATCH = 256  # documents tokenized at once


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
    """The tokenizer's folder, the folder to write to, and the sources.

    processes   that tokenize, one for each core unless given; the result does not depend on it
    """

    tokenizer: str
    output: str
    sources: list[SourceConfig] = Field(min_length=1)
    processes: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), gt=0)

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
    global _tokenizer
    _tokenizer = tokenizer
    columns = SpinnerColumn(finished_text="✓"), TextColumn("{task.description:20} {task.fields[state]}"), TimeElapsedColumn()
    with Workers(config.processes) as workers, Progress(*columns, console=Console(stderr=True)) as progress:
        return [_prepare_source(source, files[source.name], Path(config.output), tokenizer, workers, progress) for source in config.sources]


def _prepare_source(
    source: SourceConfig, files: list[str], output: Path, tokenizer: Tokenizer, workers: Workers, progress: Progress
) -> Manifest:
    task = progress.add_task(source.name, total=None, state="checking the input files")
    prefix, shards = output / source.name, output / f".{source.name}.shards"
    fingerprint = _fingerprint(source, files, tokenizer)
    manifest = _finished(prefix, fingerprint)
    done = "unchanged, kept"
    if manifest is None:
        done = "written"
        writer = BinaryWriter(prefix, token_dtype(tokenizer.vocab_size))
        languages, licences, num_characters = Counter[str](), Counter[str](), 0
        blocks = enumerate(block for path in files for block in read_blocks(path))
        for shard in workers.map(_build_shard, ((source, block, shards / f"{number:06}") for number, block in blocks)):
            if shard is None:
                continue
            writer.add_binary(open_binary(shards / shard.name))
            languages.update(shard.languages)
            licences.update(shard.licences)
            num_characters += shard.num_characters
            progress.update(task, state=f"{writer.num_documents:,} documents, {writer.num_tokens:,} tokens")
        if writer.num_documents == 0:
            raise UserError(f"source {source.name}: holds no documents ({', '.join(files)}): leave it out, or give files that hold some")
        manifest = writer.finish(
            _labels(source.name, source, languages, licences, num_characters, tokenizer=tokenizer, fingerprint=fingerprint)
        )
    shutil.rmtree(shards, ignore_errors=True)  # also when a run was killed just before it came here
    progress.update(task, total=1, completed=1, state=f"{done}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    return manifest


_tokenizer: Tokenizer  # of this run: forked with the workers instead of being sent to each of them with every block


def _build_shard(source: SourceConfig, block: Block, prefix: Path) -> Manifest | None:
    """The binary of one block, built unless it is there. None when the block holds no documents."""
    facts = [_tokenizer.hash, source.name, source.kind, source.origin, hashlib.sha256(block.lines).hexdigest()]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    manifest = _finished(prefix, fingerprint)
    if manifest is not None:
        return manifest
    # Under a name of our own first: a worker whose parent was killed may still be at this shard when the next run's comes to it.
    own = prefix.with_name(f"{prefix.name}.{os.getpid()}")
    writer = BinaryWriter(own, token_dtype(_tokenizer.vocab_size))
    languages, licences, num_characters = Counter[str](), Counter[str](), 0
    for documents in batched(documents_of(block, source.name, source.kind, source.origin), BATCH):
        ids, characters = _tokenized(documents)
        num_characters += characters
        languages.update(document.language for document in documents)
        licences.update(document.licence for document in documents)
        writer.add_documents(np.concatenate(ids), np.array([document.size for document in ids]))
    if writer.num_documents == 0:
        return None
    manifest = writer.finish(
        _labels(prefix.name, source, languages, licences, num_characters, tokenizer=_tokenizer, fingerprint=fingerprint)
    )
    for kind in ("bin", "idx", "json"):  # the manifest last, as ever
        os.replace(path_of(own, kind), path_of(prefix, kind))
    return manifest


def _tokenized(documents: tuple[Document, ...]) -> tuple[list[np.ndarray], int]:
    """The ids of each document with its end-of-document token, and the characters of all."""
    texts = iter(_tokenizer.encode_batch([document.text for document in documents if document.text is not None]))
    ids, characters = [], 0
    for document in documents:
        if document.messages is None:
            ids.append(next(texts))
            characters += len(document.text or "")
        else:
            ids.append(np.array(_tokenizer.encode_chat(document.messages), dtype=np.int32))
            characters += sum(len(turn["content"]) for turn in document.messages)
    return [np.append(document, np.int32(_tokenizer.eod_id)) for document in ids], characters


def _labels(
    name: str,
    source: SourceConfig,
    languages: Counter[str],
    licences: Counter[str],
    num_characters: int,
    *,
    tokenizer: Tokenizer,
    fingerprint: str,
) -> Labels:
    return Labels(
        name=name,
        kind=source.kind,
        origin=source.origin,
        languages=dict(sorted(languages.items())),
        licences=dict(sorted(licences.items())),
        num_characters=num_characters,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        fingerprint=fingerprint,
    )


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
