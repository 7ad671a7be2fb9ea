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
from megatron_jobs.planning import layers, plan
from megatron_jobs.planning.layers import Layers
from mujina import sbatch, strict_yaml
from mujina.user_input import UserError
from slurm import submit
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


SEPARATED = dict(name="web", tokens=3 * 8 * 32, sequence_length=32, global_batch_size=8, sources={"web": 1.0}, separate_documents=True)
SEPARATED |= dict(learning_rate=dict(start=1e-2, end=1e-3))


@pytest.mark.parametrize(
    ("sections", "of_ranks", "message"),
    [
        (dict(train=dict(precision="fp8")), Layers(True, fp8=True), None),
        (dict(train=dict(precision="fp8")), Layers(True, fp8=False), r"train.precision \(fp8\) needs Transformer Engine on a GPU that"),
        (dict(train=dict(precision="fp8")), Layers(None, fp8=False), r"train.precision \(fp8\) needs Transformer Engine"),
        (dict(train=dict(precision="fp8")), None, r"train.precision \(fp8\) needs Transformer Engine"),
        (dict(phases=[SEPARATED], parallel=dict(context=2)), Layers(True), r"parallel.context \(2\) must be 1 where phases.web separates"),
        (dict(phases=[SEPARATED], parallel=dict(context=2)), None, None),
        (dict(phases=[SEPARATED]), Layers(True), None),
        (
            dict(moe=MOE, adapter=dict(rank=2, alpha=4, matrices=["experts.gate"])),
            Layers(True),
            r"adapter.matrices \(experts.gate\): Transformer",
        ),
    ],
)
def test_what_the_layers_of_the_ranks_cannot_do(prepared, tmp_path, monkeypatch, capsys, models, sections, of_ranks, message):
    """None: they are the local ones, as on this machine."""
    monkeypatch.setattr(layers, "has_transformer_engine", lambda: False)
    if "adapter" in sections:
        sections = sections | dict(train=dict(init_from=models["mixture"]))
    config = tiny(prepared, tmp_path, **sections)
    with told(message):
        check(config, 2, of_ranks)
    assert not capsys.readouterr().out


def test_what_is_not_known_of_the_ranks_layers_is_told(prepared, tmp_path, capsys):
    """By `submit` where their Python is another one, and by `plan`."""
    check(tiny(prepared, tmp_path, train=dict(precision="fp8")), 2, Layers(None))
    assert "train.precision (fp8) needs Transformer Engine" in capsys.readouterr().out
    config = tiny(prepared, tmp_path, train=dict(precision="fp8"), phases=[SEPARATED], parallel=dict(context=2))
    (tmp_path / "run.yaml").write_text(strict_yaml.dump(config.model_dump(mode="json")))
    plan.main(tmp_path / "run.yaml", tokens_per_day=None)
    shown = capsys.readouterr().out
    assert "(fp8) needs Transformer Engine" in shown and "parallel.context (2) must be 1" in shown
    assert shown.count("whether they have it is not known here") == 2
    with pytest.raises(UserError, match="computes in fp8"):
        plan.main(tmp_path / "run.yaml", gpus=2, gpu="a100", gpus_per_node=8, stack="transformer-engine", tokens_per_day=None)


@pytest.mark.parametrize(
    ("site", "elsewhere"),
    [
        ("", False),
        ("export SBATCH_PARTITION=gpu", False),
        ("export MUJINA_TASK_PYTHON='apptainer exec mujina.sif python3'", True),
        ("export MUJINA_SRUN_OPTIONS='--container-image=/images/mujina.sqsh'", True),
        ("export MUJINA_PYTHON=/nowhere/python", True),
    ],
)
def test_what_a_site_runs_its_tasks_with(tmp_path, monkeypatch, site, elsewhere):
    (tmp_path / "cluster.env").write_text(site + "\n")
    monkeypatch.setenv("MUJINA_CLUSTER_ENV", str(tmp_path / "cluster.env"))
    for name in ("MUJINA_PYTHON", "MUJINA_TASK_PYTHON", "MUJINA_SRUN_OPTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(layers, "is_installed", lambda: True)
    assert sbatch.is_elsewhere() == elsewhere
    assert submit._layers("h100") == Layers(None if elsewhere else True, fp8=True) and not submit._layers("a100").fp8
