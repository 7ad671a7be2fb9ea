"""Runs that start from Hugging Face folders: the first loss is transformers' own, and what cannot be trained is refused by name."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

from data_prep.prepare import PrepareConfig, prepare
from megatron_jobs import config as configuration
from megatron_jobs.config import RunConfig
from megatron_jobs.config.model import MoEConfig
from megatron_jobs.config.phase import LearningRate
from megatron_jobs.conversion import convert, import_hf
from megatron_jobs.conversion.hugging_face import HuggingFaceFolder
from megatron_jobs.conversion.start import open_weights
from mujina.matrices import Box
from mujina.user_input import UserError
from tests.conftest import MOE, read, tiny
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks
from tokenization.load import load as load_tokenizer
from tokenization.train import TrainConfig
from tokenization.train import train as train_tokenizer

ROOT = Path(__file__).parents[3]
SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, initializer_range=0.1)
ONE_STEP = dict(
    name="only",
    tokens=8 * 32,
    sequence_length=32,
    global_batch_size=8,
    sources={"web": 0.5, "code": 0.5},
    learning_rate=dict(start=1e-4, end=0.0),
)


def folder_of(prepared: Path, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "30KB", **values: Any) -> Path:
    """A random model as save_pretrained writes it, with the tokenizer of `prepared`."""
    tokenizer = load_tokenizer(prepared / "tokenizer")
    kind = MixtralConfig if "num_local_experts" in values else LlamaConfig
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta", 10_000.0)}
    torch.manual_seed(1)
    config = kind(**SIZES | dict(vocab_size=tokenizer.vocab_size, rope_parameters=rope) | values)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms are one at first, and would hide that they are read from the wrong place
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_hf(folder)
    return folder


def run_from(prepared: Path, folder: Path, run: Path, **sections: Any) -> RunConfig:
    """A run of one step that extends the preset of the import of `folder`."""
    values = dict(
        extends=str(folder / "model.yaml"),
        run=str(run),
        data=dict(folder=str(prepared / "data"), block_length=64),
        train=dict(micro_batch_size=2, precision="fp32"),
        phases=[ONE_STEP],
    )
    (run.parent / f"{run.name}.yaml").write_text(yaml.safe_dump(values))
    overrides = [f"{section}.{key}={value}" for section, new in sections.items() for key, value in new.items()]
    return configuration.load(run.parent / f"{run.name}.yaml", overrides)


def transformers_loss(config: RunConfig, folder: Path) -> float:
    """The loss that transformers itself computes (labels=…) for the first step's samples, each shifted by one in its own way."""
    from megatron_jobs.data import feeder
    from megatron_jobs.data.order import DataOrder

    binaries = feeder.open_sources(config)
    phase = config.phases[0]
    where = DataOrder(config, feeder.facts(binaries)).samples(0, range(phase.global_batch_size))
    tokens = read(binaries, where, phase.sequence_length)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return float(model(tokens, labels=tokens).loss)


@pytest.fixture(scope="module")
def folders(prepared, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    mixture = dict(num_local_experts=4, num_experts_per_tok=2)
    return {
        "llama": folder_of(prepared, root / "llama", rms_norm_eps=1e-3),
        "tied-bf16": folder_of(prepared, root / "tied-bf16", torch.bfloat16, tie_word_embeddings=True, rope_theta=100.0),
        "fp16": folder_of(prepared, root / "fp16", torch.float16, shard_size="1GB"),
        "mixtral": folder_of(prepared, root / "mixtral", **mixture),
        "mixtral-bf16": folder_of(prepared, root / "mixtral-bf16", torch.bfloat16, num_local_experts=4, num_experts_per_tok=3),
    }


@pytest.fixture(scope="module")
def imported(folders, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("imported")
    run_ranks(1, import_all, folders, root)
    return {name: root / name for name in folders}


def import_all(folders: dict[str, Path], root: Path) -> None:
    for name, folder in folders.items():
        import_hf.main(folder, root / name)


CASES = [("llama", 1, {}), ("llama", 2, dict(tensor=2)), ("llama", 4, dict(tensor=2, pipeline=2)), ("tied-bf16", 1, {})]
CASES += [("tied-bf16", 2, dict(pipeline=2)), ("tied-bf16", 2, dict(tensor=2)), ("fp16", 1, {}), ("mixtral", 1, {})]
CASES += [("mixtral", 2, dict(expert=2)), ("mixtral", 2, dict(tensor=2)), ("mixtral-bf16", 2, dict(pipeline=2))]


@pytest.mark.parametrize("name, world, parallel", CASES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_the_first_loss_is_that_of_transformers(prepared, folders, imported, tmp_path, name, world, parallel):
    run = run_from(prepared, imported[name], tmp_path / "run", parallel=parallel)
    run_ranks(world, train_here, run)
    assert losses(tmp_path / "run")[0] == pytest.approx(transformers_loss(run, folders[name]), abs=1e-4)


def test_a_tied_embedding_stays_one_matrix_over_the_pipeline(prepared, imported, tmp_path):
    """Both its copies must start from the folder and get the whole gradient, or the losses behind the first step part."""
    for pipeline in (1, 2):
        run = run_from(prepared, imported["tied-bf16"], tmp_path / str(pipeline), parallel=dict(pipeline=pipeline))
        steps = run.phases[0].model_copy(update=dict(tokens=4 * ONE_STEP["tokens"], learning_rate=LearningRate(start=1e-2, end=1e-3)))
        run_ranks(pipeline, train_here, run.model_copy(update=dict(phases=(steps,))))
    assert len(losses(tmp_path / "1")) == 4
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), abs=1e-4)


def test_no_rank_reads_more_than_its_boxes(folders):
    """A box in the middle, one row of it, a piece of a norm, and rows behind the vocabulary."""
    folder = HuggingFaceFolder(folders["tied-bf16"])
    tensors = {name: tensor for file in folders["tied-bf16"].glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert len(list(folders["tied-bf16"].glob("*.safetensors"))) > 3
    want = tensors["model.layers.2.mlp.down_proj.weight"]
    assert folder.read("layers.2.down", Box(7, 19, 40, 80)).equal(want[7:19, 40:80].float())
    assert folder.read("layers.2.down", Box(7, 8, 3, 5)).equal(want[7:8, 3:5].float())
    assert folder.read("final_norm", Box(10, 20, 0, 1)).equal(tensors["model.norm.weight"][10:20, None].float())
    rows = folder.model.vocab_size
    edge = folder.read("embedding", Box(rows - 2, rows + 3, 0, 48))
    assert edge[:2].equal(tensors["model.embed_tokens.weight"][-2:].float()) and not edge[2:].any()
    assert not folder.read("embedding", Box(rows + 1, rows + 3, 0, 48)).any()


@pytest.mark.parametrize("name", ["llama", "tied-bf16", "mixtral"])
def test_there_and_back_every_tensor_is_the_same(prepared, folders, imported, tmp_path, name):
    """Import, a step at a rate that float32 takes for zero, and conversion: the tensors that it came from, and their config."""
    precision = "bf16" if name == "tied-bf16" else "fp32"
    run = run_from(prepared, imported[name], tmp_path / "run", train=dict(precision=precision))
    still = run.phases[0].learning_rate.model_copy(update=dict(start=1e-300))
    run = run.model_copy(update=dict(phases=(run.phases[0].model_copy(update=dict(learning_rate=still)),)))
    run_ranks(1, train_here, run)
    run_ranks(1, convert.main, tmp_path / "run/checkpoints/latest", tmp_path / "back", True)
    there, back = (
        {tensor: value for file in folder.glob("*.safetensors") for tensor, value in load_file(file).items()}
        for folder in (folders[name], tmp_path / "back")
    )
    assert there.keys() == back.keys()
    assert [tensor for tensor, value in there.items() if value.dtype != back[tensor].dtype or not value.equal(back[tensor])] == []
    assert HuggingFaceFolder(tmp_path / "back").model == HuggingFaceFolder(folders[name]).model
    assert HuggingFaceFolder(tmp_path / "back").moe == HuggingFaceFolder(folders[name]).moe


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(model_type="gpt2"), r"model_type \(gpt2\) must be llama, mistral, qwen2, qwen3, mixtral or qwen3_moe"),
        (dict(attention_bias=True), r"attention_bias \(True\) is not supported, only False"),
        (dict(mlp_bias=True), r"mlp_bias \(True\) is not supported"),
        (dict(hidden_act="gelu"), r"hidden_act \(gelu\) is not supported, only silu"),
        (dict(attention_dropout=0.1), r"attention_dropout \(0.1\) is not supported"),
        (dict(head_dim=16), r"q_proj.weight has the shape \[48, 48\], and by config.json it is \[96, 48\]"),
        (dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), "rope_scaling of the type linear is not supported"),
        (dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2.0)), "rope_scaling of the type dynamic is not supported"),
        (dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)), r"partial_rotary_factor \(0.5\)"),
        (dict(quantization_config=dict(quant_method="fp8")), "quantization_config .* is not supported"),
        (dict(auto_map=dict(AutoModelForCausalLM="modeling.Other")), "auto_map .* is not supported"),
        (dict(num_attention_heads=5), "is no configuration that transformers reads"),
        (dict(intermediate_size=96), r"mlp.gate_proj.weight has the shape \[80, 48\], and by config.json it is \[96, 48\]"),
        (dict(num_hidden_layers=3), "9 tensors have no place .* model.layers.3"),
        (dict(num_hidden_layers=5), "has no tensor model.layers.4.input_layernorm.weight"),
        (dict(tie_word_embeddings=True), r"lm_head.weight differs from model.embed_tokens.weight, .* write false there"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_trained_is_refused_by_name(folders, tmp_path, values, message):
    shutil.copytree(folders["llama"], tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError, match=message):
        HuggingFaceFolder(tmp_path / "model")


@pytest.mark.parametrize("damage", ["missing", "truncated", "int8"])
def test_damaged_weights_are_refused(folders, tmp_path, damage):
    shutil.copytree(folders["llama"], tmp_path / "model")
    file = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        os.truncate(file, file.stat().st_size - 8)
    else:
        save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    message = {"missing": "is missing", "truncated": "is not a whole safetensors file", "int8": "is of type I8"}[damage]
    with pytest.raises(UserError, match=message):
        HuggingFaceFolder(tmp_path / "model")


def test_a_run_of_another_model_is_told_what_to_write(prepared, folders, tmp_path):
    run = tiny(prepared, tmp_path, model=dict(num_layers=4, norm_epsilon=1e-5))
    with pytest.raises(UserError) as refusal:
        open_weights(folders["llama"], run, "train.init_from", None)
    told = re.findall(r"write (\w+): ([\d.]+)", str(refusal.value))
    assert dict(told) == dict(hidden_size="48", ffn_hidden_size="80", num_attention_heads="6", norm_epsilon="0.001")
    with pytest.raises(UserError, match="is a mixture, and a dense model is needed: write moe: {num_experts: 4, top_k: 2"):
        open_weights(folders["mixtral"], tiny(prepared, tmp_path), "train.init_from", None)
    run = tiny(prepared, tmp_path, moe=dict(num_experts=4, top_k=3))
    with pytest.raises(UserError, match=r"moe.top_k \(3\) must be .* write top_k: 2"):
        open_weights(folders["mixtral"], run, "train.init_from", run.moe)


# fields that change what a model computes and no shape
@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "rope_theta", 500_000.0),
        ("model", "norm_epsilon", 1e-6),
        ("model", "rope_scaling", dict(factor=8.0)),
        ("moe", "top_k", 3),
        ("moe", "scores", "softmax_topk"),
        ("moe", "normalize_logits", True),
    ],
)
def test_a_checkpoint_that_computes_something_else_is_refused(prepared, checkpoint_of_a_mixture, tmp_path, section, field, value):
    """A start from a checkpoint compares the structure, as one from a folder does: no shape tells these apart."""
    train = dict(init_from=str(checkpoint_of_a_mixture))
    assert open_weights(checkpoint_of_a_mixture, tiny(prepared, tmp_path, moe=MOE), "train.init_from", MoEConfig(**MOE)).step == 3
    sections: dict[str, Any] = {"moe": MOE}
    sections[section] = sections.get(section, {}) | {field: value}
    with pytest.raises(AssertionError, match=rf"{section}\.{field} \(.*\) must be that of train.init_from \(.*\): write {field}: "):
        run_ranks(1, train_here, tiny(prepared, tmp_path, train=train, **sections), 1)


@pytest.fixture(scope="module")
def checkpoint_of_a_mixture(prepared, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("mixture")
    run_ranks(1, train_here, tiny(prepared, run, moe=MOE), 3)
    return run / "checkpoints/latest"


def test_a_routers_bias_is_neither_lost_nor_made_up(prepared, checkpoint_of_a_mixture, tmp_path):
    biased = MOE | dict(balancing="bias", scores="sigmoid")
    run = tiny(prepared, tmp_path, moe=biased)
    with pytest.raises(UserError, match=r"moe.balancing \(bias\) must be that of train.init_from \(.*\): write balancing: aux_loss"):
        open_weights(checkpoint_of_a_mixture, run, "train.init_from", run.moe)


def test_a_window_shorter_than_the_sequence_is_refused(prepared, tmp_path):
    folder = folder_of(prepared, tmp_path / "model", num_local_experts=2, num_experts_per_tok=2, sliding_window=32)
    run_ranks(1, import_hf.main, folder, tmp_path / "in")
    run = run_from(prepared, tmp_path / "in", tmp_path / "run")
    open_weights(folder, run, "train.init_from", run.moe)
    longer = run.model_copy(update=dict(phases=(run.phases[0].model_copy(update=dict(sequence_length=64)),)))
    with pytest.raises(UserError, match=r"phases.only.sequence_length \(64\) must not exceed the sliding_window .* at most 32"):
        open_weights(folder, longer, "train.init_from", longer.moe)


@pytest.fixture(scope="module")
def other(prepared, tmp_path_factory) -> Path:
    """Another tokenizer and the same sources in its ids, as `prepared` lays them out."""
    root = tmp_path_factory.mktemp("other")
    inputs = [str(prepared / f"{name}.jsonl") for name in ("web", "code")]
    train_tokenizer(TrainConfig(inputs=inputs, output=str(root / "tokenizer"), vocab_size=330, character_coverage=1.0))
    sources = {name: {"documents": [path], "kind": name} for name, path in zip(("web", "code"), inputs, strict=True)}
    prepare(PrepareConfig.model_validate({"tokenizer": str(root / "tokenizer"), "output": str(root / "data"), "sources": sources}))
    return root


@pytest.mark.parametrize("name", ["llama", "tied-bf16", "mixtral"])
def test_a_new_vocabulary_starts_from_the_old(prepared, folders, other, tmp_path, name):
    run_ranks(1, import_hf.main, folders[name], tmp_path / "in", other / "tokenizer")
    run = run_from(other, tmp_path / "in", tmp_path / "run", model=dict(vocab_size=330))
    run_ranks(1, train_here, run)
    assert losses(tmp_path / "run")[0] == pytest.approx(transformers_loss(run, tmp_path / "in"), abs=1e-4)

    old, new = load_tokenizer(prepared / "tokenizer"), load_tokenizer(other / "tokenizer")
    before, after = HuggingFaceFolder(folders[name]), HuggingFaceFolder(tmp_path / "in")
    rows = before.read("embedding", Box(0, old.vocab_size, 0, 48))
    spelled = {token: old.encode_bytes(data) for token in range(new.vocab_size) if (data := new.bytes_of(token)) is not None}
    piece = next(token for token, ids in spelled.items() if len(ids) > 1)
    want = rows[spelled[piece]].mean(0)
    assert after.read("embedding", Box(piece, piece + 1, 0, 48))[0] == pytest.approx(want, abs=1e-2 if "bf16" in name else 1e-6)
    assert after.read("embedding", Box(new.eod_id, new.eod_id + 1, 0, 48)).equal(rows[[old.eod_id]])
    assert AutoTokenizer.from_pretrained(tmp_path / "in", local_files_only=True).eos_token_id == new.eod_id
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "in").config.eos_token_id == new.eod_id


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("tokenizer.ggml.pre", "llama-bpe", r"tokenizer.ggml.pre \(llama-bpe\) is not known, only smollm"),
        ("llama.rope.scaling.type", "yarn", "its rotary positions are scaled"),
    ],
)
def test_a_gguf_that_transformers_would_misread_is_refused(tmp_path, key, value, message):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=message):
        import_hf.main(tmp_path / "model.gguf", tmp_path / "out")
    (tmp_path / "no.gguf").write_bytes(b"GGML" * 20)
    with pytest.raises(UserError, match="is not a GGUF file"):
        import_hf.main(tmp_path / "no.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match="nothing: is neither a GGUF file nor a folder with a config.json"):
        import_hf.main(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
