"""Model FLOPs against sums written out by hand and against torch's count of what a Hugging Face model really multiplies."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_jobs import config
from megatron_jobs.config.model import ModelConfig, MoEConfig
from megatron_jobs.planning import flops

TANUKI_8B, TANUKI_8X8B = (config.load(f"megatron_jobs/configs/{name}.yaml") for name in ("tanuki_8b", "tanuki_8x8b"))


def test_the_reference_models_by_hand():
    attention = 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 4096  # query, key and value, output
    expert = 3 * 4096 * 14336
    output = 65_024 * 4096  # with the 24 rows of padding
    causal = 6 * 32 * 4096 * 2048  # half of 12 × layers × width × sequence
    assert flops.per_token(TANUKI_8B.model, None, 2048) == 6 * (32 * (attention + expert) + output) + causal == 45_084_573_696
    mixture = 32 * (attention + 2 * expert + 4096 * 8) + output
    assert flops.per_token(TANUKI_8X8B.model, TANUKI_8X8B.moe, 2048) == 6 * mixture + causal


@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=4, top_k=2)], ids=["Llama", "Mixtral"])
def test_what_torch_counts(moe):
    """Unfused attention multiplies the whole square of scores, of which the causal half is counted here."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    model = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=256)
    sizes = dict(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=model.padded_vocab_size,
        attn_implementation="eager",
    )
    if moe is None:
        network = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        network = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"))
    tokens = torch.randint(256, (3, 32))
    with FlopCounterMode(display=False) as counter:
        embedded = network.get_input_embeddings()(tokens).detach().requires_grad_()
        network(inputs_embeds=embedded).logits.sum().backward()
    causal_half = 6 * model.num_layers * model.hidden_size * 32
    assert counter.get_total_flops() == tokens.numel() * (flops.per_token(model, moe, 32) + causal_half)


@pytest.mark.parametrize(
    "name, bf16",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("h100", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("CPU, 2 threads a process", None),
    ],
)
def test_peaks_by_the_name_of_the_device(name, bf16):
    assert flops.peak(name, "bf16") == bf16
    assert flops.peak(name, "fp32") is None


def test_memory_by_the_name_of_the_device():
    assert flops.gpu("NVIDIA A100-SXM4-40GB").memory_gib < 40 < flops.gpu("NVIDIA A100-SXM4-80GB").memory_gib
    assert flops.peak("NVIDIA H100 80GB HBM3", "fp8") == 1979e12
