"""Every family of Hugging Face models, there and back: logits as in transformers, tensors equal to the last bit, refusals by name."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megatron_jobs import config as configuration
from megatron_jobs.checkpoints.checkpoint import seal
from megatron_jobs.config import RunConfig
from megatron_jobs.config.model import MoEConfig
from megatron_jobs.conversion import convert, import_hf, upcycle
from megatron_jobs.conversion.families import config_values, family_of
from megatron_jobs.conversion.hugging_face import HuggingFaceFolder
from megatron_jobs.planning import plan
from mujina import sbatch
from mujina.user_input import UserError
from slurm import submit
from tests.conftest import MOE, tiny
from tests.megatron_jobs.conversion.test_import import run_from, transformers_loss
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks
from tokenization.load import load as load_tokenizer

LLAMA3 = dict(rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ODD_ROPE = LLAMA3 | dict(rope_theta=500.5, factor=3.0, low_freq_factor=0.5, high_freq_factor=6.0, original_max_position_embeddings=24)
# 6 heads of 16 in a width of 48, 3 of them for keys
WIDE = dict(num_key_value_heads=3, head_dim=16)
QWEN3_MOE = dict(model_type="qwen3_moe", moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, **WIDE)
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", **WIDE),
    "llama3": dict(model_type="llama", dtype=torch.bfloat16, rope_parameters=ODD_ROPE, tie_word_embeddings=True),
    "mistral": dict(model_type="mistral", dtype=torch.float16, hidden_size=44, sliding_window=40, **WIDE),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", dtype=torch.bfloat16, head_dim=16),
    "mixtral": dict(model_type="mixtral", dtype=torch.bfloat16, num_local_experts=4, num_experts_per_tok=2, **WIDE),
    "qwen3-moe": QWEN3_MOE | dict(norm_topk_prob=True, dtype=torch.bfloat16),
    "qwen3-moe-mixed": QWEN3_MOE | dict(norm_topk_prob=False, mlp_only_layers=[1, 3], tie_word_embeddings=True),
}


def folder_of(prepared: Path, folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **values: Any) -> Path:
    """A random model as save_pretrained writes it, in shards, with the tokenizer of `prepared` and 37 rows more than it has pieces."""
    tokenizer = load_tokenizer(prepared / "tokenizer")
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2)
    sizes |= dict(initializer_range=0.15, vocab_size=tokenizer.vocab_size + 37, max_position_embeddings=512, bos_token_id=1)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | values), dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # one or zero at first, which would hide that they are read from the wrong place
            torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.3)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=2)
    model.save_pretrained(folder, max_shard_size="50KB")
    tokenizer.save_hf(folder)
    return folder


@pytest.fixture(scope="module")
def folders(prepared, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: folder_of(prepared, root / name, **values) for name, values in MODELS.items()}


@pytest.fixture(scope="module")
def there_and_back(folders, tmp_path_factory) -> Path:
    """For every family the imported folder with its checkpoint, and the folder that the checkpoint is converted into, both compared."""
    root = tmp_path_factory.mktemp("back")
    run_ranks(1, go_there_and_back, folders, root)
    return root


def go_there_and_back(folders: dict[str, Path], root: Path) -> None:
    for name, folder in folders.items():
        import_hf.main(folder, root / name / "in", None, False, True)
        convert.main(root / name / "in/checkpoints/latest", root / name / "back")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_comes_back_to_the_last_bit(folders, there_and_back, name):
    back = there_and_back / name / "back"
    before, after = tensors_of(folders[name]), tensors_of(back)
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if value.dtype != after[key].dtype or not value.equal(after[key])] == []
    assert AutoConfig.from_pretrained(back).to_dict() | {"_name_or_path": None} == (
        AutoConfig.from_pretrained(folders[name]).to_dict() | {"_name_or_path": None}
    )
    assert GenerationConfig.from_pretrained(back).to_dict() == GenerationConfig.from_pretrained(folders[name]).to_dict()
    agreement = json.loads((back / "conversion.json").read_text())["agreement"]
    assert agreement["max_relative_error"] <= 1e-4 and 1 < agreement["loss_after"] < 60


LAYOUTS = [("llama3", 2, dict(tensor=2)), ("mistral", 2, dict(pipeline=2)), ("qwen2", 2, dict(tensor=2)), ("qwen3", 2, dict(tensor=2))]
LAYOUTS += [("qwen2", 1, {}), ("mixtral", 2, dict(expert=2)), ("qwen3-moe", 2, dict(expert=2)), ("qwen3-moe-mixed", 1, {})]
LAYOUTS += [("qwen3-moe-mixed", 2, dict(pipeline=2)), ("qwen3-moe-mixed", 2, dict(expert=2))]


@pytest.mark.parametrize("name, world, parallel", LAYOUTS, ids=lambda value: value if isinstance(value, str) else str(value))
def test_a_checkpoint_of_any_layout_is_converted_to_the_same(prepared, folders, there_and_back, tmp_path, name, world, parallel):
    """The first loss at that layout is transformers' own; after a step at a rate that float32 takes for zero the tensors are as before."""
    precision = "bf16" if MODELS[name].get("dtype") == torch.bfloat16 else "fp32"
    run = run_from(prepared, there_and_back / name / "in", tmp_path / "run", parallel=parallel)
    run_ranks(world, train_here, run)
    assert losses(tmp_path / "run")[0] == pytest.approx(transformers_loss(run, folders[name]), abs=1e-4)

    still = run.phases[0].learning_rate.model_copy(update=dict(start=1e-300))
    phases = (run.phases[0].model_copy(update=dict(learning_rate=still)),)
    train = run.train.model_copy(update=dict(precision=precision))
    run = run.model_copy(update=dict(run=tmp_path / "still", phases=phases, train=train))
    run_ranks(world, train_here, run)
    run_ranks(1, convert.main, tmp_path / "still/checkpoints/latest", tmp_path / "back", True)
    before, after = tensors_of(folders[name]), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not value.float().equal(after[key].float())] == []
    assert {value.dtype for value in after.values()} == {torch.bfloat16 if precision == "bf16" else torch.float32}


@pytest.mark.parametrize(
    "model, moe, message",
    [
        (dict(qkv_bias=True, qk_norm=True), None, r"model.qkv_bias \(True\) can be exported only as Qwen2, which has no model.qk_norm"),
        (dict(qkv_bias=True), {}, r"model.qkv_bias \(True\) .* which has no moe: train without"),
        (dict(), dict(every=2), r"moe.every \(2\) has no place in MixtralForCausalLM, .* only 1: train with that"),
        (dict(), dict(scores="softmax_topk"), r"moe.scores \(softmax_topk\) has no place in MixtralForCausalLM, .* only topk_softmax"),
        (dict(), dict(shared_ffn_hidden_size=8), r"moe.shared_ffn_hidden_size \(8\) has no place in MixtralForCausalLM"),
        (dict(qk_norm=True), dict(shared_ffn_hidden_size=8), r"moe.shared_ffn_hidden_size \(8\) has no place in Qwen3MoeForCausalLM"),
        (dict(qk_norm=True), dict(scores="sigmoid"), r"moe.scores \(sigmoid\) has no place in Qwen3MoeFor.* topk_softmax or softmax_topk"),
    ],
)
def test_what_no_stock_architecture_holds_is_refused(prepared, model, moe, message):
    config = tiny(prepared, Path("run"), model=model).model
    with pytest.raises(UserError, match=message):
        family_of(config, None if moe is None else MoEConfig(**MOE | moe))


REFUSED = "NOTE: `mujina convert` will refuse this model: moe.every (2) has no place in MixtralForCausalLM"


@pytest.mark.parametrize("every", [1, 2])
def test_what_convert_will_refuse_is_told_before_anything_is_computed(prepared, tmp_path, monkeypatch, capsys, every):
    monkeypatch.setattr(sbatch, "test", lambda arguments: "")
    run = tiny(prepared, tmp_path / "run", moe=MOE | dict(every=every))
    path, script = tmp_path / "run.yaml", tmp_path / "one.sh"
    path.write_text(json.dumps(run.model_dump(mode="json")))
    script.write_text("#SBATCH --nodes=1\n")
    dense = folder_like(prepared, tmp_path / "dense", run)
    for verb in (
        lambda: plan.main(path),
        lambda: submit.main(path, script=script, dry_run=True),
        lambda: upcycle.main(path, dense, tmp_path / "mixture", no_check=True),
        lambda: print(*run_ranks(1, told_in_training, run)),
    ):
        verb()
        assert (REFUSED in capsys.readouterr().out) == (every == 2)
    if every == 2:
        with pytest.raises(UserError, match=r"^moe.every \(2\) has no place"):
            upcycle.main(path, dense, tmp_path / "hf", hugging_face=True)


def folder_like(prepared: Path, folder: Path, run: RunConfig) -> Path:
    """A dense model of a run's sizes."""
    sizes = config_values("llama", run.model, None)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(folder)
    load_tokenizer(prepared / "tokenizer").save_hf(folder)
    return folder


def told_in_training(run: RunConfig) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train_here(run, 1)
    return out.getvalue()


def edited(folder: Path, copy: Path, **values: Any) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | values))
    return copy


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("qwen3-moe", dict(decoder_sparse_step=2), r"decoder_sparse_step \(2\) and mlp_only_layers \(\[\]\) put experts into .* \[1, 3\]"),
        ("qwen3-moe", dict(mlp_only_layers=[0]), r"mlp_only_layers \(\[0\]\) put experts into the layers \[1, 2, 3\]"),
        ("qwen3", dict(attention_bias=True), r"attention_bias \(True\) is not supported"),
        ("qwen2", dict(model_type="llama"), r"12 tensors have no place .* model.layers.0.self_attn.k_proj.bias"),
        ("llama", dict(model_type="qwen3"), "has no tensor model.layers.0.self_attn.q_norm.weight"),
        ("qwen3-moe", dict(mlp_only_layers=[1, 3]), "has no tensor model.layers.1.mlp.gate_proj.weight"),
        ("llama3", dict(rope_parameters=ODD_ROPE | dict(high_freq_factor=0.5)), r"high_freq_factor \(0.5\) must exceed low_freq_factor"),
    ],
)
def test_a_folder_that_is_not_what_it_says_is_refused(folders, tmp_path, name, values, message):
    with pytest.raises(UserError, match=message):
        HuggingFaceFolder(edited(folders[name], tmp_path / "model", **values))


def test_normalised_router_logits_are_exported_only_unchecked_and_with_a_warning(there_and_back, tmp_path, capsys):
    shutil.copytree(there_and_back / "mixtral/in/checkpoints/step-00000000", tmp_path / "checkpoint")
    description = tmp_path / "checkpoint/checkpoint.json"
    about = json.loads(description.read_text())
    del about["sha256"]
    about["config"]["moe"]["normalize_logits"] = True
    description.write_text(json.dumps(about | {"sha256": seal(about)}))
    with pytest.raises(UserError, match=r"moe.normalize_logits \(True\) .* give --no-check"):
        convert.main(tmp_path / "checkpoint", tmp_path / "hf")
    convert.main(tmp_path / "checkpoint", tmp_path / "hf", True)
    assert "MixtralForCausalLM without an error and COMPUTE SOMETHING ELSE" in capsys.readouterr().out
    assert "no inference engine does that" in (tmp_path / "hf/README.md").read_text()


def test_a_run_needs_phases(tmp_path, prepared):
    (tmp_path / "run.yaml").write_text(json.dumps(tiny(prepared, tmp_path, phases=[]).model_dump(mode="json")))
    with pytest.raises(UserError, match=r"phases \(\[\]\) must hold at least one phase"):
        configuration.load(tmp_path / "run.yaml")
