"""Tokens that differ in their weight: the loss is one mean over the global batch, whatever the layout and the micro-batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.indexed import BinaryWriter, Channel, Labels, TokenBinary, open_binary
from data_prep.prepare import PrepareConfig, prepare
from megatron_jobs.config import RunConfig
from megatron_jobs.data.feeder import open_sources
from mujina.user_input import UserError
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


@pytest.fixture(scope="module")
def binaries(prepared, tmp_path_factory) -> Path:
    """The binaries of `prepared` with a channel of token weights."""
    folder = tmp_path_factory.mktemp("binaries")
    for name in ("web", "code", "chat"):
        binary = open_binary(prepared / "data" / name)
        writer = BinaryWriter(folder / name, binary.tokens.dtype, {"weights": Channel(dtype="float32", per="token")})
        writer.add_documents(binary.tokens, binary.lengths, {"weights": token_weights(np.asarray(binary.tokens))})
        writer.finish(Labels.model_validate(binary.manifest.model_dump(include=set(Labels.model_fields))))
    return folder


def token_weights(tokens: np.ndarray) -> np.ndarray:
    """By the token itself: most are 0, so that micro-batches and ranks weigh very differently."""
    return np.where(tokens % 7 == 0, tokens % 5, 0).astype(np.float32)


def weighted(prepared: Path, binaries: Path, run: Path, micro_batch_size: int, **sections: Any) -> RunConfig:
    rate = dict(start=1e-2, end=1e-2, shape="constant")
    phase = dict(name="web", tokens=STEPS * 8 * 32, sequence_length=32, global_batch_size=8, sources=MIX, learning_rate=rate)
    phase["loss"] = dict(z_loss=1e-3, token_weights="weights")
    data = dict(folder=str(binaries), validation_tokens=64)
    return tiny(prepared, run, phases=[phase], data=data, train=dict(micro_batch_size=micro_batch_size), **sections)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def by_hand(prepared, binaries, tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(1, plain_loop, weighted(prepared, binaries, tmp_path_factory.mktemp("plain"), 8))[0]


def plain_loop(config: RunConfig) -> list[dict[str, Any]]:
    """The weighted loss of each step in a plain loop over a Llama of transformers: Σ w (nats + c (log Z)²) / Σ w."""
    import torch

    from tests.megatron_jobs.test_train import plain_model

    llama, adamw, steps = plain_model(config)
    result = []
    for tokens, where in steps:
        factor = {name: take["loss_weight"] if isinstance(take, dict) else 1.0 for name, take in MIX.items()}
        weights = torch.from_numpy(token_weights(tokens.numpy()[:, 1:])) * torch.tensor([factor[source] for source, _ in where])[:, None]
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
                "trained_by_source": {source: int((w > 0).sum()) for source, w in of.items()},
            }
        )
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_is_divided_by_the_weight_of_the_global_batch(prepared, binaries, tmp_path, by_hand, case):
    world, sizes, micro_batch_size = case
    run_ranks(world, train_here, weighted(prepared, binaries, tmp_path, micro_batch_size, parallel=sizes))
    found = records(tmp_path)
    assert len(found) == len(by_hand) == STEPS
    for step, expected in zip(found, by_hand, strict=True):
        for name in ("loss", "z_loss", "grad_norm"):
            assert step[name] == pytest.approx(expected[name], rel=1e-4), name
        for name in ("loss_by_source", "weight_by_source", "trained_by_source"):
            assert {source: value for source, value in step[name].items() if value} == pytest.approx(expected[name], rel=1e-4), name
        assert sum(step["tokens_by_source"].values()) == 8 * 32


def test_a_mean_of_means_would_be_another_loss(by_hand):
    """The comparison sees something: the micro-batches of one sample weigh from nothing to several times the mean."""
    assert max(abs(step["loss"] - step["mean of means"]) for step in by_hand) > 0.1


def test_weights_of_one_are_no_weights(prepared, tmp_path):
    """To the last bit, also of a mixture, whose routers have losses of their own; a factor of all sources changes nothing either."""
    runs = {}
    for name, loss_weight in (("ones", 1.0), ("twice", 2.0)):
        mix = {source: {"weight": weight, "loss_weight": loss_weight} for source, weight in (("web", 0.5), ("code", 0.3), ("chat", 0.2))}
        web, _ = tiny(prepared, tmp_path / name).model_dump(mode="json")["phases"]
        run_ranks(2, train_here, tiny(prepared, tmp_path / name, moe=MOE, phases=[web | {"sources": mix}]))
        runs[name] = losses(tmp_path / name)
    run_ranks(2, train_here, tiny(prepared, tmp_path / "plain", moe=MOE), 6)
    assert losses(tmp_path / "plain") == runs["ones"] == runs["twice"]
    shares = records(tmp_path / "twice")[0]["weight_by_source"]
    assert sum(shares.values()) == pytest.approx(1) and "weight_by_source" not in records(tmp_path / "ones")[0]


def test_what_cannot_be_weighed_is_refused(prepared, binaries, tmp_path):
    config = weighted(prepared, binaries, tmp_path, 2)
    plain = config.model_copy(update={"data": config.data.model_copy(update={"folder": prepared / "data"})})
    field = r"phases.web.loss.token_weights \(weights\)"
    with pytest.raises(UserError, match=f"{field}: the binary of source .* has no such channel"):
        open_sources(plain)
    zero = weighted(prepared, binaries, tmp_path / "zero", 2)
    with pytest.raises(AssertionError, match=f"{field}: no token of a whole batch has a weight above 0"):
        run_ranks(1, train_without_weights, zero)


def train_without_weights(config: RunConfig) -> None:
    TokenBinary.read_channel = lambda self, name, offset, length: np.zeros(length, np.float32)
    train_here(config)


def test_answers_are_learnt_alone(prepared, tmp_path):
    """From dialogues to the trainer: what `answer_weights: true` marks is what the loss of the phase is a mean over."""
    chat = {"documents": [str(prepared / "chat.jsonl")], "kind": "chat", "origin": "synthetic", "answer_weights": True}
    settings = {"tokenizer": str(prepared / "tokenizer"), "output": str(tmp_path / "data"), "sources": {"chat": chat}}
    prepare(PrepareConfig.model_validate(settings))
    _, phase = tiny(prepared, tmp_path / "run").model_dump(mode="json")["phases"]
    phase["loss"] = dict(kind="next_token", token_weights="weights")
    config = tiny(prepared, tmp_path / "run", phases=[phase], data=dict(folder=str(tmp_path / "data")))
    run_ranks(2, train_here, config, 1)
    [step] = records(tmp_path / "run")
    expected = run_ranks(1, loss_of_the_answers, config)[0]
    assert step["loss"] == pytest.approx(expected["answers"], rel=1e-4) and abs(expected["answers"] - expected["all"]) > 0.01


def loss_of_the_answers(config: RunConfig) -> dict[str, float]:
    """Of the first batch, over the tokens that follow `<|assistant|>` until `<|end|>`, that token and the end of the document included;
    and over all tokens."""
    import torch

    from tests.megatron_jobs.test_train import plain_model
    from tokenization.load import load

    tokenizer = load(config.tokenizer)
    [assistant] = [token for token in range(tokenizer.vocab_size) if tokenizer.piece(token) == "<|assistant|>"]
    llama, _, steps = plain_model(config)
    tokens, where = next(steps)
    stream = np.asarray(open_binary(config.data.folder / "chat").tokens)
    inside, is_answer = False, []
    for token in stream.tolist():
        is_answer.append(inside or token == tokenizer.eod_id)
        inside = token == assistant or (inside and token != tokenizer.end_of_turn_id)
    marks = torch.tensor([is_answer[offset + 1 : offset + tokens.shape[1]] for _, offset in where])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(llama(tokens[:, :-1]).logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return {"answers": float(nats[marks].mean()), "all": float(nats.mean())}
