"""The predicted memory against what real training steps allocate: every allocation of torch's CPU allocator, recorded by its profiler."""

import gc
import re
from typing import Any

import numpy as np
import pytest

from megatron_jobs.checkpoints import weights
from megatron_jobs.config import ParallelConfig, RunConfig, from_dict
from megatron_jobs.planning import memory, plan
from tests.conftest import MOE
from tests.ranks import run_ranks

ATTENTION = ["query", "key", "value", "attention_out"]
BASE = dict(micro_batch_size=3, precision="fp32", init_from="x")
CASES = {
    "one process": (1, dict()),
    "mixture": (1, dict(moe=MOE)),
    "mixture, narrow and shared, every 2nd": (
        1,
        dict(moe=dict(num_experts=8, top_k=4, ffn_hidden_size=320, shared_ffn_hidden_size=640, every=2)),
    ),
    "bf16, data 2": (2, dict(train=dict(micro_batch_size=3, precision="bf16"))),
    "tensor 2": (2, dict(parallel=dict(tensor=2))),
    "pipeline 2": (2, dict(parallel=dict(pipeline=2))),
    "pipeline 2, virtual 2": (2, dict(parallel=dict(pipeline=2, virtual_pipeline=2))),
    "context 2": (2, dict(parallel=dict(context=2))),
    "layers again": (1, dict(train=dict(micro_batch_size=3, precision="fp32", recompute="layers"))),
    "adapter of all": (1, dict(train=BASE, adapter=dict(rank=16, alpha=16, matrices=[*ATTENTION, "gate", "up", "down"]))),
    "adapter of queries, bf16, data 2": (
        2,
        dict(train=BASE | {"precision": "bf16"}, adapter=dict(rank=16, alpha=16, matrices=["query", "value"])),
    ),
    "adapter, tensor 2": (2, dict(train=BASE, parallel=dict(tensor=2), adapter=dict(rank=16, alpha=16, matrices=["query", "down"]))),
    "adapter, pipeline 2": (2, dict(train=BASE, parallel=dict(pipeline=2), adapter=dict(rank=16, alpha=16, matrices=["up", "down"]))),
    "adapter of experts": (
        1,
        dict(
            train=BASE,
            moe=MOE,
            adapter=dict(
                rank=16, alpha=16, matrices=["query", "experts.gate", "experts.up", "experts.down"], rank_pattern={"experts.down": 32}
            ),
        ),
    ),
    "adapter, experts 2": (
        2,
        dict(train=BASE, moe=MOE, parallel=dict(expert=2), adapter=dict(rank=16, alpha=16, matrices=[*ATTENTION, "experts.down"])),
    ),
    "adapter, shared by experts": (
        1,
        dict(train=BASE, moe=MOE, adapter=dict(rank=16, alpha=16, experts="shared", matrices=["experts.gate", "experts.up"])),
    ),
    "adapter, layers again": (
        1,
        dict(train=BASE | {"recompute": "layers"}, adapter=dict(rank=16, alpha=16, matrices=[*ATTENTION, "gate", "up", "down"])),
    ),
    "attention again": (1, dict(train=dict(micro_batch_size=3, precision="fp32", recompute="attention"))),
}


def run_of(sequences: int = 12, **sections: Any) -> RunConfig:
    """A dense model of 27 million parameters, a mixture of 51, in steps of so many sequences."""
    return from_dict(
        {
            "run": "x",
            "tokenizer": "x",
            "model": dict(
                num_layers=4, hidden_size=512, ffn_hidden_size=1280, num_attention_heads=8, num_query_groups=4, vocab_size=16_000
            ),
            "data": dict(folder="x", block_length=256),
            "train": dict(micro_batch_size=3, precision="fp32"),
            "phases": [
                dict(
                    name="web",
                    tokens=sequences * 256,
                    sequence_length=256,
                    global_batch_size=sequences,
                    sources={"web": 1.0},
                    learning_rate=dict(start=1e-3, end=1e-4),
                )
            ],
        }
        | sections,
        "test",
    )


def allocated(config: RunConfig) -> dict[str, int]:
    """Bytes of a rank: what stays from step to step, and the most that a step adds to it."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_jobs.checkpoints.weights import InitialAdapter, InitialWeights
    from megatron_jobs.data.feeder import MicroBatch
    from megatron_jobs.engine import groups
    from megatron_jobs.engine.passes import Passes
    from megatron_jobs.engine.state import TrainingState

    phase, size = config.phases[0], config.train.micro_batch_size

    def step() -> None:
        micro_batches = phase.global_batch_size // (size * parallel_state.get_data_parallel_world_size())
        shape = (size, phase.sequence_length + 1)
        sources = np.zeros(size, dtype=np.int64)
        batches = [MicroBatch(np.random.randint(config.model.vocab_size, size=shape), sources, None) for _ in range(micro_batches)]
        passes.gradients(phase, batches)
        state.gradient_norm()
        state.update(learning_rate=1e-4)

    with groups.of_run(config.parallel, config.seed):
        state = TrainingState(config)
        if config.adapter:
            state.freeze(InitialWeights(config.model, config.moe, config.seed))
        state.start_from(InitialAdapter(config) if config.adapter else InitialWeights(config.model, config.moe, config.seed))
        passes = Passes(config, state, ["web"])
        step()
        gc.collect()
        storages = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        stays = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        peaks = []
        for _ in range(1 if dist.get_world_size() == 1 else 3):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
                step()
            now = most = 0
            for event in profile.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    now += event.nbytes()
                    most = max(most, now)
            peaks.append(most)
    return {"stays": stays, "comes and goes": min(peaks)}  # gloo's threads let go of their copies late when the machine is busy


# One adapter in each kind of layer; the others of adapters prove it again.
REPEATS = [case for case in CASES if case.startswith("adapter") and case not in ("adapter, tensor 2", "adapter of experts")]


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.repeats if case in REPEATS else ()) for case in CASES])
def test_memory_of_a_real_step(case):
    world_size, sections = CASES[case]
    parallel = sections.get("parallel", {})
    whole_model = world_size == parallel.get("tensor", 1) * parallel.get("context", 1)
    config = run_of(6 if whole_model else 12, **sections)  # two micro-batches; twice as many over data ranks and stages
    phase = config.phases[0]
    for rank, found in enumerate(run_ranks(world_size, allocated, config)):
        stage = rank if config.parallel.pipeline > 1 else 0
        predicted = memory.of_stage(config, world_size, stage, phase.sequence_length, phase.global_batch_size, fused=False)
        stays = predicted.weights + predicted.gradients + predicted.optimizer
        print(f"{case}, rank {rank}: stays {stays / found['stays'] - 1:+.1%}, ", end="")
        print(f"comes and goes {(predicted.activations + predicted.buffers) / found['comes and goes'] - 1:+.1%}")
        # Ranks keep the last messages from each other; a message is the residual stream of a micro-batch, in float32. Beside an adapter
        # what routers have told keeps the first one, and its gradient.
        alone = config.parallel.tensor * config.parallel.pipeline == 1
        kept = 4 if not alone else 2 if config.adapter and config.moe else 0
        messages = kept * config.train.micro_batch_size * phase.sequence_length * config.model.hidden_size * 4
        assert stays * 0.999 < found["stays"] < stays * 1.001 + messages + 100_000
        assert predicted.activations + predicted.buffers == pytest.approx(found["comes and goes"], rel=0.1)


SHAPES = {
    "tied": dict(tie_embeddings=True),
    "Qwen2": dict(qkv_bias=True),
    "Qwen3, odd": dict(qk_norm=True, head_size=48, num_attention_heads=6, num_query_groups=3, vocab_size=16_001),
}
MIXTURES = {
    "dense": None,
    "Mixtral": MOE,
    "narrow and shared": dict(num_experts=8, top_k=4, ffn_hidden_size=320, shared_ffn_hidden_size=640),
    "every 3rd": dict(num_experts=4, top_k=1, scores="sigmoid", every=3),
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_matrices(shape, mixture):
    """All of them, those that take part in a token, and what the ranks of every stage hold together."""
    model = dict(num_layers=8, hidden_size=256, ffn_hidden_size=1280, num_attention_heads=8, num_query_groups=4, vocab_size=16_000)
    config = run_of(model=model | SHAPES[shape], moe=MIXTURES[mixture])
    sizes = {name: rows * columns for name, (rows, columns) in weights.shapes(config.model, config.moe)}
    top_k = config.moe.top_k if config.moe else 0
    experts = {name: int(found[1]) for name in sizes if (found := re.search(r"experts\.(\d+)\.", name))}
    active = sum(size for name, size in sizes.items() if experts.get(name, -1) < top_k)
    assert plan.num_parameters(config) == (sum(sizes.values()), active)

    for parallel in (dict(), dict(pipeline=4), dict(pipeline=2, virtual_pipeline=2), dict(expert=2, expert_tensor=2)):
        layout = config.model_copy(update={"parallel": ParallelConfig(**parallel)})
        split = layout.parallel.expert * layout.parallel.expert_tensor
        held = [memory.parameters(layout, stage) for stage in range(layout.parallel.pipeline)]
        second = sizes["embedding"] if config.model.tie_embeddings and layout.parallel.pipeline > 1 else 0  # on the last stage
        assert sum(dense + split * expert for dense, expert in held) == sum(sizes.values()) + second
    of_stages = [memory.mixtures_of(run_of(model=model, moe=MIXTURES[mixture], parallel=dict(pipeline=4)), stage) for stage in range(4)]
    assert of_stages == {"dense": [0] * 4, "every 3rd": [1, 1, 0, 1]}.get(mixture, [2] * 4)


def test_mixtures_of_interleaved_stages():
    """Layers 0, 3 and 6 of 0 1 | 2 3 | 4 5 | 6 7, where a stage has every second chunk."""
    model = dict(num_layers=8, hidden_size=64, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=4, vocab_size=100)
    config = run_of(model=model, moe=MIXTURES["every 3rd"], parallel=dict(pipeline=2, virtual_pipeline=2))
    assert [memory.mixtures_of(config, stage) for stage in (0, 1)] == [1, 2]


def test_chunks_in_flight():
    """One forward, one backward: as many micro-batches as stages behind this one, and its own; interleaved, more of smaller ones."""
    config = run_of(parallel=dict(pipeline=4))
    assert [memory.chunks_in_flight(config, 8, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert memory.chunks_in_flight(config, 2, 0) == 2
    interleaved = run_of(parallel=dict(pipeline=2, virtual_pipeline=2))
    assert [memory.chunks_in_flight(interleaved, 8, stage) for stage in range(2)] == [5, 3]
