"""What `benchmarks/gpu.py` measures runs, with small shapes and without a GPU, so that it is ready where there is one."""

from typing import Any

import pytest

from tests.ranks import run_ranks

SMALL = ["hidden_size=64", "ffn_hidden_size=128", "num_attention_heads=4", "num_query_groups=2", "num_layers=1", "vocab_size=300"]


def measured(name: str) -> list[dict[str, Any]]:
    from benchmarks import gpu
    from megatron_jobs.engine import groups

    gpu.LENGTH, gpu.REPEATS, gpu.ROUNDS = 32, 1, 1
    with groups.alone():
        return gpu.measure(gpu.shape(name, [f"model.{value}" for value in SMALL]), None)


@pytest.mark.parametrize("name, parameters", [("8B", 64 * (96 * 2 + 128 * 3)), ("8x8B", 64 * (96 * 2 + 128 * 3 * 2 + 8))])
def test_both_rows_count_what_they_ran(name, parameters):
    (step, layers), *_ = run_ranks(1, measured, name)
    attention = 64 * 32  # heads × head size × sequence
    for row, tokens, matrices in ((step, 8 * 32, parameters + 64 * 384), (layers, 32, parameters)):
        seconds = row["milliseconds"] / 1e3
        assert row["tokens_per_second"] * seconds == pytest.approx(tokens)
        assert row["tflops"] * 1e12 * seconds == pytest.approx(tokens * 6 * (matrices + attention))
        assert row["mfu"] is None
