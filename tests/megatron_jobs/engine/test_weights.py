"""Tokens that differ in their weight: the loss is one mean over the global batch, whatever the layout and the micro-batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_jobs.config import RunConfig
from megatron_jobs.data.feeder import MicroBatch
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks

STEPS = 4
MIX = {"web": {"weight": 0.5, "loss_weight": 2.0}, "code": {"weight": 0.3, "loss_weight": 0.25}, "chat": 0.2}
# processes, sizes, samples in a micro-batch
CASES = [
    (1, {}, 1),
    (1, {}, 8),
    (2, {}, 1),
    (2, {}, 4),
    (2, dict(tensor=2), 2),
    (2, dict(pipeline=2), 2),
    (2, dict(context=2), 2),
    (4, dict(pipeline=2, virtual_pipeline=2), 1),
]


def weighted(prepared: Path, run: Path, micro_batch_size: int, **sections: Any) -> RunConfig:
    rate = dict(start=1e-2, end=1e-2, shape="constant")
    phase = dict(
        name="web", tokens=STEPS * 8 * 32, sequence_length=32, global_batch_size=8, sources=MIX, learning_rate=rate, loss=dict(z_loss=1e-3)
    )
    return tiny(prepared, run, phases=[phase], train=dict(micro_batch_size=micro_batch_size), **sections)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def token_weights(tokens: np.ndarray) -> np.ndarray:
    """Weights that follow from the token behind each position: most are 0, so that micro-batches and ranks weigh very differently."""
    return np.where(tokens[:, 1:] % 7 == 0, tokens[:, 1:] % 5, 0).astype(np.float32)


def train_with_token_weights(config: RunConfig) -> None:
    """As if every binary had a channel with `token_weights`."""
    from megatron_jobs.data import feeder

    plain = feeder.micro_batch

    def with_weights(*arguments: Any) -> MicroBatch:
        batch = plain(*arguments)
        return MicroBatch(batch.tokens, batch.sources, batch.documents, batch.weights * token_weights(batch.tokens))

    feeder.micro_batch = with_weights
    train_here(config)


@pytest.fixture(scope="module")
def by_hand(prepared, tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(1, plain_loop, weighted(prepared, tmp_path_factory.mktemp("plain"), 8))[0]


def plain_loop(config: RunConfig) -> list[dict[str, Any]]:
    """The weighted loss of each step in a plain loop over a Llama of transformers: Σ w (nats + c (log Z)²) / Σ w."""
    import torch

    from tests.megatron_jobs.test_train import plain_model

    llama, adamw, steps = plain_model(config)
    result = []
    for tokens, where in steps:
        factor = {name: take["loss_weight"] if isinstance(take, dict) else 1.0 for name, take in MIX.items()}
        weights = torch.from_numpy(token_weights(tokens.numpy())) * torch.tensor([factor[source] for source, _ in where])[:, None]
        logits = llama(tokens[:, :-1]).logits
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        squares = logits.logsumexp(-1).square()
        adamw.zero_grad()
        ((weights * (nats + 1e-3 * squares)).sum() / weights.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), config.optimizer.clip_grad)
        adamw.step()
        rows = {source: [n for n, (name, _) in enumerate(where) if name == source] for source in MIX}
        of = {source: weights[at] for source, at in rows.items() if weights[at].sum()}
        result.append(
            {
                "loss": float((weights * nats).sum() / weights.sum()),
                "z_loss": float((weights * squares).sum() / weights.sum()),
                "grad_norm": float(norm),
                "mean of means": float(((weights * nats).sum(1) / weights.sum(1).clamp_min(1e-9)).mean()),
                "loss_by_source": {source: float((w * nats[rows[source]]).sum() / w.sum()) for source, w in of.items()},
                "weight_by_source": {source: float(w.sum() / weights.sum()) for source, w in of.items()},
            }
        )
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_is_divided_by_the_weight_of_the_global_batch(prepared, tmp_path, by_hand, case):
    world, sizes, micro_batch_size = case
    run_ranks(world, train_with_token_weights, weighted(prepared, tmp_path, micro_batch_size, parallel=sizes))
    found = records(tmp_path)
    assert len(found) == len(by_hand) == STEPS
    for step, expected in zip(found, by_hand, strict=True):
        for name in ("loss", "z_loss", "grad_norm"):
            assert step[name] == pytest.approx(expected[name], rel=1e-4), name
        for name in ("loss_by_source", "weight_by_source"):
            assert {source: value for source, value in step[name].items() if value} == pytest.approx(expected[name], rel=1e-4), name
        assert sum(step["tokens_by_source"].values()) == 8 * 32


def test_a_mean_of_means_would_be_another_loss(by_hand):
    """The comparison sees something: the micro-batches of one sample weigh from nothing to several times the mean."""
    assert max(abs(step["loss"] - step["mean of means"]) for step in by_hand) > 0.1


def test_weights_of_one_are_no_weights(prepared, tmp_path):
    """To the last bit, also of a mixture, whose routers have losses of their own."""
    ones = {name: {"weight": take["weight"] if isinstance(take, dict) else take} for name, take in MIX.items()}
    plain = {name: take["weight"] for name, take in ones.items()}
    twice = {name: take | {"loss_weight": 2.0} for name, take in ones.items()}
    runs = {}
    for name, mix in (("plain", plain), ("ones", ones), ("twice", twice)):
        config = weighted(prepared, tmp_path / name, 2, moe=MOE)
        phase = config.phases[0].model_dump() | {"sources": mix}
        run_ranks(2, train_here, tiny(prepared, tmp_path / name, moe=MOE, phases=[phase]))
        runs[name] = losses(tmp_path / name)
    assert runs["plain"] == runs["ones"] == runs["twice"]
    assert "weight_by_source" in records(tmp_path / "twice")[0] and "weight_by_source" not in records(tmp_path / "ones")[0]


def test_a_batch_without_any_weight_is_an_error(prepared, tmp_path):
    with pytest.raises(AssertionError, match="no token of a whole batch has a weight above 0"):
        run_ranks(1, train_without_weights, weighted(prepared, tmp_path, 2))


def train_without_weights(config: RunConfig) -> None:
    global token_weights
    token_weights = lambda tokens: np.zeros_like(tokens[:, 1:], dtype=np.float32)  # noqa: E731
    train_with_token_weights(config)
