"""Adapters as folders of peft's: what stock peft computes with those that are written, and runs that begin with those it has saved."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_jobs.checkpoints.checkpoint import write_weights
from megatron_jobs.checkpoints.weights import InitialWeights
from megatron_jobs.config import RunConfig
from megatron_jobs.conversion import convert, peft
from megatron_jobs.conversion.start import open_adapter, open_base
from megatron_jobs.data.ledger import Ledger
from mujina.matrices import Box
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.engine.test_passes import one_phase
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
PEFT = Path(sys.prefix) / "peft"  # put there by run_tests.sh
EXPERTS = ["experts.gate", "experts.up", "experts.down"]
DENSE = dict(rank=4, alpha=8, matrices=["query", "value", "attention_out", "up", "down"])
DENSE |= dict(rank_pattern={"value": 2, "down": 3}, alpha_pattern={"value": 5, "attention_out": 1.5})
MIXTRAL = dict(
    rank=2, alpha=3, matrices=["query", *EXPERTS], rank_pattern={"experts.down": 5, "query": 1}, alpha_pattern={"experts.down": 7}
)
# model, moe, adapter
MODELS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "dense": (dict(), None, DENSE),
    "mixtral": (dict(), MOE, MIXTRAL),
    "one-for-all": (dict(), MOE, MIXTRAL | dict(experts="shared")),
    "down-alone": (dict(), MOE, dict(rank=2, alpha=3, matrices=["experts.down"])),
    "qwen3-moe": (dict(qk_norm=True), MOE | dict(ffn_hidden_size=24), MIXTRAL),
}
TOLD = ("dense", "mixtral")  # the others prove it again


def peft_side(cases: list[list[str]]) -> None:
    """For each (base, adapter, output): the logits of peft's model on TOKENS, and the adapter as peft saves it."""
    from peft import PeftModel  # type: ignore[import-not-found]

    for base, adapter, output in cases:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
        with torch.no_grad():
            logits = model(tokens()).logits
        model.save_pretrained(output)
        torch.save(logits, Path(output) / "logits.pt")


def tokens() -> torch.Tensor:
    return torch.arange(64).view(2, 32) % 300


@pytest.fixture(scope="module")
def configured(prepared, tmp_path_factory) -> Callable[..., RunConfig]:
    """A run beside the Hugging Face folder of a base."""
    bases: dict[str, Path] = {}

    def of(kind: str, run: Path, **more: Any) -> RunConfig:
        model, moe, adapter = MODELS[kind]
        if kind not in bases:
            folder = tmp_path_factory.mktemp(f"base-{kind}")
            config = tiny(prepared, folder, model=model, moe=moe)
            weights = InitialWeights(config.model, config.moe, 7)
            checkpoint = write_weights(folder / "checkpoints", config, weights, weights.shapes, Ledger(), "writing")
            bases[kind] = folder / "hf"
            convert.main(checkpoint, bases[kind], no_check=True)
        train = dict(init_from=str(bases[kind])) | more.pop("train", {})
        sections = dict(model=model, moe=moe, adapter=adapter, phases=one_phase(3)) | more
        return tiny(prepared, run, train=train, **sections)

    return of


@pytest.fixture(scope="module")
def written(configured, tmp_path_factory, request) -> dict[str, tuple[RunConfig, Path]]:
    """The configuration of a trained run, and a folder with `adapter` as it is written, `merged`, and `saved` by peft, by kind."""
    assert PEFT.exists(), f"{PEFT} is missing: start the tests with ./run_tests.sh"
    kinds = TOLD if "repeats" in (request.config.option.markexpr or "") else tuple(MODELS)
    found = {}
    for kind in kinds:
        folder = tmp_path_factory.mktemp(kind)
        config = configured(kind, folder / "run")
        run_ranks(1, train_here, config)
        run_ranks(1, convert.main, folder / "run/checkpoints/latest", folder / "adapter", False, True)
        convert.main(folder / "run/checkpoints/latest", folder / "merged", no_check=True)
        found[kind] = (config, folder)
    cases = [[str(config.train.init_from), str(folder / "adapter"), str(folder / "saved")] for config, folder in found.values()]
    command = [sys.executable, "-c", f"from {__name__} import peft_side; peft_side({cases})"]
    environment = os.environ | {"PYTHONPATH": f"{PEFT}:{ROOT}", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "missing adapter keys" not in ended.stderr
    return found


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in TOLD else pytest.mark.repeats) for kind in MODELS])
def test_stock_peft_computes_what_the_run_has_trained(written, kind):
    config, folder = written[kind]
    beside = torch.load(folder / "saved/logits.pt")
    with torch.no_grad():
        merged, base = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens()).logits
            for path in (folder / "merged", config.train.init_from)
        )
    assert (merged - beside).abs().max() / beside.abs().max() < 1e-5
    assert (base - beside).abs().max() / beside.abs().max() > 1e-2
    record = json.loads((folder / "adapter/conversion.json").read_text())
    assert record["agreement"]["max_relative_error"] <= 1e-5 and "adapter_model.safetensors" in record["files"]
    assert "library_name: peft" in (folder / "adapter/README.md").read_text()


def test_an_adapter_goes_through_a_run_to_the_last_bit(written, configured, tmp_path):
    """What peft has saved begins a run whose steps are too small to see; of rsLoRA, the same with another alpha."""
    config, folder = written["dense"]
    almost_none = [phase | {"learning_rate": dict(start=1e-30, end=1e-30, shape="constant")} for phase in one_phase(1)]
    about = json.loads((folder / "saved/adapter_config.json").read_text())
    before = load_file(folder / "saved/adapter_model.safetensors")
    assert before.keys() == load_file(folder / "adapter/adapter_model.safetensors").keys() and len(about) > 30
    rs = tmp_path / "rs"
    shutil.copytree(folder / "saved", rs)
    (rs / "adapter_config.json").write_text(json.dumps(about | {"use_rslora": True, "rank_pattern": {"v_proj": 2, r".*\.down_proj": 3}}))
    its = dict(rank=4, alpha=16.0, matrices=DENSE["matrices"], rank_pattern=DENSE["rank_pattern"])
    its["alpha_pattern"] = {"value": 5 * 2**0.5, "attention_out": 1.5 * 2, "down": 8 * 3**0.5}
    for source, adapter, run in ((folder / "saved", DENSE, tmp_path / "run"), (rs, its, tmp_path / "rs-run")):
        again = configured("dense", run, adapter=adapter | {"init_from": str(source)}, phases=almost_none)
        run_ranks(1, train_here, again)
        convert.main(run / "checkpoints/latest", run / "adapter", adapter=True, no_check=True)
        after = load_file(run / "adapter/adapter_model.safetensors")
        assert after.keys() == before.keys()
        for name, values in before.items():
            assert values.float().view(torch.int32).equal(after[name].view(torch.int32)), name
    first, trained = losses(tmp_path / "run")[0], losses(config.run)
    assert first < trained[0] - 0.01
    ledger = json.loads((tmp_path / "run/checkpoints/latest/ledger.json").read_text())
    assert [Path(one["folder"]).name for one in ledger["origin"]["of"]] == ["hf", "saved"]
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text()) == json.loads(
        (folder / "adapter/adapter_config.json").read_text()
    )


def test_experts_in_one_parameter_are_refused(written, configured, tmp_path):
    """As peft saves them with transformers 5."""
    _, folder = written["mixtral"]
    with pytest.raises(UserError, match=r"target_parameters \(.*\): the experts of a layer have one adapter in one parameter.*: merge it"):
        opened(configured("mixtral", tmp_path, adapter=MIXTRAL | {"init_from": str(folder / "saved")}))


def opened(config: RunConfig) -> Any:
    return open_adapter(config, open_base(config))


Q = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: values for key, values in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("about", "tensors", "told"),
    [
        (dict(peft_type="LOHA"), None, "peft_type (LOHA) must be LORA: merge it into its model first"),
        (dict(use_dora=True), None, "use_dora (True) is not supported, an adapter here is A and B alone: merge it"),
        (dict(bias="lora_only"), None, "bias (lora_only) is not supported"),
        (dict(modules_to_save=["lm_head"]), None, "modules_to_save (['lm_head']) is not supported"),
        (dict(fan_in_fan_out=True), None, "fan_in_fan_out (True) is not supported"),
        (dict(what_comes_next={"x": 1}), None, "what_comes_next ({'x': 1}) is not supported"),
        (dict(init_lora_weights="pissa_niter_4"), None, "init_lora_weights (pissa_niter_4) has changed the base as well: merge it"),
        (dict(r=8), None, "has the shape [4, 32], and by adapter_config.json and the model [8, 32]"),
        (dict(lora_alpha=9), None, "is not what the section adapter describes: write there rank: 4, alpha: 9.0, matrices: ["),
        (dict(alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3}), None, "query has not the same rank and alpha in every layer"),
        (dict(r="many"), None, "is not the configuration of a LoRA that peft has saved (ValueError: "),
        ({}, lambda found: without(found, Q), "query has not the same rank and alpha in every layer, or in some none at all"),
        (
            {},
            lambda found: found | {"base_model.model.lm_head.lora_A.weight": found[Q].clone()},
            "lm_head.lora_A.weight has no place beside the matrices",
        ),
        ({}, lambda found: {}, "holds no A and B of matrices of this model"),
    ],
)
def test_what_is_not_the_same_here_is_refused(configured, tmp_path, about, tensors, told):
    config = configured("dense", tmp_path, adapter=dict(rank=4, alpha=8, matrices=["query"], init_from=str(tmp_path / "peft")))
    by_hand(tmp_path / "peft", about, tensors or (lambda found: found))
    with pytest.raises(UserError, match=re.escape(told)):
        opened(config)


def by_hand(folder: Path, about: dict[str, Any], tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """The adapter of the queries of four layers of 32."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=4, lora_alpha=8, bias="none") | about))
    names = [Q.replace("layers.2", f"layers.{layer}") for layer in range(4)]
    both = {
        name.replace("lora_A", f"lora_{side}"): torch.ones(*shape) for name in names for side, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    save_file(tensors(both), folder / "adapter_model.safetensors")


def test_damage_is_told(configured, tmp_path):
    config = configured("dense", tmp_path, adapter=dict(rank=4, alpha=8, matrices=["query"], init_from=str(tmp_path / "peft")))
    with pytest.raises(UserError, match=r"peft/adapter_config.json: .*name a folder that peft has saved"):
        opened(config)
    by_hand(tmp_path / "peft", {}, lambda found: found | {Q: found[Q] * float("nan")})
    with pytest.raises(UserError, match="q_proj.lora_A.weight holds values that are NaN or Inf"):
        opened(config).read("layers.2.query.lora_a", Box(0, 4, 0, 32))
    (tmp_path / "peft/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no adapter_model.safetensors: copy the whole folder"):
        opened(config)


@pytest.mark.parametrize(
    ("matrices", "more", "told"),
    [
        (["experts.up"], {}, "adapter.matrices (experts.up): of experts peft loads gate, up and down together, or down alone: leave out"),
        (["experts.gate", "experts.up"], {}, "adapter.matrices (experts.gate, experts.up): of experts peft loads"),
        (
            EXPERTS,
            dict(rank_pattern={"experts.up": 1}),
            "experts.gate and experts.up are one parameter in peft, and must have the same rank",
        ),
    ],
)
def test_what_peft_would_not_load_is_not_written(configured, tmp_path, matrices, more, told):
    config = configured("mixtral", tmp_path, adapter=dict(rank=2, alpha=2, matrices=matrices) | more)
    with pytest.raises(UserError, match=re.escape(told)):
        peft.write(SimpleNamespace(config=config), "mixtral", tmp_path)
    with pytest.raises(UserError, match="--adapter is for runs with an adapter, .*: leave it out"):
        convert.main(config.train.init_from.parent / "checkpoints/latest", tmp_path / "peft", adapter=True)
    assert not (tmp_path / "peft").exists()
