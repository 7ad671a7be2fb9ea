"""Upcycling of a real dense model, both ways in, from a checkpoint and from a Hugging Face folder."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.config import RunConfig
from megatron_jobs.conversion import agreement, convert, upcycle
from megatron_jobs.conversion.hugging_face import HuggingFaceFolder
from megatron_jobs.engine import groups
from megatron_jobs.engine.state import TrainingState
from mujina.matrices import Box
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks

NARROW = dict(num_experts=8, top_k=4, ffn_hidden_size=32)
MIXTURES = {
    "copy": MOE,
    "three of eight": dict(num_experts=8, top_k=3),
    "granular": NARROW | dict(upcycling=dict(operator="granular")),
    "shared, every 2nd": MOE | dict(shared_ffn_hidden_size=48, every=2),
    "noise": MOE | dict(upcycling=dict(operator="noise")),
    "drop": MOE | dict(upcycling=dict(operator="drop")),
    "drop, independent": MOE | dict(upcycling=dict(operator="drop", independent=True)),
    "cube root": NARROW | dict(upcycling=dict(operator="granular", scaling="cube_root")),
    "balance noise": NARROW | dict(upcycling=dict(operator="granular", router="balance_noise")),
}
EXACT = ("copy", "three of eight", "granular", "shared, every 2nd")


@pytest.fixture(scope="module")
def dense(prepared, tmp_path_factory):
    """{"checkpoint": …, "folder": …}: one model as both."""
    run = tmp_path_factory.mktemp("dense")
    run_ranks(1, train_here, tiny(prepared, run))
    run_ranks(1, convert.main, run / "checkpoints/latest", run / "hf", True)
    return {"checkpoint": run / "checkpoints/latest", "folder": run / "hf"}


def written(config: RunConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@pytest.fixture(scope="module")
def starts(prepared, dense, tmp_path_factory):
    """What the command makes of the folder for each of MIXTURES."""
    folder = tmp_path_factory.mktemp("starts")
    for name, moe in MIXTURES.items():
        (folder / name).mkdir()
        written(tiny(prepared, folder / name / "run", moe=moe), folder / name / "moe.yaml")
    run_ranks(1, upcycle_all, folder, dense["folder"])
    return folder


def upcycle_all(folder: Path, dense: Path) -> None:
    for name in MIXTURES:
        upcycle.main(folder / name / "moe.yaml", dense, folder / name)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_gate_holds_the_operators_that_keep_the_function(starts, name):
    agreement = json.loads((starts / name / "agreement.json").read_text())
    print(f"{name}: {agreement['max_relative_error']:.1e}, loss {agreement['loss_before']:.4f} → {agreement['loss_after']:.4f}")
    if name in EXACT:
        assert agreement["max_relative_error"] <= agreement["bound"] == 1e-5
    else:
        assert agreement["max_relative_error"] > 1e-4 and agreement["bound"] is None


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "expert"])
def test_each_rank_fills_its_part_with_what_the_command_writes(prepared, dense, starts, tmp_path, layout):
    """Every operator at start, straight from the dense model: each value is that of the offline way, and the ranks have all of them."""
    configs = {
        name: tiny(prepared, tmp_path, moe=moe | dict(upcycle_from=str(dense["folder"])), parallel={layout: 2})
        for name, moe in MIXTURES.items()
    }
    values = [sum(counts) for counts in zip(*run_ranks(2, values_that_agree, configs, starts), strict=True)]
    assert values == [sum(rows * columns for rows, columns in Checkpoint(starts / name / "latest").shapes.values()) for name in MIXTURES]


def values_that_agree(configs: dict[str, RunConfig], starts: Path) -> list[int]:
    """By mixture, the number of values that this rank owns."""
    counts = []
    with groups.of_run(next(iter(configs.values())).parallel, seed=1):
        for name, config in configs.items():
            offline = Checkpoint(starts / name / "latest")
            state = TrainingState(config)
            state.start_from(upcycle.Mixture(config, config.moe.upcycle_from, "moe.upcycle_from"))
            owned = 0
            for key, values in state.boxes().items():
                kind, matrix, row, column = key.split("/")
                if kind == "master":
                    box = Box(int(row), int(row) + values.shape[0], int(column), int(column) + values.shape[1])
                    assert offline.read(matrix, box).equal(values), (name, key)
                    owned += values.numel()
            counts.append(owned)
    return counts


def test_upcycling_begins_where_the_dense_model_stands(prepared, dense, tmp_path):
    """Step-0 logits within 1e-5, and the first loss of the mixture's training, with two processes, is the dense model's."""
    for name, moe in (("small", MOE), ("large", dict(num_experts=8, top_k=3))):
        start = tmp_path / f"{name}-start"
        run = tiny(prepared, tmp_path / name, moe=moe, parallel=dict(expert=2), train=dict(init_from=str(start / "latest")))
        run_ranks(1, upcycle.main, written(run, tmp_path / "moe.yaml"), dense["checkpoint"], start)
        agreement = json.loads((start / "agreement.json").read_text())
        assert agreement["max_relative_error"] <= 1e-5
        run_ranks(2, train_here, run)
        first = losses(tmp_path / name)
        assert first[0] == pytest.approx(agreement["loss_before"], rel=1e-5)
        assert first[-1] < first[6]
        loads = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["expert_load"]
        assert len(loads) == 4 and all(len(row) == moe["num_experts"] and sum(row) == pytest.approx(1) for row in loads)


def test_both_ways_in_train_alike(prepared, dense, tmp_path):
    """The same losses to the last bit, and ledgers that say where the weights come from, also after the run has gone on."""
    moe = MOE | dict(upcycling=dict(operator="drop"), shared_ffn_hidden_size=16)
    layout = dict(expert=2)
    offline = tiny(prepared, tmp_path / "offline", moe=moe, parallel=layout, train=dict(init_from=str(tmp_path / "start/latest")))
    run_ranks(1, upcycle.main, written(offline, tmp_path / "moe.yaml"), dense["checkpoint"], tmp_path / "start")
    at_start = tiny(prepared, tmp_path / "at_start", moe=moe | dict(upcycle_from=str(dense["checkpoint"])), parallel=layout)
    for run in (offline, at_start.model_copy(update={"phases": at_start.phases[:1]}), at_start):
        run_ranks(2, train_here, run)
    assert losses(tmp_path / "offline") == losses(tmp_path / "at_start")
    ledgers = [Checkpoint(run.run / "checkpoints/latest").ledger for run in (offline, at_start)]
    assert ledgers[0] == ledgers[1]
    assert ledgers[0].origin.of[0]["files"] == Checkpoint(dense["checkpoint"]).files


def test_a_hugging_face_folder_becomes_a_hugging_face_mixture(prepared, dense, starts, tmp_path, capsys):
    for name in ("copy", "drop"):
        output = tmp_path / name
        run_ranks(1, upcycle.main, starts / name / "moe.yaml", dense["folder"], output, True)
        mixture, offline = HuggingFaceFolder(output), Checkpoint(starts / name / "latest")
        for matrix, (rows, columns) in offline.shapes.items():
            rows = offline.config.model.vocab_size if matrix in ("embedding", "output") else rows
            box = Box(0, rows, 0, columns)
            assert mixture.read(matrix, box).equal(offline.read(matrix, box)), matrix
        record = json.loads((output / convert.RECORD).read_text())
        assert record["agreement"]["max_relative_error"] <= 1e-4
        assert record["upcycling"] == json.loads((starts / name / "agreement.json").read_text())
        capsys.readouterr()
        upcycle.main(starts / name / "moe.yaml", dense["folder"], output, True)
        assert "is there already" in capsys.readouterr().out
    tokens = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(1))
    models = [AutoModelForCausalLM.from_pretrained(folder, local_files_only=True) for folder in (dense["folder"], tmp_path / "copy")]
    assert type(models[1]).__name__ == "MixtralForCausalLM" and len(load_file(tmp_path / "copy/model.safetensors")) == 4 * (7 + 12) + 3
    before, after = (model(tokens).logits for model in models)
    assert (before - after).abs().max() < 1e-5 * before.abs().max()


def test_what_is_there_is_left_alone_unless_it_is_another(prepared, dense, starts, tmp_path, capsys):
    for overrides in (dict(), dict(), dict(seed=2), dict(seed=2, moe=MOE | dict(upcycling=dict(operator="noise")))):
        config = written(tiny(prepared, tmp_path, **(dict(moe=MOE) | overrides)), tmp_path / "moe.yaml")
        upcycle.main(config, dense["folder"], tmp_path / "start", no_check=True)
        assert ("is there already" in capsys.readouterr().out) == (not overrides and (tmp_path / "again").exists())
        (tmp_path / "again").touch()


def test_what_is_damaged_or_not_compared_is_made_again(prepared, dense, tmp_path, capsys):
    run = tiny(prepared, tmp_path, moe=MOE)
    config, start = written(run, tmp_path / "moe.yaml"), tmp_path / "start"
    upcycle.main(config, dense["folder"], start, no_check=True)
    weights = start / "latest/rank-00000.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    upcycle.main(config, dense["folder"], start, no_check=True)
    assert "its checksum is not that of the save" in (said := capsys.readouterr().out) and "it is made again" in said
    assert weights.read_bytes() == whole
    mixture = upcycle.Mixture(run, dense["folder"], "DENSE")
    assert upcycle._is_checkpoint(start, mixture, no_check=True) and not upcycle._is_checkpoint(start, mixture, no_check=False)


def test_another_model_is_refused(prepared, dense, starts, tmp_path):
    config = written(tiny(prepared, tmp_path, moe=MOE, model=dict(num_layers=2)), tmp_path / "moe.yaml")
    for path in dense.values():
        with pytest.raises(UserError, match=r"model.num_layers \(2\) must be that of .*: write num_layers: 4"):
            upcycle.main(config, path, tmp_path / "start")
    with pytest.raises(UserError, match="is a mixture, and a dense model is needed: name a dense model"):
        upcycle.main(config, starts / "copy/latest", tmp_path / "start")
    with pytest.raises(UserError, match="moe is missing"):
        upcycle.main(written(tiny(prepared, tmp_path), config), dense["folder"], tmp_path / "start")
    with pytest.raises(UserError, match=r"moe.upcycle_from \(x\) and train.init_from \(y\) both say where the run starts"):
        tiny(prepared, tmp_path, moe=MOE | dict(upcycle_from="x"), train=dict(init_from="y"))


def test_a_mixture_that_is_not_finite_never_passes():
    good, labels = torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.long)
    far = agreement.compare(good, good + 1, labels, None)
    assert far.max_relative_error > 0.1 and "no bound" in str(far)
    agreement.require(far, "upcycling")
    for value in (float("nan"), float("inf")):
        broken = good.clone()
        broken[1, 2, 3] = value
        for bound in (None, 1e-5):
            with pytest.raises(UserError, match="upcycling: logits agree to"):
                agreement.require(agreement.compare(good, broken, labels, bound), "upcycling")
