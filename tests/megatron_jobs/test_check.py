"""Whatever ranks would refuse is refused before one of them starts (`test_random_configurations.py`: what is accepted is trained)."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_jobs.check import check
from megatron_jobs.checkpoints.checkpoint import write_weights
from megatron_jobs.checkpoints.weights import InitialWeights
from megatron_jobs.data.ledger import Ledger
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_launch import saved


def told(message: str | None) -> contextlib.AbstractContextManager[Any]:
    """Around what is refused with a message; None: what is let in."""
    return contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message)


@pytest.fixture(scope="module")
def models(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints without moments: of the dense model of `tiny`, and of a mixture of it."""
    folders = {}
    for name, moe in (("dense", None), ("mixture", MOE)):
        folder = tmp_path_factory.mktemp(name)
        config = tiny(prepared, folder / "run", moe=moe)
        weights = InitialWeights(config.model, config.moe, 1)
        folders[name] = str(write_weights(folder, config, weights, weights.shapes, Ledger(), "writing"))
    return folders


@pytest.mark.parametrize(
    ("model", "section", "message"),
    [
        ("dense", dict(), None),
        ("mixture", dict(moe=MOE), None),
        ("dense", dict(model=dict(num_layers=2)), r"model.num_layers \(2\) must be that of train.init_from \(.*\): write num_layers: 4"),
        ("dense", dict(moe=MOE), r"train.init_from \(.*\): is a dense model, and a mixture is needed"),
        ("mixture", dict(moe=MOE | dict(scores="sigmoid")), r"moe.scores \(sigmoid\) must be that of train.init_from"),
        ("nowhere", dict(), r"train.init_from \(nowhere\): no such folder"),
    ],
)
def test_a_model_to_start_from(prepared, tmp_path, models, model, section, message):
    config = tiny(prepared, tmp_path, train=dict(init_from=models.get(model, model)), **section)
    with told(message):
        check(config, 2)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("dense", dict(), None),
        ("dense", dict(qkv_bias=True), r"model.qkv_bias \(True\) must be that of moe.upcycle_from \(.*\): write qkv_bias: False"),
        ("mixture", dict(), r"moe.upcycle_from \(.*\): is a mixture, and a dense model is needed"),
        ("nowhere@web", dict(), r"moe.upcycle_from \(nowhere@web\): no such folder"),
    ],
)
def test_a_model_to_upcycle(prepared, tmp_path, models, model, more, message):
    config = tiny(prepared, tmp_path, model=more, moe=MOE | dict(upcycle_from=models.get(model, model)))
    with told(message):
        check(config, 2)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(), None),
        (dict(train=dict(init_from="gone meanwhile")), None),
        (dict(seed=2), r"seed was 1 when this run began, and is 2 now"),
        (dict(model=dict(qk_norm=True)), r"model.qk_norm was False when this run began"),
    ],
)
def test_a_run_that_goes_on(prepared, tmp_path, section, message):
    saved(tiny(prepared, tmp_path), 6)
    if message is None:
        check(tiny(prepared, tmp_path, **section), 2)
    else:
        with pytest.raises(UserError, match=message):
            check(tiny(prepared, tmp_path, **section), 2)


def test_a_phase_that_has_begun_and_data_that_were_consumed(prepared, tmp_path):
    config = tiny(prepared, tmp_path)
    saved(config, 3)
    web, chat = config.model_dump(mode="json")["phases"]
    check(tiny(prepared, tmp_path, phases=[web, chat | {"global_batch_size": 8}]), 2)
    with pytest.raises(UserError, match="phases: phase web has begun and may not change any more"):
        check(tiny(prepared, tmp_path, phases=[web | {"separate_documents": True}, chat]), 2)


def test_checkpoints_none_of_which_is_whole(prepared, tmp_path):
    """One that is damaged is passed over, as by the ranks."""
    config = tiny(prepared, tmp_path)
    older, newer = saved(config, 3), saved(config, 6)
    (newer / "checkpoint.json").unlink()
    check(config, 2)
    next(older.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(UserError, match=r"none of its 2 checkpoints is whole \(0 were rolled back\)"):
        check(config, 2)


def test_wandb_that_is_not_installed(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb: the package is not installed here"):
        check(tiny(prepared, tmp_path, wandb=dict(project="x")), 2)
