"""The port at which the processes of a run meet is taken before they are started, and a run is done when its last checkpoint says so."""

import json
import socket
from pathlib import Path

import pytest

from megatron_jobs import launch
from megatron_jobs.checkpoints.checkpoint import Writer, box_key
from megatron_jobs.checkpoints.weights import InitialWeights
from megatron_jobs.config import RunConfig
from megatron_jobs.data import feeder, phases
from megatron_jobs.data.order import DataOrder
from megatron_jobs.launch import held_port
from megatron_jobs.stability import Guard
from mujina import strict_yaml
from mujina.matrices import Box
from mujina.user_input import UserError
from tests.conftest import tiny


def test_a_held_port_is_for_the_store_of_rank_0_alone():
    from torch.distributed import TCPStore

    with held_port() as port:
        with socket.socket() as another, pytest.raises(OSError, match="Address already in use"):
            another.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("met", "here")
        assert TCPStore("127.0.0.1", port, is_master=False).get("met") == b"here"


def saved(config: RunConfig, step: int, skipped: tuple[int, ...] = ()) -> Path:
    """A checkpoint of the run after `step`, with the weights that it begins with; some of its steps made no update."""
    sources = feeder.facts(feeder.open_sources(config))
    config, weights = phases.resolve(config, sources), InitialWeights(config.model, None, 1)
    writer = Writer(config.run / "checkpoints", step)
    writer.clear()
    boxes = {name: Box(0, rows, 0, columns) for name, (rows, columns) in weights.shapes.items()}
    writer.add_rank_file(0, {box_key("master", name, box): weights.read(name, box) for name, box in boxes.items()})
    guard = Guard(config.stability, [])
    guard.skipped = [{"step": one, "reason": "the loss is nan"} for one in skipped]
    ledger = DataOrder(config, sources).ledger(step).model_copy(update={"interventions": guard.to_ledger()})
    return writer.finish(config, step - len(skipped), weights.shapes, ledger)


class Started(Exception):
    """A process of the run would be started."""


@pytest.fixture
def run(prepared, tmp_path, monkeypatch):
    """A run of ten steps that are done; `start(overrides)` is the command."""
    config = tiny(prepared, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(strict_yaml.dump(config.model_dump(mode="json")))

    def started(*_: object) -> None:
        raise Started

    monkeypatch.setattr(launch, "_start", started)
    return config, lambda *overrides: launch.main(tmp_path / "run.yaml", list(overrides))


def test_all_steps_are_done_is_said_of_a_whole_checkpoint_of_this_run(run, capsys):
    config, start = run
    saved(config, 6)
    with pytest.raises(Started):
        start()
    last = saved(config, 10, skipped=(2,))
    start("parallel.tensor=1", "train.checkpoint_interval=100")  # what may change while a run goes on
    assert capsys.readouterr().out == f"{config.run}: all 10 steps are done\n"
    for override, told in (
        ("seed=2", "seed was 1 when this run began, and is 2 now"),
        ("model.ffn_hidden_size=96", "model.ffn_hidden_size was 64 when this run began, and is 96 now"),
        (f"phases={json.dumps([config.phases[0].model_dump(mode='json')])}", "phase chat has begun and may not change any more"),
    ):
        with pytest.raises(UserError, match=told):
            start(override)
    [weights] = last.glob("*.safetensors")
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(Started):  # from step 6 on
            start()
        assert f"passing over a damaged checkpoint: {weights}" in capsys.readouterr().out


def test_a_run_without_an_update_is_not_called_done(run):
    config, start = run
    saved(config, 10, skipped=tuple(range(1, 11)))
    with pytest.raises(UserError, match="all 10 steps are done, and none has updated the weights"):
        start()


def test_a_run_whose_last_phase_forgot_its_updates_is_done(run, capsys):
    """`optimizer: reset` counts updates from there, and all steps of that phase may have been skipped."""
    config, start = run
    saved(config, 10, skipped=(7, 8, 9, 10))
    start()
    assert capsys.readouterr().out == f"{config.run}: all 10 steps are done\n"
