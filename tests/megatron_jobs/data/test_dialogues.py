"""Phases of dialogues: each at most once an epoch, whole, packed, and the same at every layout and restart."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.indexed import BinaryWriter, Channel, Labels, TokenBinary, open_binary
from megatron_jobs.data import feeder
from megatron_jobs.data.order import DataOrder
from megatron_jobs.data.packing import pack
from megatron_jobs.data.phases import num_steps, resolve
from mujina.user_input import UserError
from tests.megatron_jobs.data.test_order import phase, run_config, sources

LABELS = dict(origin="rule", languages={}, licences={}, teachers={}, num_characters=1, tokenizer_hash="", vocab_size=100, fingerprint="")


def chat(prefix: Path, lengths: list[int], answers: list[int] | None = None) -> TokenBinary:
    """A binary of dialogues of these lengths; each has one answer token, its last one or that at `answers`."""
    writer = BinaryWriter(prefix, np.dtype(np.uint16), {"weights": Channel(dtype="uint8", per="token")})
    weights = [np.zeros(length, np.uint8) for length in lengths]
    for number, said in enumerate(weights):
        said[answers[number] if answers else -1] = 1
    ids = np.concatenate([np.full(length, number + 1) for number, length in enumerate(lengths)])
    writer.add_documents(ids, np.array(lengths), {"weights": np.concatenate(weights)})
    writer.finish(Labels(name=prefix.name, kind="chat", num_answer_tokens=len(lengths), **LABELS))
    return open_binary(prefix)


def sft(name, length=16, batch=4, loss=None, **amounts):
    taken = {source: amount if isinstance(amount, dict) else {"epochs": amount} for source, amount in amounts.items()}
    return phase(name, None, length, batch, taken, loss={"kind": "answers"} | (loss or {}))


def opened(folder, phases, max_epochs=1, seed=1, validation_tokens=0, **lengths):
    """The resolved configuration, the order, and the binaries of dialogues of these lengths."""
    binaries = {name: chat(folder / name, sizes) for name, sizes in lengths.items()}
    there = feeder.facts(binaries)
    config = resolve(run_config(phases, 64, max_epochs, seed, validation_tokens), there)
    return config, DataOrder(config, there), binaries


def dialogues_of(config, order, phase, numbers=None):
    """(source, dialogue) of the samples of a phase, in order."""
    index = [one.name for one in config.phases].index(phase)
    first = num_steps(config.phases[:index])
    found = []
    for step in range(first, first + config.phases[index].num_steps):
        for name, packed in order.samples(step, range(config.phases[index].global_batch_size)):
            found += [(name, number) for number in packed]
    return found


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(40, 90), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_packs_hold_each_item_once_and_no_more_than_there_is_room_for(lengths, room, key):
    lengths = np.array(lengths)
    packs = pack(lengths, room, key)
    held = [packs[number] for number in range(len(packs))]
    assert sorted(item for items in held for item in items) == list(range(len(lengths)))
    sizes = [lengths[list(items)].sum() for items in held]
    assert max(sizes) <= room and min(sizes) > 0
    assert sum(sorted(sizes)[:2]) > room or len(sizes) == 1, "no two of them fit into one"
    again = pack(lengths, room, key)
    assert (again.items == packs.items).all() and (again.starts == packs.starts).all()


def test_real_lengths_fill_their_samples():
    lengths = np.clip(np.random.default_rng(1).lognormal(6, 0.9, 50_000).astype(int), 4, 4096)
    packs = pack(lengths, 4096, 1)
    assert lengths.sum() / (len(packs) * 4096) > 0.999
    other = pack(lengths, 4096, 2)
    assert {packs[n] for n in range(100)}.isdisjoint({other[n] for n in range(100)}), "another seed, other neighbours"


LENGTHS = {"a": [3 + n % 14 for n in range(50)], "b": [5] * 23}


def test_every_dialogue_is_trained_on_once_an_epoch(tmp_path):
    phases = [sft("one", a=0.5, b=1), sft("two", length=32, a=0.5), sft("three", a=1, b=1)]
    config, order, _ = opened(tmp_path, phases, max_epochs=2, **LENGTHS)
    by_phase = {name: dialogues_of(config, order, name) for name in ("one", "two", "three")}
    every = Counter(("a", n) for n in range(50)) + Counter(("b", n) for n in range(23))
    assert Counter(by_phase["one"] + by_phase["two"]) == every == Counter(by_phase["three"])
    assert by_phase["one"] + by_phase["two"] != by_phase["three"], "an order of its own for each epoch"
    for index, one in enumerate(config.phases):
        consumed = order.consumed(index, one.num_steps)
        assert consumed == {share.source: share.num_samples for share in order.shares[index]}, "and not what fills up the last batch"
        samples = sum(consumed.values())
        assert one.num_samples(one.num_steps) - one.global_batch_size < samples <= one.num_samples(one.num_steps)
    assert order.ledger(num_steps(config.phases)).phases[2].sources["a"].first_dialogue == 50


def test_epochs_follow_each_other_and_sources_are_mixed(tmp_path):
    config, order, _ = opened(tmp_path, [sft("p", a=3, b=1)], max_epochs=3, a=[15] * 500, b=[16] * 100)
    found = dialogues_of(config, order, "p")
    of_a = [number for name, number in found if name == "a"]
    assert all(len(set(of_a[first : first + 500])) > 450 for first in (0, 500, 1000)) and Counter(of_a) == Counter(list(range(500)) * 3)
    of_b = [place for place, (name, _) in enumerate(found) if name == "b"]
    assert np.diff(of_b).max() < 64


def test_an_amount_in_tokens_is_whole_dialogues(tmp_path):
    config, order, _ = opened(tmp_path, [sft("p", a={"tokens": 101}), sft("q", a={"tokens": 301})], **LENGTHS)
    taken = [sum(LENGTHS["a"][number] for _, number in dialogues_of(config, order, name)) for name in ("p", "q")]
    assert 101 - 17 < taken[0] <= 101 and 301 - 17 < taken[1] <= 301
    assert not set(dialogues_of(config, order, "p")) & set(dialogues_of(config, order, "q"))


def test_what_is_held_out_is_not_trained_on(tmp_path):
    config, order, binaries = opened(tmp_path, [sft("p", a=1)], validation_tokens=60, **LENGTHS)
    held_out = {number for _, packed in order.validation(config.phases[0]) for number in packed}
    trained = {number for _, number in dialogues_of(config, order, "p")}
    assert held_out and not held_out & trained and held_out | trained == set(range(50))
    assert sum(LENGTHS["a"][number] for number in held_out) >= 60


def test_long_dialogues_stop_are_cut_or_left_out(tmp_path):
    chat(tmp_path / "a", [30, 8, 30, 8], [5, 7, 25, 7])
    there = feeder.facts({"a": open_binary(tmp_path / "a")})

    def of(choice):
        config = resolve(run_config([sft("p", a=1, loss={"too_long": choice})]), there)
        order = DataOrder(config, there)
        return config, order, order.shares[0][0].taken

    with pytest.raises(
        UserError, match=r"phases.p.sources.a: 2 of its dialogues are longer than sequence_length \(16 tokens\), the longest has 30"
    ):
        of("stop")
    config, order, taken = of("cut")
    assert sorted(number for _, number in dialogues_of(config, order, "p")) == [0, 1, 3]
    assert (taken.count, taken.num_cut, taken.num_left_out) == (4, 1, 1)
    config, order, taken = of("drop")
    assert sorted(number for _, number in dialogues_of(config, order, "p")) == [1, 3]
    assert (taken.count, taken.num_cut, taken.num_left_out) == (4, 0, 2)


def test_a_packed_sample(tmp_path):
    """Dialogues side by side, their first tokens and what fills up without a weight."""
    config, order, binaries = opened(tmp_path, [sft("p", a=1, batch=1)], a=[6, 7])
    batch = feeder.micro_batch(order, binaries, order.samples(0, range(1)), config.phases[0])
    assert batch.tokens.tolist() == [[2] * 7 + [1] * 6 + [0] * 4]
    assert batch.documents.tolist() == [[0] * 7 + [1] * 6 + [2] * 3]
    assert np.flatnonzero(batch.weights).tolist() == [5, 11]  # that the last token of each is to be said behind the one before it


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        (
            [phase("p", 64, sources={"a": 1.0}, loss={"kind": "answers"})],
            r"source a has a weight \(1\): write how much of it, such as a: {epochs: 1}",
        ),
        ([sft("p", a=1) | {"batch_ramp": dict(start=1, increment=1, tokens=5)}], "batch_ramp means nothing in a phase of dialogues"),
        ([sft("p", a=2)], r"take more of it than the 50 dialogues × data.max_epochs \(1\)"),
        ([sft("p", a={"tokens": 10**6})], r"take more of it than the 50 dialogues × data.max_epochs \(1\)"),
        ([sft("p", a={"tokens": 1})], "none of the 0 dialogues that it asks for"),
        ([sft("p", a=1) | {"tokens": 64}], r"phases.p.tokens \(64\) is not what the packs of its dialogues take"),
        ([sft("p", a=0.5), phase("q", 64, sources={"a": 1.0})], "one phase takes whole dialogues of it and another one stretches"),
        ([phase("q", 64, sources={"a": 1.0}), sft("p", a=0.5)], "one phase takes whole dialogues of it and another one stretches"),
        ([sft("p", web=1)], "phases.p.sources.web: is of kind web, and loss.kind answers wants kind chat"),
        ([sft("p", a=1, loss={"mean": 1})], "unknown key phases.0.loss.answers.mean: did you mean mean_over"),
    ],
)
def test_mistakes_are_explained(tmp_path, phases, told):
    there = feeder.facts({"a": chat(tmp_path / "a", LENGTHS["a"])}) | sources(web=10_000)
    with pytest.raises(UserError, match=told):
        config = run_config(phases)
        DataOrder(resolve(config, there), there)
