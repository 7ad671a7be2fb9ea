"""Two small tokenizers for the tests of this folder: one trained by the real command's function, and a byte-level BPE one."""

import gzip
import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenization.load import load
from tokenization.tokenizer import CHAT_PIECES, Tokenizer
from tokenization.train import TrainConfig, train

LINES = [
    "吾輩は猫である。名前はまだ無い。",
    "どこで生れたかとんと見当がつかぬ。",
    "The quick brown fox jumps over the lazy dog 12 times.",
    "    def encode(self, text):",
    "        return [3, 14, 15]",
    "答えは12です。カタカナとひらがな",
]

CORPUS = sorted((Path(__file__).parents[2] / "examples/corpus").glob("*.jsonl.gz"))
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", *CHAT_PIECES]


def texts() -> list[str]:
    return [json.loads(line)["text"] for path in CORPUS for line in gzip.open(path)]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 120 texts and 20 dialogues."""
    draw = random.Random(1)
    words = ["".join(draw.choices("かきくけこstrea", k=draw.randint(2, 5))) for _ in range(80)]
    path = tmp_path_factory.mktemp("inputs") / "text.jsonl"
    rows = [{"text": "\n".join(f"{LINES[(n + i) % len(LINES)]} {draw.choice(words)} {n}" for i in range(4))} for n in range(120)]
    rows += [{"messages": [{"role": "user", "content": LINES[0]}, {"role": "assistant", "content": LINES[5]}]}] * 20
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def folder(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokenizer") / "small"
    return train(TrainConfig(inputs=[str(inputs)], output=str(output), vocab_size=375, character_coverage=1.0))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return load(folder)


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2_000, show_progress=False, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator([text[:3_000] for text in texts()[::13]], trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    return folder
