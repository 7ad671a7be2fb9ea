"""Documents to one token binary: <output>/<source>.bin/.idx/.json, on all cores.

A binary whose tokenizer, chat template, input files, labels and channels are unchanged, and whose bytes are those that were written, is
kept as it is; any other is built anew, under temporary names, and counts only when its manifest is written. So an interrupted run is
simply started again.

One process reads the files in blocks of lines, and one process for each core turns blocks into shards: binaries like any other, in
<output>/.<source>.shards until the source is written. A shard that is whole is not built again, so a run that was killed goes on where
it stopped. Shards are joined in the order of their blocks: the bytes do not depend on the number of processes.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.answers import last_answer, problem_of
from data_prep.blocks import Block, read_blocks, rows_of
from data_prep.config import SourceConfig
from data_prep.indexed import BinaryWriter, Channel, Labels, Manifest, open_binary, token_dtype
from data_prep.pipeline import is_needed
from data_prep.row import Row, SourceFacts, is_nothing, joined
from data_prep.steps.read import files_of
from data_prep.workers import Workers
from mujina.files import sha256_of
from mujina.user_input import UserError
from tokenization.tokenizer import Rendered, Tokenizer

BATCH = 256  # documents tokenized at once
WEIGHTS = "weights"  # the channel of `SourceConfig.answer_weights`
SHOWN = 20  # damaged dialogues in a manifest

_tokenizer: Tokenizer  # of this run: forked with the workers instead of being sent to each of them with every block


def use(tokenizer: Tokenizer) -> None:
    """Sets the tokenizer of this run; the workers must be forked after this."""
    global _tokenizer
    _tokenizer = tokenizer


@dataclass
class _Tally:
    """What the manifest says of a source's documents: how many are in which language, …"""

    languages: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    teachers: Counter[str] = field(default_factory=Counter)
    num_characters: int = 0
    num_empty: int = 0
    has_dialogues: bool = False
    num_begun: int = 0
    num_answer_tokens: int = 0
    num_damaged: int = 0
    damaged: list[str] = field(default_factory=list)

    def add(self, rows: tuple[Row, ...], ids: list[np.ndarray], num_characters: int) -> None:
        self.languages.update(row["language"] for row in rows)
        self.licences.update(row["licence"] for row in rows)
        self.teachers.update(row["teacher"] for row in rows if "teacher" in row)
        self.num_characters += num_characters
        self.has_dialogues |= any("messages" in row for row in rows)
        self.num_begun += sum(int(document[0]) == _tokenizer.bos_id for document in ids if document.size > 1)

    def add_shard(self, shard: "Manifest | _Tally") -> None:
        for name in ("languages", "licences", "teachers"):
            getattr(self, name).update(getattr(shard, name))
        self.num_characters += shard.num_characters
        self.num_empty += shard.num_empty
        self.has_dialogues |= shard.has_dialogues if isinstance(shard, _Tally) else shard.template_hash is not None
        self.num_begun += shard.num_begun
        self.num_answer_tokens += shard.num_answer_tokens
        self.num_damaged += shard.num_damaged
        self.damaged += shard.damaged[: SHOWN - len(self.damaged)]

    def labels(self, name: str, facts: SourceFacts, fingerprint: str) -> Labels:
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("languages", "licences", "teachers")}
        return Labels(
            name=name,
            kind=facts.kind,
            origin=facts.origin,
            **counts,
            num_characters=self.num_characters,
            num_empty=self.num_empty,
            tokenizer_hash=_tokenizer.hash,
            template_hash=_tokenizer.template_hash if self.has_dialogues else None,
            vocab_size=_tokenizer.vocab_size,
            begin_documents=_tokenizer.begin_documents,
            end_of_document=_tokenizer.piece(_tokenizer.eod_id),
            num_begun=self.num_begun,
            num_answer_tokens=self.num_answer_tokens,
            num_damaged=self.num_damaged,
            damaged=tuple(self.damaged),
            fingerprint=fingerprint,
        )


def tokenize(name: str, source: SourceConfig, files: list[str], output: Path, workers: Workers, say: Callable[[str], None]) -> Manifest:
    """Builds the binary of one source from files of rows, unless it is there. `say` is told how far it is.

    Raises UserError on unreadable files and on a source without documents.
    """
    prefix, shards = output / name, output / f".{name}.shards"
    say("checking the input files")
    fingerprint = _fingerprint(name, source, [_contents(path) for path in files])
    manifest = _finished(prefix, fingerprint)
    done = "unchanged, kept"
    if manifest is None:
        done = "written"
        writer, tally = BinaryWriter(prefix, token_dtype(_tokenizer.vocab_size), _channels(source)), _Tally()
        blocks = enumerate(block for path in files for block in read_blocks(path, is_needed(source)))
        for shard in workers.map(_build_shard, ((name, source, block, shards / f"{number:06}") for number, block in blocks)):
            tally.add_shard(shard)
            if isinstance(shard, _Tally):
                continue
            writer.add_binary(open_binary(shards / shard.name))
            say(f"{writer.num_documents:,} documents, {writer.num_tokens:,} tokens")
        if writer.num_documents == 0:
            said = f"all that it held was dropped or passed over, see {output / name / 'report.html'}"
            where = tally.damaged[0] if tally.damaged else said if source.steps else ", ".join(files)
            raise UserError(f"source {name}: holds no documents ({where}): leave it out, or give files that hold some")
        manifest = writer.finish(tally.labels(name, source, fingerprint))
    shutil.rmtree(shards, ignore_errors=True)  # also when a run was killed just before it came here
    say(f"{done}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    return manifest


def _build_shard(name: str, source: SourceConfig, block: Block, prefix: Path) -> Manifest | _Tally:
    """The binary of one block, built unless it is there. When the block holds no documents, what it holds instead."""
    fingerprint = _fingerprint(name, source, hashlib.sha256(block.lines).hexdigest())
    manifest = _finished(prefix, fingerprint)
    if manifest is not None:
        return manifest
    channels = _channels(source)
    writer, tally = BinaryWriter(prefix, token_dtype(_tokenizer.vocab_size), channels), _Tally()
    for found in batched(rows_of(block, source.labels(name)), BATCH):
        rows = tuple(row for row in found if not is_nothing(row["text"] if "text" in row else joined(row["messages"])))
        tally.num_empty += len(found) - len(rows)
        rendered = None
        if source.marks_answers:
            rows, rendered = _answered(name, source, rows, tally)
        if not rows:
            continue
        ids, weights, num_characters = _tokenized(rows, rendered)
        tally.add(rows, ids, num_characters)
        values = {}
        if channels:
            values = {WEIGHTS: np.concatenate(weights)}
            tally.num_answer_tokens += int(values[WEIGHTS].sum())
        writer.add_documents(np.concatenate(ids), np.array([document.size for document in ids]), values)
    if writer.num_documents == 0:
        return tally
    return writer.finish(tally.labels(prefix.name, source, fingerprint))


def _channels(source: SourceConfig) -> dict[str, Channel]:
    """What lies beside the tokens of the source."""
    return {WEIGHTS: Channel(dtype="uint8", per="token")} if source.marks_answers else {}


def _answered(name: str, source: SourceConfig, rows: tuple[Row, ...], tally: _Tally) -> tuple[tuple[Row, ...], list[Rendered]]:
    """The rows that can be trained on for their answers, and each dialogue of theirs as the template writes it (a pair of answers makes
    two); the others stop the run or are passed over."""
    kept, rendered = list[Row](), list[Rendered]()
    for row in rows:
        turns = row["messages"]
        written = list[Rendered]()
        try:
            if source.kind == "preferences":
                problem = "has two equal answers: drop the row" if turns[-1] == turns[-2] else None
                dialogues = [turns[:-1], [*turns[:-2], turns[-1]]]
            else:
                problem, dialogues = None, [turns]
            for dialogue in dialogues:
                written.append(_tokenizer.render(dialogue))
                problem = problem or problem_of(dialogue, written[-1], source.template_may_change)
        except UserError as error:
            problem = str(error)
        if problem is None:
            kept.append(row)
            rendered += map(last_answer, written) if source.kind == "preferences" else written
            continue
        told = f"dialogue {row['id']}: {problem}"
        if source.damaged == "stop":
            raise UserError(f"source {name}: {told}; or set damaged: skip, and such rows are passed over and told")
        tally.num_damaged += 1
        tally.damaged += [told][: SHOWN - len(tally.damaged)]
    return tuple(kept), rendered


def _tokenized(rows: tuple[Row, ...], rendered: list[Rendered] | None) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """The ids of each document, from what begins it to what ends it, weights (of what is `rendered`), and characters of all rows."""
    characters = sum(len(row["text"]) if "text" in row else sum(len(turn["content"]) for turn in row["messages"]) for row in rows)
    weights = [_ended(one.is_answer, one.ids, True).astype(np.uint8) for one in rendered or ()]  # the end of the document included
    if rendered is not None:
        ids = [one.ids for one in rendered]
    else:
        texts = iter(_tokenizer.encode_batch([row["text"] for row in rows if "text" in row]))
        # where nobody asks for the answers, a template need not tell them
        ids = [next(texts) if "text" in row else _tokenizer.encode_chat(row["messages"]) for row in rows]
        if _tokenizer.begins_texts:
            begin = np.array([_tokenizer.bos_id], np.int32)
            ids = [np.append(begin, one) if "text" in row else one for row, one in zip(rows, ids, strict=True)]
    return [_ended(document, document, np.int32(_tokenizer.eod_id)) for document in ids], weights, characters


def _ended(values: np.ndarray, ids: np.ndarray, end: Any) -> np.ndarray:
    """The values of a document's tokens, with that of the token that ends it, unless its last turn has ended with just that token."""
    return values if ids.size and ids[-1] == _tokenizer.eod_id else np.append(values, end)


def _contents(path: str) -> str | list[str]:
    """A `datasets:` name that is no folder here stands for itself: its rows are not checksummed."""
    if not path.startswith("datasets:"):
        return sha256_of(path)
    files = files_of(path)
    return [path, *map(sha256_of, files)] if files else path


def _fingerprint(name: str, source: SourceConfig, contents: Any) -> str:
    """Changes with whatever changes a binary, its labels or its channels."""
    described: list[Any] = [_tokenizer.hash, name, source.model_dump(include=set(SourceFacts.model_fields)), contents]
    if source.marks_answers:  # with the end of the document, unlike those of version 0.1
        described += [WEIGHTS, "and the end", source.template_may_change, source.damaged]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _finished(prefix: Path, fingerprint: str) -> Manifest | None:
    """The manifest of a binary that is there, whole, and what would be built."""
    try:
        binary = open_binary(prefix)
        if binary.manifest.fingerprint != fingerprint or binary.manifest.template_hash not in (None, _tokenizer.template_hash):
            return None
        binary.verify()
    except UserError:
        return None  # missing, damaged or half-written: built anew
    return binary.manifest
