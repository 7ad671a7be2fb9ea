"""Folders that cannot be imported as they are: one line tells why, under the names that stand in the folder, and its remedy helps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_jobs.conversion import convert, import_hf
from megatron_jobs.conversion.agreement import compare
from megatron_jobs.conversion.families import read_config
from megatron_jobs.conversion.hugging_face import HuggingFaceFolder
from mujina.user_input import UserError
from tests.megatron_jobs.conversion.test_foreign import EXPERTS, save_model, save_tokenizer
from tests.ranks import run_ranks

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
GATE = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stock")
    found = {"llama": save_model(root / "llama", "llama"), "mixtral": save_model(root / "mixtral", "mixtral", **EXPERTS)}
    for folder in found.values():
        save_tokenizer(folder)
    return found


def configured(folder: Path, **values: Any) -> None:
    """config.json with other values; None takes one out."""
    merged = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


def saved(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def renamed(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def pickled(folder: Path, value: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": value}, folder / "pytorch_model.bin")


def linked(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0")


CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "git-lfs": ("llama", lambda f: (f / "model.safetensors").write_text(POINTER), "model.safetensors: is a pointer of git-lfs .*`git lfs"),
    "config by git-lfs": ("llama", lambda f: (f / "config.json").write_text(POINTER), "config.json: is a pointer of git-lfs"),
    "a copied link": (
        "llama",
        lambda f: linked(f, "model.safetensors"),
        r"safetensors: is a link to .*, which is not there: .* \(cp -rL\)",
    ),
    "a copied config": ("llama", lambda f: linked(f, "config.json"), r"config.json: is a link to ../../blobs/0, which is not there"),
    "no index": (
        "llama",
        lambda f: renamed(f, "model-1.safetensors"),
        "of model-1.safetensors it says .*: copy model.safetensors.index.json",
    ),
    "an adapter": ("llama", lambda f: [renamed(f, "adapter_config.json")], r"is a PEFT adapter and no model: .*merge_and_unload"),
    "an adapter inside": (
        "llama",
        lambda f: saved(f, lambda t: t | {f"base_model.model.{GATE}.lora_A.weight": torch.ones(2, 48)}),
        rf"holds {GATE}.lora_A.weight, of a PEFT adapter: merge it",
    ),
    "a base layer": (
        "llama",
        lambda f: saved(f, lambda t: {name.replace("gate_proj.", "gate_proj.base_layer."): tensor for name, tensor in t.items()}),
        rf"holds {GATE}.base_layer.weight, of a PEFT adapter",
    ),
    "transposed": (
        "llama",
        lambda f: saved(f, lambda t: {name: tensor.T if "gate_proj" in name else tensor for name, tensor in t.items()}),
        rf"{GATE}.weight has the shape \[48, 80\], .* \[80, 48\]: it is transposed",
    ),
    "a reward model": (
        "llama",
        lambda f: (
            configured(f, architectures=["LlamaForSequenceClassification"]),
            saved(f, lambda t: {name: tensor for name, tensor in t.items() if name != "lm_head.weight"}),
        ),
        "has no tensor lm_head.weight, .*; where LlamaForSequenceClassification has none, take the causal language model",
    ),
    "code": ("llama", lambda f: pickled(f, print), r"holds more than tensors \(print\): copy it again"),
    "padding": ("llama", lambda f: configured(f, pad_token_id=270), r"pad_token_id \(270\) is no row of vocab_size \(270\): write null"),
    "of pictures": ("llama", lambda f: configured(f, text_config={"hidden_size": 48}), "text_config .* is not supported, only None: take"),
    "ends": (
        "llama",
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [[1]]}') and None,
        r"generation_config.json: eos_token_id \(\[\[1\]\]\) must be a token's number, or a list of such: mend it",
    ),
    "heads": ("llama", lambda f: configured(f, num_key_value_heads=4), r"num_key_value_heads \(4\) must divide num_attention_heads \(6\)"),
    "layers": ("llama", lambda f: configured(f, num_hidden_layers=0), r"config.json: num_hidden_layers \(0\): Input should be greater"),
    "rows": ("llama", lambda f: configured(f, hidden_size="48"), "no configuration that transformers reads .*'hidden_size'.*: mend it$"),
    "dropout": ("llama", lambda f: configured(f, attention_dropout=0.1), r"attention_dropout \(0.1\) .* only 0.0: write that in its place"),
    "experts": ("mixtral", lambda f: configured(f, num_experts_per_tok=5), r"num_experts_per_tok \(5\) must not exceed num_local_experts"),
    "one expert": ("mixtral", lambda f: configured(f, num_experts_per_tok=1), r"num_experts_per_tok \(1\): .*: take another model"),
    "pieces": (
        "llama",
        lambda f: (
            configured(f, vocab_size=256),
            saved(f, lambda t: {name: tensor[:256] if len(tensor) == 270 else tensor for name, tensor in t.items()}),
        ),
        r"tokenizer has 262 pieces, more than its vocab_size \(256\): .*resize_token_embeddings\(262\)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_line_says_what_helps(stock: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, change, told = CASES[name]
    shutil.copytree(stock[source], tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(UserError, match=told) as error:
        import_hf.main(tmp_path / "model", tmp_path / "in", no_check=True)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_window_that_config_json_leaves_out_comes_back(stock: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A Mistral's is 4,096 tokens. And no warning of transformers is shown of what the comparison leaves out."""
    shutil.copytree(stock["llama"], tmp_path / "model")
    configured(tmp_path / "model", model_type="mistral", architectures=["MistralForCausalLM"])
    run_ranks(1, import_and_convert, tmp_path)
    assert json.loads((tmp_path / "back/config.json").read_text())["sliding_window"] == 4_096
    shown = capfd.readouterr()
    assert "MISSING" not in shown.out + shown.err


def import_and_convert(root: Path) -> None:
    import_hf.main(root / "model", root / "in", None, False, True)
    convert.main(root / "in/checkpoints/latest", root / "back")


def test_silu_by_its_older_name(stock: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(stock["llama"], tmp_path / "model")
    configured(tmp_path / "model", hidden_act="swish")
    assert read_config(tmp_path / "model/config.json")[1] == HuggingFaceFolder(stock["llama"]).model


def test_logits_that_are_all_zero_agree() -> None:
    """As of a new output layer."""
    zero = torch.zeros(1, 2, 3)
    assert compare(zero, zero, torch.zeros(1, 2, dtype=torch.long), 1e-4).holds
    assert not compare(zero, zero + 1e-3, torch.zeros(1, 2, dtype=torch.long), 1e-4).holds
