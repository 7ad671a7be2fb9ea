"""Conversion of real checkpoints, up to what transformers makes of the folders."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_jobs.checkpoints.checkpoint import Checkpoint, seal
from megatron_jobs.conversion import convert, families
from mujina.matrices import Box
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks


def checkpoint_of(prepared: Path, run: Path, **sections) -> Path:
    run_ranks(1, train_here, tiny(prepared, run, **sections))
    return run / "checkpoints/latest"


@pytest.fixture(scope="module")
def dense(prepared, tmp_path_factory):
    return checkpoint_of(prepared, tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize(
    "sections, architecture",
    [
        (dict(), "LlamaForCausalLM"),
        (dict(model=dict(tie_embeddings=True, rope_theta=500_000)), "LlamaForCausalLM"),
        (dict(train=dict(precision="bf16")), "LlamaForCausalLM"),
        (dict(moe=MOE), "MixtralForCausalLM"),
        (dict(moe=dict(num_experts=8, top_k=3), train=dict(precision="bf16")), "MixtralForCausalLM"),
        (dict(model=dict(head_size=12, rope_scaling=dict(factor=4.0, original_length=16))), "LlamaForCausalLM"),
        (dict(model=dict(hidden_size=36, num_attention_heads=8, head_size=6)), "MistralForCausalLM"),
        (dict(model=dict(qkv_bias=True, tie_embeddings=True)), "Qwen2ForCausalLM"),
        (dict(model=dict(qk_norm=True, head_size=12, num_query_groups=4)), "Qwen3ForCausalLM"),
        (dict(moe=MOE | dict(ffn_hidden_size=24), model=dict(head_size=12)), "MixtralForCausalLM"),
        (dict(moe=MOE | dict(ffn_hidden_size=24, every=2, scores="softmax_topk"), model=dict(qk_norm=True)), "Qwen3MoeForCausalLM"),
        (dict(moe=MOE, model=dict(qk_norm=True, head_size=12), train=dict(precision="bf16")), "Qwen3MoeForCausalLM"),
    ],
    ids=["llama", "tied", "bf16", "mixtral", "mixtral-bf16", "scaled", "mistral", "qwen2", "qwen3", "narrow", "mixed", "qwen3-moe"],
)
def test_conversion_agrees_with_transformers(prepared, tmp_path, sections, architecture):
    checkpoint = checkpoint_of(prepared, tmp_path / "run", **sections)
    run_ranks(1, convert.main, checkpoint, tmp_path / "hf")
    agreement = json.loads((tmp_path / "hf/conversion.json").read_text())["agreement"]
    assert agreement["max_relative_error"] <= 1e-4 and 1 < agreement["loss_after"] < 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert type(model).__name__ == architecture and not hasattr(model.config, "auto_map")
    source = Checkpoint(checkpoint)
    vocabulary = source.config.model.vocab_size
    assert source.config.model.padded_vocab_size > vocabulary == model.get_input_embeddings().weight.shape[0]
    want = source.read("embedding", Box(0, vocabulary, 0, source.config.model.hidden_size))
    assert model.get_input_embeddings().weight.float().equal(want.to(model.dtype).float())
    assert model.dtype == (torch.bfloat16 if source.config.train.precision == "bf16" else torch.float32)


def test_the_folder_brings_tokenizer_and_chat_template(dense, tmp_path):
    run_ranks(1, convert.main, dense, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 2?"}], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|user|>1 + 2?<|end|><|assistant|>"
    assert (tmp_path / "hf/tokenizer.model").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert tokenizer.convert_tokens_to_ids("<|end|>") in model.generation_config.eos_token_id


def test_the_model_card_tells_what_is_known_and_nothing_else(dense, tmp_path):
    run_ranks(1, convert.main, dense, tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    consumed = Checkpoint(dense).ledger.phases
    for phase in consumed:
        for source, of_it in phase.sources.items():
            origin, language = ("synthetic", "en") if source == "chat" else ("human", "ja")
            assert f"| {phase.name} | {source} | {of_it.tokens:,} | {source}, {origin} | {language} | x |" in card
    assert card.count("\n| web |") == 3 and card.count("\n| chat |") == 1
    assert "Step 10, 2,560 tokens." in card and "language:\n- en\n- ja\n" in card and "\nlicense:" not in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert f"| parameters | {model.num_parameters():,} |" in card
    agreement = json.loads((tmp_path / "hf/conversion.json").read_text())["agreement"]
    assert f"mean loss {agreement['loss_after']:.6f} against" in card

    shutil.copytree(dense.resolve(), tmp_path / "elsewhere")  # where the data is not, and no comparison wanted
    description = tmp_path / "elsewhere/checkpoint.json"
    about = json.loads(description.read_text())
    del about["sha256"]
    about["config"]["data"]["folder"] = str(tmp_path)
    description.write_text(json.dumps(about | {"sha256": seal(about)}))
    run_ranks(1, convert.main, tmp_path / "elsewhere", tmp_path / "bare", True)
    card = (tmp_path / "bare/README.md").read_text()
    assert "have not been compared" in card and "language" not in card.split("| phase |")[0] and "| web | web |" in card


def test_a_wrong_rule_does_not_pass_the_gate(dense, tmp_path):
    """The comparison can fail: with gate and up exchanged, all shapes still fit."""
    with pytest.raises(AssertionError, match="UserError: conversion: logits agree to"):
        run_ranks(1, convert_with_exchanged_rules, dense, tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".hf*"))


def convert_with_exchanged_rules(checkpoint: Path, output: Path) -> None:
    gate, up = "layers.*.gate", "layers.*.up"
    names = families.FAMILIES["llama"].names
    names[gate], names[up] = names[up], names[gate]
    convert.main(checkpoint, output)


def test_an_interrupted_conversion_leaves_nothing_that_loads(dense, tmp_path):
    run_ranks(1, convert_and_die, dense, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    assert (tmp_path / ".hf.partial/model.safetensors").exists()  # it died behind the weights, before the tokenizer
    run_ranks(1, convert.main, dense, tmp_path / "hf", True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert not (tmp_path / ".hf.partial").exists()


def convert_and_die(checkpoint: Path, output: Path) -> None:
    child = os.fork()
    if child == 0:
        convert.write_companions = lambda *_: os.kill(os.getpid(), 9)
        convert.main(checkpoint, output)
    os.waitpid(child, 0)


def test_large_models_come_in_shards(dense, tmp_path):
    run_ranks(1, convert_in_small_shards, dense, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-0*-of-0*.safetensors"))) > 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)


def convert_in_small_shards(checkpoint: Path, output: Path) -> None:
    convert.SHARD_BYTES = 50_000
    convert.main(checkpoint, output)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over(prepared, dense, tmp_path, damage):
    """Every file of the newest checkpoint in turn; the run goes on from the one before with the same losses."""
    run = dense.parents[1]
    for name in Checkpoint(dense).files | {"checkpoint.json": {}}:
        broken = tmp_path / name
        shutil.copytree(run, broken, symlinks=True)
        target = broken / "checkpoints/step-00000010" / name
        content = bytearray(target.read_bytes())
        if damage == "missing":
            target.unlink()
        elif damage == "truncated":
            target.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 1
            target.write_bytes(content)
        run_ranks(1, train_here, tiny(prepared, broken))
        assert losses(broken) == losses(run)
        whole = (run / "checkpoints/step-00000010" / name).read_bytes()
        assert target.read_bytes() == whole or name == "checkpoint.json"  # trained and saved again (the description names the run's folder)


def test_a_checkpoint_that_lacks_values_is_refused(dense, tmp_path):
    shutil.copytree(dense.resolve(), tmp_path / "step-00000010")
    file = tmp_path / "step-00000010/rank-00000.safetensors"
    pieces = load_file(file)
    del pieces[next(key for key in pieces if key.startswith("master/layers.1.down/"))]
    save_file(pieces, file)
    about = json.loads((tmp_path / "step-00000010/checkpoint.json").read_text())
    about["files"][file.name]["bytes"] = file.stat().st_size
    del about["sha256"]
    about["sha256"] = seal(about)
    (tmp_path / "step-00000010/checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="of the .* values of master layers.1.down"):
        Checkpoint(tmp_path / "step-00000010").read("layers.1.down", Box(0, 32, 0, 64))


def test_a_checkpoint_of_another_format_is_refused(dense, tmp_path):
    shutil.copytree(dense.resolve(), tmp_path / "step-00000010")
    description = tmp_path / "step-00000010/checkpoint.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="is of format 99, this version reads 2"):
        Checkpoint(tmp_path / "step-00000010")
