"""Trains a sentencepiece unigram tokenizer and writes its Hugging Face side beside it.

    python -m tokenization.train CONFIG.yaml [key=value ...]        (= mujina tokenizer)

The folder holds tokenizer.model (what we encode with), tokenizer.json, tokenizer_config.json and chat_template.jinja (what
transformers.AutoTokenizer loads), and tokenizer_manifest.json, whose fingerprint lets an unchanged training be skipped.

The two engines split some documents differently where two ways score within rounding of each other: sentencepiece adds up single
precision from the start of a document, Hugging Face double. On examples/corpus, with the quickstart's 8,000 pieces, that is 14 of
1,327 documents (1.1%), by 26 of 2.0 million ids; a fifteenth spells `<s>`. The decoded text is always the same. tokenizer.model is
what the model was trained with.
"""

import hashlib
import io
import json
import random
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import sentencepiece
import typer
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mujina.files import read_rows, sha256_of, whole_folder
from mujina.user_input import Section, UserError, command_line, read_yaml
from tokenization.presplit import mecab
from tokenization.sentence_piece import SentencePieceTokenizer
from tokenization.tokenizer import CHAT_PIECES, CHAT_TEMPLATES

MANIFEST = "tokenizer_manifest.json"


class TrainConfig(Section):
    """What a tokenizer is trained on and how large it is."""

    inputs: list[str] = Field(min_length=1)
    """JSONL or JSONL.gz files of rows with `text` or `messages`."""
    output: str
    """The folder to write."""
    vocab_size: int = Field(gt=264, le=10_000_000)
    """Pieces, the 4 control, 4 chat and 256 byte pieces included; above 264."""
    character_coverage: float = Field(default=0.9995, gt=0.9, le=1.0)
    """Share of the character occurrences that get pieces of their own; the rest is spelled in bytes."""
    max_lines: int = Field(default=4_000_000, gt=0)
    """Lines sampled (evenly, by `seed`) when the inputs have more; about 1 GB of memory for 4 million lines."""
    presplit: Literal["mecab"] | None = None
    """`mecab`: no piece crosses a border between two words of Japanese, about 4 MB a second more to read
    (pip install mecab-python3 unidic-lite). For training only; text to encode is not cut.
    """
    presplit_delimiter: str | None = Field(default=None, min_length=1)
    """The same for inputs that a morphological analyser has been over: the string that it put between the words."""
    num_threads: int = Field(default=4, gt=0, le=4096)
    """Part of the fingerprint, because sums of floats depend on how many threads share them."""
    seed: int = 1
    """Of the sample of lines."""
    chat_template: Literal["roles", "alpaca_ja"] = "roles"
    """How dialogues are written: each turn between a token of its role and `<|end|>`, or in the Japanese Alpaca form (a fixed sentence,
    `### 指示:`, `### 応答:`), where `</s>` ends an answer.
    """

    @model_validator(mode="after")
    def _check_presplit(self) -> "TrainConfig":
        if self.presplit and self.presplit_delimiter:
            raise ValueError("presplit and presplit_delimiter both cut the text: the second is for inputs that are cut already: name one")
        return self


def train(config: TrainConfig) -> Path:
    """Trains unless `config.output` already holds the result of the same configuration and inputs; returns the folder.

    The result depends on the configuration and the inputs alone.
    Raises UserError on unreadable inputs, or when they hold too little text for `vocab_size`.
    """
    folder = Path(config.output)
    fingerprint = _fingerprint(config)
    if _is_finished(folder, fingerprint):
        print(f"{folder}: already trained on these inputs with this configuration")
        return folder
    with whole_folder(folder, MANIFEST) as partial:
        started = time.monotonic()
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            progress.add_task(f"training {config.vocab_size:,} pieces on {len(config.inputs)} files", total=None)
            (partial / "tokenizer.model").write_bytes(_train_model(config))
            (partial / "chat_template.jinja").write_bytes(CHAT_TEMPLATES[config.chat_template].read_bytes())
        tokenizer = SentencePieceTokenizer(partial / "tokenizer.model")
        tokenizer.save_hf(partial)
        manifest = {"fingerprint": fingerprint, "tokenizer_hash": tokenizer.hash, "config": config.model_dump()}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(f"{folder}: {tokenizer.vocab_size:,} pieces in {time.monotonic() - started:.0f} s")
    return folder


def _train_model(config: TrainConfig) -> bytes:
    """The bytes of a sentencepiece model."""
    model = io.BytesIO()
    # Only the sample of max_lines, and the order of the lines, come from chance.
    sentencepiece.set_random_generator_seed(config.seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(config),
            model_writer=model,
            model_type="unigram",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            input_sentence_size=0 if config.presplit or config.presplit_delimiter else config.max_lines,
            shuffle_input_sentence=True,
            # A line longer than this (bytes) would be dropped; lines are short, but a minified file can be one line.
            max_sentence_length=1_000_000,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            pad_id=3,
            user_defined_symbols=list(CHAT_PIECES),
            num_threads=config.num_threads,
            minloglevel=1,
        )
    except RuntimeError as error:
        # "Internal: src/trainer_interface.cc(678) [condition] Vocabulary size too high (...)": only the end is for users.
        reason = str(error).rpartition("] ")[2].replace(" with --character_coverage option", "") or str(error)
        raise UserError(f"vocab_size ({config.vocab_size}) does not fit the text of the {len(config.inputs)} inputs: {reason}") from None
    return model.getvalue()


def _training_lines(config: TrainConfig) -> Iterator[str]:
    """The inputs' lines; where the words are to be kept apart, a line for each word, of a sample of `max_lines` lines.

    sentencepiece's own pretokenization_delimiter is not used: with it, version 0.2.3 gives "▁" a probability of 44% on
    examples/corpus/web_ja, of whose tokens it is 8%, and loses pieces such as "▁self" to it on the whole corpus.
    """
    if config.presplit is None and config.presplit_delimiter is None:
        yield from read_lines(config.inputs)
        return
    words = mecab() if config.presplit else lambda line: line.split(config.presplit_delimiter)
    # Sampled here, because sentencepiece would draw a Japanese word as often as a whole line of English.
    draw, share = random.Random(config.seed), config.max_lines / max(sum(1 for _ in read_lines(config.inputs)), 1)
    for line in read_lines(config.inputs):
        if draw.random() < share:
            yield from filter(None, words(line))


def read_lines(inputs: list[str]) -> Iterator[str]:
    """Every line of every document and chat turn that is not blank. Documents go in by lines so that none is too long to be used."""
    for path in inputs:
        for number, row in read_rows(path):
            turns = row.get("messages")
            texts = [row.get("text")] if turns is None else [turn.get("content") for turn in turns]
            for text in texts:
                if not isinstance(text, str):
                    raise UserError(f"{path} line {number}: has neither a string `text` nor `messages` with contents: add one")
                yield from (line for line in text.splitlines() if line.strip())


def _fingerprint(config: TrainConfig) -> str:
    """Changes with whatever changes the result: the configuration (but for where the files lie), the inputs' bytes, the engine."""
    facts: dict[str, Any] = config.model_dump(exclude={"inputs", "output"}) | {
        "inputs": [sha256_of(path) for path in config.inputs],
        "sentencepiece": sentencepiece.__version__,
    }
    if config.presplit:
        mecab()  # says what to install where there is none
        facts["presplit_by"] = [f"{package} {version(package)}" for package in ("mecab-python3", "unidic-lite")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_finished(folder: Path, fingerprint: str) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["fingerprint"] == fingerprint and manifest["tokenizer_hash"] == sha256_of(folder / "tokenizer.model"))
    except (FileNotFoundError, UserError):
        return False  # no manifest, or the model that it speaks of is gone


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the training, see TrainConfig")],
    overrides: Annotated[list[str] | None, typer.Argument(help="values that replace the file's, such as vocab_size=4000")] = None,
) -> None:
    """Trains a tokenizer, and writes what transformers needs to load it."""
    train(read_yaml(config, TrainConfig, overrides))


if __name__ == "__main__":
    command_line(main)
