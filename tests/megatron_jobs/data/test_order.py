"""The data order: every token at most once an epoch, the same at every layout, and smooth in its mix."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_jobs.config import from_dict
from megatron_jobs.data.order import WINDOW, DataOrder, permute
from megatron_jobs.data.phases import Source, consumed_tokens, num_steps, resolve
from mujina.user_input import UserError


def run_config(phases, block_length=64, max_epochs=1, seed=1, validation_tokens=0):
    return from_dict(
        {
            "run": "runs/x",
            "tokenizer": "x",
            "seed": seed,
            "model": dict(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1, vocab_size=128),
            "data": dict(folder="x", block_length=block_length, max_epochs=max_epochs, validation_tokens=validation_tokens),
            "train": dict(micro_batch_size=1),
            "phases": phases,
        },
        "test",
    )


def phase(name, tokens, length=16, batch=4, sources=None, **more):
    rate = dict(start=1e-3, end=1e-4)
    return dict(name=name, tokens=tokens, sequence_length=length, global_batch_size=batch, sources=sources, learning_rate=rate, **more)


def sources(**sizes):
    return {name: Source(name, size, "web", "human", "") for name, size in sizes.items()}


@given(size=st.integers(1, 3000), key=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_depends_on_the_key_and_spreads():
    first, second = (permute(np.arange(10_000), 10_000, key) for key in ("a", "b"))
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(np.arange(10_000), first)[0, 1]) < 0.05
    huge = permute(np.arange(1000), 10**12, "a")
    assert len(set(huge)) == 1000 and 0 <= huge.min() and huge.max() < 10**12


@given(
    st.lists(
        st.tuples(
            st.sampled_from([8, 16, 32, 64]),
            st.integers(1, 6),
            st.integers(1, 40),
            st.floats(0.05, 1.0),
            st.floats(0.05, 1.0),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_no_token_is_used_twice_within_an_epoch(shapes, seed):
    """Counts every token of every sample over random lists of phases with changing sequence lengths, batch sizes and sources."""
    phases = [
        phase(str(n), length * batch * steps, length, batch, {"a": one, **({"b": other} if both else {})})
        for n, (length, batch, steps, one, other, both) in enumerate(shapes)
    ]
    total = sum(p["tokens"] for p in phases) + 64 * len(phases) + 1
    config = run_config(phases, seed=seed)
    order = DataOrder(config, sources(a=total, b=total))
    used = {"a": np.zeros(total, int), "b": np.zeros(total, int)}
    step = 0
    for p in config.phases:
        for _ in range(p.num_steps):
            for name, offset in order.samples(step, range(p.global_batch_size)):
                used[name][offset : offset + p.sequence_length] += 1
            step += 1
    assert max(counts.max() for counts in used.values()) == 1
    assert sum(counts.sum() for counts in used.values()) == order.ledger(step).tokens == sum(p["tokens"] for p in phases)
    for row in order.ledger(step).phases:
        assert sum(source.tokens for source in row.sources.values()) == row.tokens


@st.composite
def plans(draw):
    """A configuration over sources a, b and c: weights, tokens and epochs mixed, ramps, validation, up to two epochs; and its sources."""
    phases = []
    shapes = draw(st.lists(st.tuples(st.sampled_from([8, 16, 32, 64]), st.integers(2, 6), st.integers(4, 40)), min_size=1, max_size=4))
    total = sum(length * batch * steps for length, batch, steps in shapes)
    size = int(total * draw(st.floats(0.6, 1.5))) + 512
    for n, (length, batch, steps) in enumerate(shapes):
        tokens = length * batch * steps
        kinds = draw(st.dictionaries(st.sampled_from("abc"), st.sampled_from(["weight", "tokens", "epochs"]), min_size=1))
        amounts = {
            "weight": lambda: draw(st.floats(0.05, 1.0)),
            "tokens": lambda most=tokens: {"tokens": draw(st.integers(most // 8, most * 4 // 10))},
            "epochs": lambda most=tokens: {"epochs": draw(st.floats(0.1, 0.4)) * most / size},
        }
        ramp = dict(start=batch - 1, increment=1, tokens=draw(st.integers(1, tokens // 3))) if draw(st.booleans()) else None
        mix = {name: amounts[kind]() for name, kind in kinds.items()}
        budget = tokens if "weight" in kinds.values() else None
        phases.append(phase(str(n), budget, length, batch, mix, batch_ramp=ramp))
    there = sources(a=size, b=size + 7, c=size + 64)
    try:
        config = resolve(run_config(phases, 64, 2, draw(st.integers(0, 5)), draw(st.sampled_from([0, 1, 100, 300]))), there)
        return config, there, DataOrder(config, there)
    except UserError as error:  # amounts that do not make a sample or a step, or one source more than twice
        assert any(rule in str(error) for rule in ("at least one s", "leave nothing", "take")), error
        assume(False)


@given(plans(), st.integers(0, 10**6), st.sampled_from([1, 2, 3]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_any_plan_keeps_the_promises(plan, draw, ranks):
    """Every token at most once in each epoch that was begun, no held-out one ever, the ledger equal to the count; restarts, ranks."""
    config, there, order = plan
    held = {name: np.zeros(source.num_tokens + 1, bool) for name, source in there.items()}
    for name in order.names:
        for offset in order.held_out(name, 16):
            held[name][offset : offset + 16] = True
        same = np.add.outer(order.held_out(name, 64), np.arange(64))
        assert held[name].sum() == -(-config.data.validation_tokens // 64) * 64 and held[name][same].all()
    used = {name: np.zeros(source.num_tokens + 1, int) for name, source in there.items()}
    epochs, asked, step = Counter(), Counter(), 0
    restart = draw % num_steps(config.phases)
    for index, p in enumerate(config.phases):
        for share in order.shares[index]:
            blocks = (there[share.source].num_tokens - 1) // 64 - -(-config.data.validation_tokens // 64)
            epochs[share.source] = -(-(share.first_block + share.num_blocks) // blocks)
            asked[share.source] += share.num_samples * p.sequence_length
        for step_in_phase in range(p.num_steps):
            size = p.batch_size(step_in_phase)
            batch = order.samples(step, range(size))
            if step == restart:
                again = DataOrder(config, there)
                parts = [again.samples(step, range(size)[rank::ranks]) for rank in range(min(ranks, size))]
                assert [parts[number % ranks][number // ranks] for number in range(size)] == batch
                tokens = Counter({name: int(counts.sum()) for name, counts in used.items()})
                rows = again.ledger(step).phases
                assert +tokens == +sum((Counter({n: s.tokens for n, s in row.sources.items()}) for row in rows), Counter())
                assert sum(row.tokens for row in rows) == consumed_tokens(config.phases, step) == tokens.total()
            for name, offset in batch:
                used[name][offset : offset + p.sequence_length] += 1
            step += 1
        assert all(used[name].max() <= epochs[name] <= 2 for name in epochs)
    assert {name: used[name].sum() for name in asked} == asked
    for name, counts in used.items():
        assert not counts[held[name]].any()


def test_what_is_held_out_follows_from_seed_and_source_alone():
    there = sources(a=10_000, b=10_000)
    one = DataOrder(run_config([phase("p", 640, sources={"a": 1.0})], validation_tokens=1000), there)
    other = DataOrder(run_config([phase("q", 6400, 64, 2, sources={"a": 1.0, "b": 2.0})], validation_tokens=1000), there)
    assert one.held_out("a", 16).tolist() == other.held_out("a", 16).tolist()
    assert len(one.held_out("a", 64)) == 16  # 1,000 tokens in whole blocks of 64
    assert set(other.held_out("a", 64)) != set(other.held_out("b", 64))
    elsewhere = DataOrder(run_config([phase("p", 640, sources={"a": 1.0})], seed=2, validation_tokens=1000), there)
    assert set(one.held_out("a", 64)) != set(elsewhere.held_out("a", 64))


def test_a_source_too_small_to_hold_out_of_is_refused():
    with pytest.raises(UserError, match=r"data.validation_tokens \(961\): source a holds 1,024 tokens, so that nothing is left"):
        DataOrder(run_config([phase("p", 64, sources={"a": 1.0})], validation_tokens=961), sources(a=1024))


def test_epochs_are_whole_and_differ():
    """With two epochs allowed, the first pass uses every block once before the second begins, in another order."""
    order = DataOrder(run_config([phase("p", 2 * 1024, 64, 1, {"a": 1.0})], max_epochs=2), sources(a=1025))
    counts = Counter(offset for step in range(32) for _, offset in order.samples(step, [0]))
    assert set(counts.values()) == {2} and len(counts) == 16


def test_ledger_counts_what_the_steps_used():
    config = run_config([phase("p", 64 * 500, 16, 4, {"a": 0.7, "b": 0.3}), phase("q", 64 * 10, 16, 4, {"b": 1.0})])
    order = DataOrder(config, sources(a=10**5, b=10**5))
    seen = Counter()
    for step in range(num_steps(config.phases)):
        seen.update(name for name, _ in order.samples(step, range(4)))
        in_ledger = Counter()
        for row in order.ledger(step + 1).phases:
            in_ledger.update({name: source.samples for name, source in row.sources.items()})
        assert +in_ledger == seen


def test_mix_is_exact_in_every_window():
    config = run_config([phase("p", 16 * 10_000, 16, 100, {"a": 0.9, "b": 0.1})])
    order = DataOrder(config, sources(a=10**6, b=10**6))
    names = [name for step in range(100) for name, _ in order.samples(step, range(100))]
    windows = -(-10_000 // WINDOW)
    assert [names[n * 10_000 // windows : (n + 1) * 10_000 // windows].count("b") for n in range(windows)] == [100] * windows


def test_a_later_phase_does_not_change_an_earlier_one():
    first = phase("first", 64 * 20, sources={"a": 0.5, "b": 0.5})
    one = DataOrder(run_config([first, phase("last", 64 * 10, sources={"b": 1.0})]), sources(a=10**5, b=10**5))
    other = DataOrder(run_config([first, phase("other", 64 * 30, 32, 2, sources={"a": 1.0, "b": 2.0})]), sources(a=10**5, b=10**5))
    assert [one.samples(step, range(4)) for step in range(20)] == [other.samples(step, range(4)) for step in range(20)]


def test_start_is_independent_of_the_corpus():
    """1.7 trillion tokens in 2,000 sources: the first batch is there at once."""
    names = {f"s{n}": 1.0 + n for n in range(2000)}
    config = run_config([phase("p", 1_700_000_000_000, 4096, 1024, names)], block_length=4096)
    many = {name: Source(name, 2_000_000_000, "web", "human", "") for name in names}
    began = time.process_time()
    order = DataOrder(config, many)
    assert len(set(order.samples(0, range(1024)))) == 1024
    assert time.process_time() - began < 10  # seconds; hours with an index


def test_a_source_that_was_consumed_must_stay_as_it_was():
    config = run_config([phase("p", 64 * 4, sources={"a": 1.0}), phase("q", 64 * 4, sources={"b": 1.0})])
    order = DataOrder(config, sources(a=1000, b=1000))
    changed = sources(a=1000, b=1000) | {"b": Source("b", 1000, "web", "human", "another")}
    DataOrder(config, changed).check_continues(order.ledger(4))  # b has not been touched
    with pytest.raises(UserError, match="source b is not the one that phase q has consumed 64 tokens of"):
        DataOrder(config, changed).check_continues(order.ledger(5))


@pytest.mark.parametrize(
    "phases, message",
    [
        ([phase("p", 64 * 100, sources={"a": 1.0})], "phases.p.sources.a: the phases up to this one take"),
        ([phase("p", 64, sources={"aa": 1.0})], "phases.p.sources.aa: no such source in data.folder: did you mean a?"),
        (
            [phase("p", 64, sources={"a": 1.0}, admit=dict(kinds=["chat"]))],
            "phases.p admits only sources of kind chat, and a is of kind web",
        ),
        ([phase("p", 64, sources={"a": 1.0}, admit=dict(origins=["synthetic"]))], "admits only sources of origin synthetic"),
        ([phase("p", 63, sources={"a": 1.0})], "phase p: tokens (63) must hold at least one step of 64 tokens"),
        ([phase("p", 96, length=24, sources={"a": 1.0})], "phases.p.sequence_length (24) must divide data.block_length (64)"),
    ],
)
def test_impossible_phases_are_refused(phases, message):
    with pytest.raises(UserError) as error:
        DataOrder(run_config(phases), sources(a=1000))
    assert message in str(error.value)


def test_a_phase_admits_a_source_only_when_all_its_licences_are_admitted():
    mixed = {"a": Source("a", 1000, "web", "human", "sum", languages=("ja",), licences=("MIT", "GPL-2.0"), teachers=("large",))}

    def order(**admit):
        DataOrder(run_config([phase("p", 64, sources={"a": 1.0}, admit=admit)]), mixed)

    order(languages=["ja", "en"], licences=["GPL-2.0", "MIT"], teachers=["large"])
    with pytest.raises(UserError, match="licence MIT, and a is of licence MIT, GPL-2.0"):
        order(licences=["MIT"])
    with pytest.raises(UserError, match="teacher small, and a is of teacher large"):
        order(teachers=["small"])


def test_the_order_is_pinned():
    """The order of existing runs must never change: their checkpoints hold no copy of it."""
    order = DataOrder(run_config([phase("p", 64 * 5, sources={"a": 0.5, "b": 0.5})], seed=7), sources(a=1000, b=1000))
    assert order.samples(0, range(4)) == PINNED


PINNED = [("a", 656), ("a", 640), ("b", 368), ("b", 16)]
