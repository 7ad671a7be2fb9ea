"""What a phase may ask for beside its mix, in real runs: a batch ramp, separated documents, an auxiliary loss, amounts, a late decay."""

import json
from pathlib import Path

import pytest

from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.config import RunConfig
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_train import losses, plain_model, train_here
from tests.ranks import run_ranks

WEB = dict(
    name="web",
    tokens=(4 + 2 * 8) * 4 * 32,
    sequence_length=32,
    global_batch_size=8,
    batch_ramp=dict(start=4, increment=4, tokens=4 * 4 * 32),
    sources={"web": 1.0, "code": dict(tokens=640)},
    learning_rate=dict(start=1e-2, end=1e-3, shape="1-sqrt", decay_steps=3),
    loss=dict(kind="next_token", z_loss=1e-3),
)
CHAT = dict(
    name="chat",
    tokens=4 * 4 * 64,
    sequence_length=64,
    global_batch_size=4,
    sources={"chat": 1.0},
    learning_rate=dict(start=5e-3, end=1e-3),
    separate_documents=True,
)
LAYOUTS = [(2, dict()), (2, dict(tensor=2)), (2, dict(pipeline=2)), (2, dict(context=2))]


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone")
    run_ranks(1, train_here, tiny(prepared, run, phases=[WEB, CHAT]))
    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_follows_one_process(prepared, tmp_path, alone, layout):
    world, parallel = layout
    run_ranks(world, train_here, tiny(prepared, tmp_path, phases=[WEB, CHAT], parallel=parallel))
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-4)


def test_the_ramp_and_the_amounts_are_in_the_records(alone):
    records = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    web = [record for record in records if record["phase"] == "web"]
    tokens = [sum(record["tokens_by_source"].values()) for record in web]
    assert tokens == [128] * 4 + [256] * 8
    assert sum(record["tokens_by_source"].get("code", 0) for record in web) == 640
    rates = [record["lr"] for record in web]
    assert rates[:9] == pytest.approx([1e-2] * 9) and rates[9] > rates[10] > rates[11] == pytest.approx(1e-3)
    ledger = Checkpoint(alone / "checkpoints/latest").ledger
    assert [phase.tokens for phase in ledger.phases] == [sum(tokens), 4 * 4 * 64]


def test_separated_documents_are_another_loss(prepared, tmp_path, alone):
    """The same first phase, and from the first step of the second on less context."""
    run_ranks(1, train_here, tiny(prepared, tmp_path, phases=[WEB, CHAT | dict(separate_documents=False)]))
    joined, separated = losses(tmp_path), losses(alone)
    assert joined[:12] == separated[:12]
    assert all(abs(a - b) > 1e-4 for a, b in zip(joined[12:], separated[12:], strict=True))


def resetting(prepared: Path, run: Path, optimizer: str) -> RunConfig:
    web, chat = tiny(prepared, run).model_dump(mode="json")["phases"]
    return tiny(prepared, run, phases=[web, chat | {"optimizer": optimizer}])


def plain_loop_with_a_reset(config: RunConfig) -> list[float]:
    import torch

    llama, adamw, steps = plain_model(config)
    result = []
    for step, (tokens, _) in enumerate(steps):
        if step == config.phases[0].num_steps:
            adamw.state.clear()
        loss = torch.nn.functional.cross_entropy(llama(tokens[:, :-1]).logits.transpose(1, 2), tokens[:, 1:])
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), config.optimizer.clip_grad)
        adamw.step()
        result.append(float(loss.detach()))
    return result


def test_a_phase_may_begin_without_the_moments(prepared, tmp_path):
    """As a loop that forgets AdamW's state there; a restart at that place, and behind it, changes nothing."""
    expected = run_ranks(1, plain_loop_with_a_reset, resetting(prepared, tmp_path / "plain", "reset"))[0]
    run_ranks(2, train_here, resetting(prepared, tmp_path / "reset", "reset"))
    run_ranks(1, train_here, resetting(prepared, tmp_path / "keep", "keep"))
    assert losses(tmp_path / "reset") == pytest.approx(expected, rel=1e-4)
    assert losses(tmp_path / "keep")[:7] == pytest.approx(expected[:7], rel=1e-4)
    assert losses(tmp_path / "keep")[7:] != pytest.approx(expected[7:], rel=1e-3)
    assert Checkpoint(tmp_path / "reset/checkpoints/latest").updates == 4
    for last_step in (6, 8, None):
        run_ranks(2, train_here, resetting(prepared, tmp_path / "again", "reset"), last_step)
    assert losses(tmp_path / "again") == losses(tmp_path / "reset")


@pytest.mark.parametrize(
    ("moe", "later"),
    [
        (dict(load_balancing_loss=0.5, router_z_loss=0.1), dict(load_balancing_loss=0.0, router_z_loss=0.0)),
        (dict(scores="sigmoid", balancing="bias", bias_update_rate=0.05), dict(bias_update_rate=0.0, router_z_loss=0.1)),
    ],
    ids=["losses", "bias"],
)
def test_how_routers_are_trained_may_change_from_a_phase_on(prepared, tmp_path, moe, later):
    """By the phase's own section, or by the run's at a restart: the same to the last bit, and not what it is without the change."""
    web, chat = ({**phase, "separate_documents": False} for phase in (WEB, CHAT))

    def run(name: str, last: dict | None = None, **changed: object) -> RunConfig:
        return tiny(prepared, tmp_path / name, moe=MOE | moe | changed, phases=[web, {**chat, "moe": last or {}}])

    run_ranks(2, train_here, run("by phase", later))
    run_ranks(2, train_here, run("unchanged"))
    run_ranks(2, train_here, run("restarted"), 12)
    run_ranks(2, train_here, run("restarted", dispatcher="allgather", **later))
    by_phase, unchanged, restarted = (losses(tmp_path / name) for name in ("by phase", "unchanged", "restarted"))
    assert by_phase[:13] == unchanged[:13] and by_phase[13:] != unchanged[13:]
    assert restarted == pytest.approx(by_phase, rel=1e-6)
