"""Training on answers: whole dialogues, packed, give the loss and the gradient of one dialogue at a time, at every layout."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.indexed import TokenBinary
from data_prep.prepare import PrepareConfig, prepare
from megatron_jobs.config import RunConfig
from tests.conftest import MOE, WORDS, tiny
from tests.megatron_jobs.engine.test_weights import records
from tests.megatron_jobs.test_train import plain_model, train_here
from tests.ranks import run_ranks

LENGTH, BATCH = 64, 4
CASES: list[tuple[int, dict[str, int], int]] = [
    (1, {}, 1),
    (1, {}, 4),
    (2, {}, 2),
    (2, dict(tensor=2), 2),
    (2, dict(pipeline=2), 1),
    (2, dict(context=2), 2),
]
NO_BALANCING = MOE | {"balancing": "none"}  # whose loss knows places, and not what stands there


@pytest.fixture(scope="module")
def dialogues(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of dialogues of one or two rounds, with their answers told."""
    folder, draw = tmp_path_factory.mktemp("dialogues"), random.Random(2)
    sources = {}
    for name, count in (("long", 40), ("short", 30)):
        rows = []
        for _ in range(count):
            rounds = draw.randint(1, 2) if name == "long" else 1
            turns = [(role, " ".join(draw.choices(WORDS, k=draw.randint(1, 3)))) for _ in range(rounds) for role in ("user", "assistant")]
            rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[name] = {"documents": [str(folder / f"{name}.jsonl")], "kind": "chat", "origin": "rule", "answer_weights": True}
    values = {"tokenizer": str(prepared / "tokenizer"), "output": str(folder / "data"), "sources": sources}
    prepare(PrepareConfig.model_validate(values))
    return folder / "data"


def answering(
    prepared: Path,
    dialogues: Path,
    run: Path,
    micro_batch_size: int = 2,
    loss: dict[str, Any] | None = None,
    batch: int = BATCH,
    checkpoint: int = 100,
    **more: Any,
) -> RunConfig:
    phase = dict(
        name="sft",
        sequence_length=LENGTH,
        global_batch_size=batch,
        sources={"long": {"epochs": 1}, "short": {"epochs": 2, "loss_weight": 0.5}},
        learning_rate=dict(start=1e-2, end=1e-2, shape="constant"),
        loss=dict(kind="answers") | (loss or {}),
    )
    data = dict(folder=str(dialogues), block_length=64, max_epochs=2)
    train = dict(micro_batch_size=micro_batch_size, checkpoint_interval=checkpoint)
    return tiny(prepared, run, phases=[phase], data=data, train=train, **more)


def document_of(binary: TokenBinary, number: int) -> tuple[Any, Any]:
    """The ids of a document, and of each label whether it is an answer's."""
    import torch

    start, end = binary.bounds(number)
    said = torch.from_numpy(binary.read_channel("weights", start + 1, end - start - 1)).float()
    return torch.from_numpy(binary.read(start, end - start).astype("int64")), said


def one_by_one(config: RunConfig) -> list[dict[str, float]]:
    """The steps of the run with a Llama of transformers that reads one dialogue at a time."""
    import torch

    from megatron_jobs.data import feeder, phases
    from megatron_jobs.data.order import DataOrder

    binaries = feeder.open_sources(config)
    sources = feeder.facts(binaries)
    config = phases.resolve(config, sources)
    llama, adamw, _ = plain_model(config)
    order, loss, steps = DataOrder(config, sources), config.phases[0].loss, []
    for step in range(config.phases[0].num_steps):
        nats, weights, trained = [], [], 0
        for name, numbers in order.samples(step, range(BATCH)):
            for number in numbers:
                ids, said = document_of(binaries[name], number)
                share = config.phases[0].portion(name).loss_weight / (said.sum() if loss.mean_over == "dialogues" else 1)
                logits = llama(ids[None, :-1]).logits[0]
                nats.append((torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none") * said).sum() * share)
                weights.append(float(said.sum() * share))
                trained += int(said.sum())
        adamw.zero_grad()
        total = torch.stack(nats).sum() / sum(weights)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), config.optimizer.clip_grad)
        for group in adamw.param_groups:
            group["lr"] = 1e-2
        adamw.step()
        steps.append({"loss": float(total), "grad_norm": float(norm), "dialogues": len(nats)})
    return steps


@pytest.fixture(scope="module", params=["tokens", "dialogues"])
def expected(prepared, dialogues, tmp_path_factory, request) -> tuple[dict[str, Any], list[dict[str, float]]]:
    loss = {"mean_over": request.param}
    return loss, run_ranks(1, one_by_one, answering(prepared, dialogues, tmp_path_factory.mktemp("plain"), loss=loss))[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_is_one_by_one(prepared, dialogues, tmp_path, expected, case):
    """Step for step what transformers makes of one dialogue at a time."""
    (world, sizes, micro_batch_size), (loss, steps) = case, expected
    run_ranks(world, train_here, answering(prepared, dialogues, tmp_path, micro_batch_size, loss, parallel=sizes))
    found = records(tmp_path)
    assert len(found) == len(steps) and sum(step["dialogues"] for step in steps) == 40 + 2 * 30
    for number, (step, by_hand) in enumerate(zip(found, steps, strict=True)):
        for measure in ("loss", "grad_norm"):
            assert step[measure] == pytest.approx(by_hand[measure], rel=1e-4 if number else 1e-6), measure


def train_apart(config: RunConfig) -> None:
    """A dialogue a sample, and the rest of it empty."""
    from megatron_jobs.data import dialogues, packing

    dialogues.pack = lambda lengths, *_: packing.Packs(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    train_here(config)


@pytest.fixture(scope="module")
def apart(prepared, dialogues, tmp_path_factory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("apart")
    run_ranks(1, train_apart, answering(prepared, dialogues, run, 4, batch=100, moe=NO_BALANCING))
    return records(run)[0]


@pytest.mark.parametrize("case", [*CASES, (2, dict(expert=2), 2)], ids=str)
def test_packed_is_apart_with_experts(prepared, dialogues, tmp_path, apart, case):
    """All dialogues in one step: in packs, and each in a sample of its own."""
    world, sizes, micro_batch_size = case
    run_ranks(world, train_here, answering(prepared, dialogues, tmp_path, micro_batch_size, batch=64, parallel=sizes, moe=NO_BALANCING))
    (step,) = records(tmp_path)
    for measure in ("loss", "grad_norm"):
        assert step[measure] == pytest.approx(apart[measure], rel=1e-6), measure


def test_a_killed_run_goes_on_at_another_layout(prepared, dialogues, tmp_path):
    whole, cut = (answering(prepared, dialogues, tmp_path / name, checkpoint=2) for name in ("whole", "cut"))
    run_ranks(1, train_here, whole)
    run_ranks(1, train_here, cut, 5)
    run_ranks(1, train_here, cut)
    assert [step["loss"] for step in records(whole.run)] == [step["loss"] for step in records(cut.run)]
    ledgers = [json.loads((config.run / "checkpoints/latest/ledger.json").read_text()) for config in (whole, cut)]
    assert ledgers[0] == ledgers[1]
    consumed = ledgers[0]["phases"][0]["sources"]
    taken = {name: (source["first_dialogue"], source["num_dialogues"]) for name, source in consumed.items()}
    assert taken == {"long": (0, 40), "short": (0, 60)}
    counted = sum((Counter(step["tokens_by_source"]) for step in records(whole.run)), Counter())
    assert counted == {name: source["tokens"] for name, source in consumed.items()}
    assert sum(counted.values()) < ledgers[0]["tokens"], "the last batch is filled up with what counts for no source"
    other = answering(prepared, dialogues, tmp_path / "other", checkpoint=2)
    run_ranks(1, train_here, other, 5)
    run_ranks(2, train_here, answering(prepared, dialogues, tmp_path / "other", checkpoint=2, parallel=dict(context=2)))
    assert [step["loss"] for step in records(other.run)] == pytest.approx([step["loss"] for step in records(whole.run)], rel=1e-4)
