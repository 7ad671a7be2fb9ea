"""One small tokenizer, trained by the real command's function, for the tests of this folder."""

import json
import random
from pathlib import Path

import pytest

from tokenization.tokenizer import Tokenizer
from tokenization.train import TrainConfig, train

LINES = [
    "吾輩は猫である。名前はまだ無い。",
    "どこで生れたかとんと見当がつかぬ。",
    "The quick brown fox jumps over the lazy dog 12 times.",
    "    def encode(self, text):",
    "        return [3, 14, 15]",
    "答えは12です。カタカナとひらがな",
]


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
    return Tokenizer.load(folder)
