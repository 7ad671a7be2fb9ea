"""A small tokenizer for the tests of this folder."""

import json
from pathlib import Path

import pytest

from tokenization.train import TrainConfig, train


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = ["the cat sat on the mat", "猫がマットの上に座った", "What is 7 + 5? The answer is 12."]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{line} {n}"}) + "\n" for n in range(30) for line in lines))
    return train(TrainConfig(inputs=[str(folder / "text.jsonl")], output=str(folder / "t"), vocab_size=303, character_coverage=1.0))
