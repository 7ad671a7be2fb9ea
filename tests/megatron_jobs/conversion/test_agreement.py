"""The models that the gate goes through layer by layer are the whole ones, and never whole in memory."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_jobs.config.model import ModelConfig, MoEConfig
from megatron_jobs.conversion import agreement
from megatron_jobs.conversion.tensors import read_files
from mujina.user_input import UserError
from tests.ranks import run_ranks

SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, vocab_size=301)
SIZES |= dict(initializer_range=0.1)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
FOLDERS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=2),  # the last two layers only
    "qwen3": Qwen3Config(**SIZES, head_dim=10),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=24, mlp_only_layers=[3], decoder_sparse_step=2),
}
TOKENS = torch.arange(40).view(2, 20) * 7


def saved(config: PreTrainedConfig, folder: Path) -> torch.Tensor:
    """Logits for TOKENS of a random model, which is saved in several files."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="60KB")
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("family", FOLDERS)
def test_transformers_layer_by_layer_is_its_whole_model(tmp_path, family):
    want = saved(FOLDERS[family], tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert agreement.transformers_logits(tmp_path, read_files(files), TOKENS, "test").equal(want)


def test_transformers_names_what_is_missing_or_left_over(tmp_path):
    saved(FOLDERS["mixtral"], tmp_path)
    tensors = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name in ("model.norm.weight", "model.layers.2.self_attn.q_proj.weight"):
        for trouble, changed in (
            ("missing_keys", {other: tensor for other, tensor in tensors.items() if other != name}),
            ("unexpected_keys", tensors | {name + ".more": tensors[name].clone()}),
        ):
            save_file(changed, tmp_path / "all.safetensors", {"format": "pt"})
            last = name.removeprefix("model.layers.2.") + ".more" * (trouble == "unexpected_keys")
            where = "test, layer 2: " if "layers" in name else "test: "
            with pytest.raises(UserError, match=f"^{where}transformers reports {trouble}: .*{re.escape(last)}'"):
                agreement.transformers_logits(tmp_path, read_files([tmp_path / "all.safetensors"]), TOKENS, "test")


def test_layer_by_layer_is_the_whole_model_in_less_memory():
    for tied, rest in ((False, dict(num_experts=4, top_k=2, every=3)), (True, None)):
        difference, peak, whole = run_ranks(1, go_through, tied, rest)[0]
        assert difference == 0
        assert peak < whole / 3, f"{peak:,} bytes for a model of {whole:,}"


def go_through(tied: bool, moe_section: dict | None) -> tuple[float, int, int]:
    """(largest difference of logits, bytes that were allocated at once layer by layer, bytes of the model)"""
    from megatron_jobs.checkpoints.weights import InitialWeights, shapes
    from megatron_jobs.config import ParallelConfig
    from megatron_jobs.engine import groups, placement
    from megatron_jobs.engine.gpt import build

    config = ModelConfig(
        num_layers=12,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=200,
        tie_embeddings=tied,
    )
    moe = MoEConfig(**moe_section) if moe_section else None
    weights = InitialWeights(config, moe, 1)
    tokens = torch.arange(32).view(2, 16)
    with groups.alone():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            found = agreement.megatron_logits(config, moe, weights, tokens)
        gpt = build(config, moe, ParallelConfig(), torch.float32, 16).eval()
        placement.fill(placement.local_parameters(gpt, config, moe), weights)
        with torch.no_grad():
            want = gpt(tokens, torch.arange(16).expand(2, -1), None)[..., : config.vocab_size]
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    whole = sum(4 * rows * columns for _, (rows, columns) in shapes(config, moe))
    return float((found - want).abs().max()), most, whole


def test_weights_that_are_not_finite_are_no_defect_of_ours():
    logits, labels = torch.randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(UserError, match="test: logits agree .*; this is a defect, please report it"):
        agreement.require(agreement.compare(logits, logits + 1, labels, 1e-4), "test")
    broken = logits.where(logits != logits.max(), torch.nan)
    with pytest.raises(UserError, match="test: the model's own logits are not finite .*; take weights that are whole"):
        agreement.require(agreement.compare(broken, broken, labels, 1e-4), "test")
