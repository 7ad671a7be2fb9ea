"""Preferences: the loss, the rewards and the gradient of pairs, at every layout, against a plain loop over transformers; references."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.prepare import PrepareConfig, prepare
from megatron_jobs.checkpoints.checkpoint import write_weights
from megatron_jobs.checkpoints.weights import InitialWeights
from megatron_jobs.config import RunConfig
from megatron_jobs.data.ledger import Ledger
from mujina.user_input import UserError
from tests.conftest import MOE, WORDS, tiny
from tests.megatron_jobs.engine.test_answers import CASES, document_of
from tests.megatron_jobs.engine.test_weights import records
from tests.megatron_jobs.test_train import plain_model, train_here
from tests.ranks import run_ranks

LENGTH, BATCH, BETA = 64, 4, 0.3
TOLD = ("loss", "grad_norm", "reward_margin", "chosen_reward", "rejected_reward", "chosen_log_probability", "rejected_log_probability")


@pytest.fixture(scope="module")
def pairs(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of pairs, in two public forms."""
    folder, draw, sources = tmp_path_factory.mktemp("pairs"), random.Random(3), {}

    def words() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 2)))

    for name, count in (("plain", 30), ("ultra", 20)):
        rows: list[dict[str, Any]] = []
        for n in range(count):
            prompt, chosen, rejected = words(), f"{words()} {n}", words()
            if name == "plain":
                rows.append({"messages": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected})
            else:
                sides = ([{"role": "user", "content": prompt}, {"role": "assistant", "content": text}] for text in (chosen, rejected))
                rows.append({"prompt": prompt, **dict(zip(("chosen", "rejected"), sides, strict=True))})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[name] = {"documents": [str(folder / f"{name}.jsonl")], "kind": "preferences", "origin": "rule"}
    values = {"tokenizer": str(prepared / "tokenizer"), "output": str(folder / "data"), "sources": sources}
    prepare(PrepareConfig.model_validate(values))
    return folder / "data"


def preferring(
    prepared: Path, pairs: Path, run: Path, micro_batch_size: int = 2, loss: dict[str, Any] | None = None, **more: Any
) -> RunConfig:
    phase = dict(
        name="dpo",
        sequence_length=LENGTH,
        global_batch_size=BATCH,
        sources={"plain": {"epochs": 2}, "ultra": {"epochs": 1}},
        learning_rate=dict(start=1e-2, end=1e-2, shape="constant"),
        loss=dict(kind="preference", beta=BETA) | (loss or {}),
    )
    data = dict(folder=str(pairs), block_length=64, max_epochs=2)
    train = dict(micro_batch_size=micro_batch_size, checkpoint_interval=2)
    return tiny(prepared, run, phases=[phase], data=data, train=train, **more)


def one_by_one(config: RunConfig) -> list[dict[str, float]]:
    """The steps of the run with a model of transformers that reads one answer at a time, and a copy of it as the reference."""
    import copy

    import torch
    import torch.nn.functional as F

    from megatron_jobs.data import feeder, phases
    from megatron_jobs.data.order import DataOrder

    binaries = feeder.open_sources(config)
    sources = feeder.facts(binaries)
    config = phases.resolve(config, sources)
    llama, adamw, _ = plain_model(config)
    reference = copy.deepcopy(llama)
    order, loss, steps = DataOrder(config, sources), config.phases[0].loss, []

    def logp(model: Any, name: str, document: int) -> tuple[Any, float]:
        ids, said = document_of(binaries[name], document)
        return -(F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none") * said).sum(), float(said.sum())

    for step in range(config.phases[0].num_steps):
        losses, told = [], []
        for name, numbers in order.samples(step, range(BATCH)):
            for pair in numbers:
                (chosen, n_chosen), (rejected, n_rejected) = (logp(llama, name, 2 * pair + side) for side in (0, 1))
                with torch.no_grad():
                    known = [logp(reference, name, 2 * pair + side)[0] for side in (0, 1)]
                margin = BETA * ((chosen - known[0]) - (rejected - known[1]))
                if loss.form == "ipo":
                    losses.append(((chosen - known[0]) / n_chosen - (rejected - known[1]) / n_rejected - 1 / (2 * BETA)) ** 2)
                else:
                    losses.append(-(1 - loss.label_smoothing) * F.logsigmoid(margin) - loss.label_smoothing * F.logsigmoid(-margin))
                losses[-1] = losses[-1] - loss.nll_weight * chosen / n_chosen
                told.append([margin, BETA * (chosen - known[0]), BETA * (rejected - known[1]), chosen, rejected])
        adamw.zero_grad()
        total = torch.stack(losses).mean()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), config.optimizer.clip_grad)
        for group in adamw.param_groups:
            group["lr"] = 1e-2
        adamw.step()
        means = [float(sum(values) / len(values)) for values in zip(*told, strict=True)]
        steps.append(dict(zip(TOLD, (float(total), float(norm), *means), strict=True)) | {"pairs": len(losses)})
    return steps


LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "smoothed": dict(label_smoothing=0.1, nll_weight=0.2),
    "ipo": dict(form="ipo"),
}


# The form of the loss plays no part in how it is shared out, but over the parts of a sequence.
FORMS = [(name, case) for name in LOSSES for case in CASES if name == "dpo" or case[0] == 1 or "context" in case[1]]


@pytest.fixture(scope="module")
def expected(prepared, pairs, tmp_path_factory, request) -> tuple[str, list[dict[str, float]]]:
    config = preferring(prepared, pairs, tmp_path_factory.mktemp("plain"), loss=LOSSES[request.param])
    return request.param, run_ranks(1, one_by_one, config)[0]


@pytest.mark.parametrize(("expected", "case"), FORMS, indirect=["expected"], ids=str)
def test_pairs_are_those_of_a_plain_loop(prepared, pairs, tmp_path, expected, case):
    (world, sizes, micro_batch_size), (name, steps) = case, expected
    run_ranks(world, train_here, preferring(prepared, pairs, tmp_path, micro_batch_size, LOSSES[name], parallel=sizes))
    found = records(tmp_path)
    assert len(found) == len(steps) and sum(step["pairs"] for step in steps) == 2 * 30 + 20
    if name == "dpo":
        assert found[0]["loss"] == pytest.approx(np.log(2), rel=1e-6) and found[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    for number, (step, by_hand) in enumerate(zip(found, steps, strict=True)):
        for measure in TOLD:
            assert step[measure] == pytest.approx(by_hand[measure], rel=2e-4 if number else 1e-5, abs=1e-4 if number else 1e-5), measure
    assert found[0]["reward_margin_by_source"].keys() <= {"plain", "ultra"}


def test_experts_are_shared_out(prepared, pairs, tmp_path):
    """A mixture keeps its balancing loss, and is the same on two ranks that share the experts."""
    alone, shared = (
        preferring(prepared, pairs, tmp_path / name, moe=MOE, parallel=sizes) for name, sizes in (("a", {}), ("b", dict(expert=2)))
    )
    run_ranks(1, train_here, alone)
    run_ranks(2, train_here, shared)
    for step, by_two in zip(records(alone.run), records(shared.run), strict=True):
        assert step["load_balancing_loss"] > 0
        for measure in TOLD:
            assert by_two[measure] == pytest.approx(step[measure], rel=1e-3, abs=1e-3), measure


def train_killed_while_it_refers(config: RunConfig) -> None:
    from megatron_jobs import references

    write = references._write
    writes = []

    def once(folder: Path, found: dict[str, np.ndarray]) -> None:
        write(folder, found)
        writes.append(folder)
        if len(writes) == 2:
            raise KeyboardInterrupt

    references.AT_ONCE, references._write = 2, once
    with pytest.raises(KeyboardInterrupt):
        train_here(config)


def test_references_are_computed_once(prepared, pairs, tmp_path):
    """Killed while it computes them, or behind the first steps, a run goes on as if nothing had been; what is not its own is refused."""
    whole, cut = (preferring(prepared, pairs, tmp_path / name) for name in ("whole", "cut"))
    run_ranks(1, train_here, whole)
    run_ranks(1, train_killed_while_it_refers, cut)
    before = {path.name: np.fromfile(path, "<f4") for path in (cut.run / "references/dpo").glob("*.f32")}
    assert sum(np.isfinite(values).sum() for values in before.values()) > 0
    run_ranks(1, train_here, cut, 5)
    told = [json.loads(line) for line in (cut.run / "events.jsonl").read_text().splitlines() if '"references"' in line]
    assert told[-1]["reason"] == "50 of 50 pairs" and not told[0]["reason"].startswith("50 of")
    run_ranks(1, train_here, cut)
    assert [step["loss"] for step in records(whole.run)] == [step["loss"] for step in records(cut.run)]
    for path in (whole.run / "references/dpo").glob("*.f32"):
        assert path.read_bytes() == (cut.run / "references/dpo" / path.name).read_bytes()

    part = preferring(prepared, pairs, tmp_path / "part")
    run_ranks(1, train_here, part, 5)
    about = part.run / "references/dpo/about.json"
    kept = about.read_text()
    about.write_text(kept.replace('"step": 0', '"step": 3'))
    with pytest.raises(AssertionError, match="holds the references of other weights, or of other binaries .step is 3 there, and 0 here"):
        run_ranks(1, train_here, part)
    about.write_text(kept)
    (part.run / "references/dpo/plain.f32").unlink()
    with pytest.raises(AssertionError, match="lacks the references of 30 of 50 pairs, and phase dpo has begun"):
        run_ranks(1, train_here, part)


def test_a_phase_refers_to_the_weights_it_begins_with(prepared, pairs, tmp_path):
    """Two phases of the same pairs: the second one's first loss is log 2 again, though the first has moved the weights."""
    first = preferring(prepared, pairs, tmp_path).model_dump(mode="json", exclude_none=True)["phases"][0]
    first["sources"] = {"plain": {"epochs": 1}}
    config = tiny(
        prepared,
        tmp_path,
        phases=[first, first | {"name": "again"}],
        data=dict(folder=str(pairs), block_length=64, max_epochs=2, validation_tokens=60),
        train=dict(micro_batch_size=1, validation_interval=3),
    )
    run_ranks(1, train_here, config)
    steps = records(tmp_path)
    begins = [step["loss"] for before, step in zip([None, *steps], steps, strict=False) if not before or before["phase"] != step["phase"]]
    assert begins == pytest.approx([np.log(2)] * 2, rel=1e-5) and min(step["loss"] for step in steps[1:]) < 0.6
    assert any(set(step.get("validation", {})) == {"plain"} for step in steps)


def beside_a_base(prepared: Path, pairs: Path, run: Path, moe: Any, adapter: dict[str, Any], **more: Any) -> RunConfig:
    """Two phases of the same pairs with one adapter, beside the first weights of the same run without one."""
    first = preferring(prepared, pairs, run).model_dump(mode="json", exclude_none=True)["phases"][0]
    first["sources"] = {"plain": {"epochs": 1}}
    sections = dict(
        phases=[first, first | {"name": "again"}],
        data=dict(folder=str(pairs), block_length=64, max_epochs=2),
        moe=moe,
    )
    config = tiny(prepared, run, **sections)
    weights = InitialWeights(config.model, config.moe, config.seed)
    base = write_weights(run / "base", config, weights, weights.shapes, Ledger(), "writing")
    train = dict(micro_batch_size=2, checkpoint_interval=2, init_from=str(base))
    return tiny(prepared, run / "run", train=train, adapter=adapter, **sections, **more)


def log_probabilities_of_base(config: RunConfig) -> np.ndarray:
    """What a model of transformers with the base's weights makes of the pairs of the source: [pairs, 2]."""
    import torch
    import torch.nn.functional as F

    from megatron_jobs.data import feeder, phases

    binaries = feeder.open_sources(config)
    base, _, _ = plain_model(phases.resolve(config, feeder.facts(binaries)).model_copy(update={"run": config.run.parent / "plain"}))
    found = []
    with torch.no_grad():
        for ids, said in (document_of(binaries["plain"], number) for number in range(2 * 30)):
            found.append(-float((F.cross_entropy(base(ids[None, :-1]).logits[0], ids[1:], reduction="none") * said).sum()))
    return np.array(found).reshape(-1, 2)


BESIDE: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    "tensor": (None, dict(matrices=["query", "value", "attention_out", "up", "down"]), dict(tensor=2)),
    "experts": (MOE, dict(matrices=["query", "value", "attention_out", "experts.up", "experts.down"]), dict(tensor=2, expert=2)),
    "stages": (None, dict(matrices=["key", "gate"]), dict(pipeline=2)),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case == "experts" else pytest.mark.repeats) for case in BESIDE])
def test_the_reference_beside_an_adapter_is_its_base(prepared, pairs, tmp_path, case):
    """In a phase behind one that has trained the adapter too; and a base is never gone."""
    moe, adapter, sizes = BESIDE[case]
    config = beside_a_base(prepared, pairs, tmp_path, moe, dict(rank=4, alpha=8) | adapter, parallel=sizes)
    run_ranks(2, train_here, config)
    by_hand = run_ranks(1, log_probabilities_of_base, config)[0]
    files = [config.run / f"references/{name}/plain.f32" for name in ("dpo", "again")]
    for file in files:
        assert np.fromfile(file, "<f4").reshape(-1, 2) == pytest.approx(by_hand, rel=1e-5, abs=1e-5)
    steps = records(config.run)
    begins = {step["phase"]: step["loss"] for step in reversed(steps)}
    assert begins["dpo"] == pytest.approx(np.log(2), rel=1e-6) and begins["again"] < 0.6
    assert all(step["load_balancing_loss"] > 0 for step in steps) if moe else "load_balancing_loss" not in steps[0]

    cut = config.model_copy(update={"run": tmp_path / "cut"})
    run_ranks(2, train_here, cut, len(steps) - 1)
    (cut.run / "references/again/plain.f32").unlink()
    run_ranks(2, train_here, cut)
    assert [step["loss"] for step in records(cut.run)] == [step["loss"] for step in steps]
    assert (cut.run / "references/again/plain.f32").read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        (dict(loss=dict(kind="preference", beta=0)), r"phases.0.loss.preference.beta \(0\)"),
        (dict(loss=dict(kind="preference", form="ipo", label_smoothing=0.1)), "label_smoothing .0.1. means nothing for form ipo"),
        (dict(sources={"plain": {"epochs": 1, "loss_weight": 2}}), r"loss_weight \(2\) of source plain means nothing for pairs"),
        (dict(sequence_length=16), r"phases.dpo.sources.plain: \d+ of its dialogues are longer than sequence_length .*too_long: drop"),
        (dict(loss=dict(kind="answers")), "is of kind preferences, and loss.kind answers wants kind chat"),
    ],
)
def test_mistakes_are_explained(prepared, pairs, tmp_path, phase, told):
    from megatron_jobs.data import feeder, phases

    given = preferring(prepared, pairs, tmp_path).model_dump(mode="json", exclude_none=True)["phases"][0] | phase
    with pytest.raises(UserError, match=told):
        config = tiny(prepared, tmp_path, phases=[given], data=dict(folder=str(pairs), block_length=64, max_epochs=2))
        phases.resolve(config, feeder.facts(feeder.open_sources(config)))
