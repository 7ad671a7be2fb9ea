"""Configuration files: what is refused, and how it is said; the reference models; the commands around them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.indexed import BinaryWriter, Channel, Labels
from megatron_jobs import config as configuration
from megatron_jobs.data import phases
from megatron_jobs.planning import layouts, plan
from megatron_jobs.planning.plan import num_parameters
from mujina.cli import VERBS
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tokenization.load import load

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(prepared, tmp_path):
    """A configuration file; `write(values)` changes it by sections."""
    base = tiny(prepared, tmp_path / "run").model_dump(mode="json", exclude_none=True)

    def write(**sections) -> Path:
        values = {key: value | sections[key] if isinstance(value, dict) and key in sections else value for key, value in base.items()}
        values |= {key: value for key, value in sections.items() if key not in base or not isinstance(base[key], dict)}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.mark.parametrize(
    "sections, message",
    [
        (dict(model=dict(hiden_size=3)), "unknown key model.hiden_size: did you mean hidden_size?"),
        (dict(trian={}), "unknown key trian: did you mean train?"),
        (dict(model=dict(num_layers=0)), "model.num_layers (0): Input should be greater than 0"),
        (dict(model=dict(num_query_groups=3)), "num_query_groups (3) must divide num_attention_heads (4)"),
        (dict(moe=dict(num_experts=2, top_k=3)), "top_k (3) must not exceed num_experts (2)"),
        (dict(moe=dict(num_experts=2, top_k=1)), "scores (topk_softmax) needs a top_k (1) of 2 or more"),
        (
            dict(moe=dict(num_experts=6, top_k=4, ffn_hidden_size=16, upcycle_from="x", upcycling=dict(operator="granular"))),
            "moe.num_experts (6) must be a multiple of 4, the pieces of the dense FFN",
        ),
        (dict(train=dict(precision="fp16")), "train.precision ('fp16'): Input should be 'fp32', 'bf16' or 'fp8'"),
    ],
)
def test_a_wrong_file_is_refused_with_field_value_and_remedy(file, sections, message):
    with pytest.raises(UserError, match=re.escape(message)):
        configuration.load(file(**sections))


def test_an_unknown_key_inside_a_phase_names_the_nearest(file):
    path = file()
    values = yaml.safe_load(path.read_text())
    values["phases"][1]["learning_rate"]["warmup"] = 3
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"unknown key phases.1.learning_rate.warmup: did you mean warmup_steps\?"):
        configuration.load(path)


@pytest.mark.parametrize(
    "world, sections, message",
    [
        (
            3,
            dict(parallel=dict(tensor=2)),
            "parallel.tensor × parallel.pipeline × parallel.context (2) must divide the number of processes (3)",
        ),
        (3, dict(parallel=dict(pipeline=3)), "parallel.pipeline (3) must divide model.num_layers (4): the nearest that do are 1, 2, 4"),
        (
            4,
            dict(parallel=dict(tensor=4)),
            "parallel.tensor (4) is too much for model.num_query_groups (2): at 1 on a process some would have none",
        ),
        (2, dict(parallel=dict(expert=2)), "parallel.expert (2) needs a moe section"),
        (3, dict(parallel=dict(expert=3), moe=MOE), "parallel.expert (3) must divide moe.num_experts (4)"),
        (3, dict(), "train.micro_batch_size × the data-parallel size (6) must divide phases.web.global_batch_size (8)"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(prepared, tmp_path, world, sections, message):
    with pytest.raises(UserError, match=re.escape(message)):
        layouts.check(tiny(prepared, tmp_path, **sections), world)


def test_overrides_and_extends(file, tmp_path):
    base = file()
    (tmp_path / "top.yaml").write_text("extends: run.yaml\nmodel: {num_layers: 8}\n")
    settings = configuration.load(tmp_path / "top.yaml", ["optimizer.clip_grad=0.8", "seed=7"])
    assert (settings.model.num_layers, settings.model.hidden_size, settings.optimizer.clip_grad, settings.seed) == (8, 32, 0.8, 7)
    (tmp_path / "two.yaml").write_text("extends: [run.yaml, more.yaml]\nseed: 1\n")
    (tmp_path / "more.yaml").write_text("model: {num_layers: 4}\nseed: 3\n")
    settings = configuration.load(tmp_path / "two.yaml")
    assert (settings.model.num_layers, settings.model.hidden_size, settings.seed) == (4, 32, 1)
    with pytest.raises(UserError, match="unknown key optimizer.clip_gard: did you mean clip_grad"):
        configuration.load(base, ["optimizer.clip_gard=1"])
    with pytest.raises(UserError, match="no such file"):
        configuration.load(tmp_path / "missing.yaml")


def test_what_a_file_includes_is_relative_to_it(file, tmp_path, monkeypatch):
    path = file()
    values = yaml.safe_load(path.read_text())
    inside = configuration.load(path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "phases.yaml").write_text(yaml.safe_dump({"phases": values.pop("phases")}))
    path.write_text(yaml.safe_dump(values | {"phases": "sub/phases.yaml"}))
    (tmp_path / "sub" / "top.yaml").write_text("extends: ../run.yaml\nseed: 1\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert configuration.load(path) == configuration.load(tmp_path / "sub" / "top.yaml") == inside
    assert configuration.load(path, ["phases=../sub/phases.yaml"]) == inside  # there a path is relative to the working directory

    (tmp_path / "sub" / "top.yaml").write_text("extends: ../run.yaml\nphases: sub/phases.yaml\n")
    monkeypatch.chdir(tmp_path)
    rule = r"top.yaml: phases \(sub/phases.yaml\): no such file: what a file includes is relative to that file: write phases.yaml"
    with pytest.raises(UserError, match=rule):
        configuration.load(tmp_path / "sub" / "top.yaml")
    with pytest.raises(UserError, match="none.yaml\): no such file"):
        configuration.load(path, ["phases=none.yaml"])
    with pytest.raises(UserError, match="run.yaml: must hold phases and nothing else"):
        configuration.load(path, ["phases=run.yaml"])


def test_the_learning_rate_follows_the_phases(prepared, tmp_path):
    settings = tiny(prepared, tmp_path)
    rates = [phases.learning_rate(settings.phases, step) for step in range(10)]
    assert rates[:3] == pytest.approx([5e-3, 1e-2, 1e-2]) and rates[5] == pytest.approx(5e-3)
    assert rates[6:] == pytest.approx([5e-3, 5e-3 - 4e-3 / 3, 1e-3 + 4e-3 / 3, 1e-3])


def test_the_past_of_a_run_may_not_change(prepared, tmp_path):
    before = tiny(prepared, tmp_path)
    future = before.model_copy(update={"phases": (before.phases[0], before.phases[1].model_copy(update={"tokens": 5120}))})
    phases.check_resumable(before, future, 6)
    with pytest.raises(UserError, match="phase chat has begun and may not change any more"):
        phases.check_resumable(before, future, 7)
    with pytest.raises(UserError, match="seed was 1 when this run began, and is 2 now"):
        phases.check_resumable(before, before.model_copy(update={"seed": 2}), 1)


@pytest.mark.parametrize("name, total, active, steps", [("tanuki_8b", 7.5e9, 7.5e9, 413_000), ("tanuki_8x8b", 47e9, 13e9, 97_000)])
def test_the_reference_models(name, total, active, steps, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = configuration.load(f"megatron_jobs/configs/{name}.yaml")
    layouts.check(settings, 128)
    assert num_parameters(settings) == (pytest.approx(total, rel=0.02), pytest.approx(active, rel=0.02))
    assert phases.num_steps(settings.phases) == pytest.approx(steps, rel=0.01)
    assert settings.model.padded_vocab_size == 65_024
    last = settings.phases[-1]
    assert last.admit.kinds == ("chat",) and last.admit.origins == ("synthetic",)


RECIPES = {
    "tanuki_8b_chat": {"sft": ("answers", "dialogues", 1, 5e-6), "dpo": ("preference", "pairs", 1, 5e-7)},
    "tanuki_8x8b_sft": {"sft": ("answers", "dialogues", 1, 5e-7)},
    "tanuki_8x8b_dpo": {"dpo": ("preference", "pairs", 2, 2e-6)},
}


@pytest.fixture(scope="module")
def dialogues_and_pairs(prepared, tmp_path_factory) -> list[str]:
    """As many as the first models were fine-tuned on, shorter ones; as overrides of a recipe."""
    tokenizer = load(prepared / "tokenizer")
    folder = tmp_path_factory.mktemp("answers")
    draw = np.random.default_rng(1)
    labels = dict(origin="synthetic", languages={}, licences={}, teachers={}, num_characters=1, fingerprint="")
    labels |= dict(tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size)
    for name, kind, documents in (("dialogues", "chat", 140_078), ("pairs", "preferences", 60_000)):
        writer = BinaryWriter(folder / name, np.dtype(np.uint16), {"weights": Channel(dtype="uint8", per="token")})
        lengths = draw.integers(30, 200, documents)
        weights = np.zeros(lengths.sum(), np.uint8)
        weights[np.cumsum(lengths) - 1] = 1
        writer.add_documents(np.ones(lengths.sum(), np.uint16), lengths, {"weights": weights})
        writer.finish(Labels(name=name, kind=kind, num_answer_tokens=documents, **labels))
    return [f"data.folder={folder}", f"tokenizer={prepared / 'tokenizer'}"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_fine_tuning_load_and_plan(name, dialogues_and_pairs, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    file = Path(f"megatron_jobs/configs/{name}.yaml")
    settings = configuration.load(file)
    layouts.check(settings, 128)
    found = {
        phase.name: (phase.loss.kind, source, take.epochs, phase.learning_rate.start)
        for phase in settings.phases
        for source, take in phase.sources.items()
    }
    assert found == RECIPES[name] and {phase.sequence_length for phase in settings.phases} == {4096}
    betas = [phase.loss.beta for phase in settings.phases if phase.loss.kind == "preference"]
    assert betas == {"tanuki_8b_chat": [0.01], "tanuki_8x8b_sft": [], "tanuki_8x8b_dpo": [0.1]}[name]
    assert bool(settings.adapter) == (name == "tanuki_8x8b_dpo")
    plan.main(file)
    assert "as its sources have" in (told := capsys.readouterr().out) and "is not there yet" in told
    plan.main(file, dialogues_and_pairs)
    told = capsys.readouterr().out
    assert ("140,078" in told) == ("sft" in RECIPES[name]) and ("30,000" in told or "60,000" in told) == ("dpo" in RECIPES[name])


def test_the_planner_knows_phases_of_dialogues(dialogues_and_pairs, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    file = Path("megatron_jobs/configs/tanuki_8b_chat.yaml")
    for there in (False, True):
        plan.main(file, dialogues_and_pairs if there else None, gpus=128, gpu="h100")
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ TP2 DP64"))
        assert row.split("│")[-2].strip() == ("0.0" if there else "?")


def test_plan_counts_what_the_model_has(prepared, tmp_path):
    from megatron_jobs.checkpoints.weights import shapes

    for sections in (dict(), dict(moe=MOE), dict(model=dict(tie_embeddings=True))):
        settings = tiny(prepared, tmp_path, **sections)
        assert num_parameters(settings)[0] == sum(rows * columns for _, (rows, columns) in shapes(settings.model, settings.moe))


def mujina(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mujina", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_and_its_verbs():
    """The help of every verb is in docs/commands.md, which tests/test_docs.py compares."""
    listing = mujina("--help")
    assert re.findall(r"^  ([\w-]+) ", listing.stdout, re.MULTILINE) == list(VERBS)
    shown = mujina("plan", "--help")
    assert shown.returncode == 0 and "Usage: mujina plan " in shown.stdout
    wrong = mujina("trian")
    assert wrong.returncode == 2 and "did you mean train?" in wrong.stderr


@pytest.mark.parametrize(
    "damage, message",
    [
        ("truncate", "it is truncated"),
        ("idx", "is not the index of web.bin"),
        ("tokenizer", "was prepared with the tokenizer"),
        ("phase", "phases.chat admits only sources of kind chat, and web is of kind web: take web out of this phase"),
        ("unknown", "phases.chat.sources.cat: no such source in data.folder: did you mean chat?"),
        ("budget", "phases.chat.sources.chat: the phases up to this one take"),
    ],
)
def test_train_refuses_before_a_process_starts(prepared, file, tmp_path, damage, message):
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(prepared / "data", folder)
    path = file(data=dict(folder=str(folder)))
    values = yaml.safe_load(path.read_text())
    if damage == "truncate":
        (folder / "web.bin").write_bytes((folder / "web.bin").read_bytes()[:-2])
    elif damage == "idx":
        shutil.copy(folder / "code.idx", folder / "web.idx")
    elif damage == "tokenizer":
        manifest = (folder / "web.json").read_text()
        (folder / "web.json").write_text(re.sub(r'("tokenizer_hash": ")\w+', r"\g<1>0123", manifest))
    elif damage == "budget":
        values["phases"][1]["tokens"] = 100_000_000
    else:
        values["phases"][1]["sources"] = {"web": 0.1, "chat": 0.9} if damage == "phase" else {"cat": 1.0}
    path.write_text(yaml.safe_dump(values))
    shown = mujina("train", str(path))
    assert shown.returncode == 2 and message in shown.stderr and "Traceback" not in shown.stderr
    assert not (tmp_path / "run").exists()
