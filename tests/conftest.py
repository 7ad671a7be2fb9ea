"""A small tokenizer and token binaries, made by the real commands' functions, and configurations that use them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from data_prep.indexed import TokenBinary
from data_prep.prepare import PrepareConfig, prepare
from megatron_jobs.config import RunConfig, from_dict
from tokenization.load import load as load_tokenizer
from tokenization.train import TrainConfig, train

WORDS = "山 川 東京 データ 学習 言語 the of model token data train phase expert router and is 1 2 3 + = def return self".split()


# One worker runs what is on Slurm, which mostly waits, and one the faults, and they start with it; the others take a file at a time.
ON_SLURM = ("tests/slurm/", "tests/data_prep/test_executors.py")
SOAK = "tests/slurm/test_soak.py"


class ByFile(LoadScopeScheduling):
    """With several workers (pytest -n). (xdist's own `loadgroup` goes by a name that pytest 9.2 does not hand on.)"""

    def _split_scope(self, nodeid: str) -> str:
        return "slurm" if nodeid.startswith(ON_SLURM) and not nodeid.startswith(SOAK) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(ON_SLURM))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer` (about 320 pieces) and `data` (sources web, code and chat)."""
    folder = tmp_path_factory.mktemp("prepared")
    draw = random.Random(1)
    for source, separator in (("web", " "), ("code", "\n    ")):
        rows = [
            {
                "id": str(n),
                "text": separator.join(draw.choices(WORDS, k=60)),
                "source": source,
                "kind": source,
                "language": "ja",
                "licence": "x",
            }
            for n in range(600)
        ]
        (folder / f"{source}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    with (folder / "chat.jsonl").open("w") as file:
        for n in range(1200):
            a, b = draw.randrange(50), draw.randrange(50)
            messages = [{"role": "user", "content": f"{a} + {b}?"}, {"role": "assistant", "content": f"The answer is {a + b}."}]
            row = {"id": str(n), "messages": messages, "source": "chat", "kind": "chat", "language": "en", "licence": "x"}
            file.write(json.dumps(row) + "\n")
    inputs = [str(folder / f"{name}.jsonl") for name in ("web", "code", "chat")]
    train(TrainConfig(inputs=inputs, output=str(folder / "tokenizer"), vocab_size=320, character_coverage=1.0))
    sources: dict[str, dict[str, Any]] = {
        name: {"documents": [path], "kind": name, "origin": "synthetic" if name == "chat" else "human"}
        for name, path in zip(("web", "code", "chat"), inputs, strict=True)
    }
    prepare(PrepareConfig.model_validate({"tokenizer": str(folder / "tokenizer"), "output": str(folder / "data"), "sources": sources}))
    return folder


def read(binaries: dict[str, TokenBinary], where: list[tuple[str, int]], length: int) -> torch.Tensor:
    """The samples at (source, offset): int64 [samples, length + 1], the last token of each a label only."""
    return torch.from_numpy(np.stack([binaries[name].read(offset, length + 1).astype(np.int64) for name, offset in where]))


def tiny(prepared: Path, run: Path, **sections: Any) -> RunConfig:
    """A run of a model of 50,000 parameters in two phases of 6 and 4 steps; `sections` replace or extend the values."""
    values: dict[str, Any] = {
        "run": str(run),
        "tokenizer": str(prepared / "tokenizer"),
        "model": dict(
            num_layers=4,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=load_tokenizer(prepared / "tokenizer").vocab_size,
            init_std=0.1,
        ),
        "data": dict(folder=str(prepared / "data"), block_length=64),
        "train": dict(micro_batch_size=2, precision="fp32", checkpoint_interval=3),
        "phases": [
            dict(
                name="web",
                tokens=6 * 8 * 32,
                sequence_length=32,
                global_batch_size=8,
                sources={"web": 0.5, "code": 0.3, "chat": 0.2},
                learning_rate=dict(start=1e-2, end=5e-3, shape="cosine", warmup_steps=2),
            ),
            dict(
                name="chat",
                tokens=4 * 4 * 64,
                sequence_length=64,
                global_batch_size=4,
                sources={"chat": 1.0},
                admit=dict(kinds=["chat"], origins=["synthetic"]),
                learning_rate=dict(start=5e-3, end=1e-3, shape="linear"),
            ),
        ],
    }
    for section, new in sections.items():
        old = values.get(section)
        values[section] = old | new if isinstance(old, dict) and isinstance(new, dict) else new
    return from_dict(values, "test")


MOE = {"num_experts": 4, "top_k": 2}
