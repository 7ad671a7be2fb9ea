"""Every parallelism follows one process, checkpoints go from any layout to any other, and what cannot be is refused beforehand."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_jobs.checkpoints.checkpoint import STATES, Checkpoint
from megatron_jobs.config import ParallelConfig, RunConfig
from megatron_jobs.planning import layouts
from mujina.matrices import Box
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks

# Each parallelism alone, and each pair of them at least once (processes, sizes).
DENSE = [
    (2, dict()),
    (2, dict(tensor=2)),
    (2, dict(pipeline=2)),
    (2, dict(context=2)),
    (2, dict(pipeline=2, virtual_pipeline=2)),
    (4, dict(tensor=2, pipeline=2)),
    (4, dict(tensor=2, pipeline=2, virtual_pipeline=2)),
    (4, dict(tensor=2, context=2)),
]
MIXTURE = [
    (2, dict()),
    (2, dict(expert=2)),
    (2, dict(expert_tensor=2)),
    (2, dict(tensor=2)),
    (2, dict(pipeline=2)),
    (2, dict(tensor=2, expert=2)),
    (4, dict(pipeline=2, expert=2)),
    (4, dict(tensor=2, expert=2, expert_tensor=2)),
    (4, dict(context=2, pipeline=2, virtual_pipeline=2, expert_tensor=2)),
    (4, dict(context=2, tensor=2, expert=4)),
]
LAYOUTS = [(world, sizes, None) for world, sizes in DENSE] + [(world, sizes, MOE) for world, sizes in MIXTURE]


def name(case: Any) -> str:
    world, sizes, moe = case
    return f"{'mixture' if moe else 'dense'}-{world}" + "".join(f"-{key}{size}" for key, size in sizes.items())


def cases(are_repeats: Callable[[str], bool]) -> list[Any]:
    """All layouts. Those that prove again what the others do are left to ./run_tests.sh --all: there every test has every layout."""
    return [pytest.param(case, id=name(case), marks=pytest.mark.repeats if are_repeats(name(case)) else ()) for case in LAYOUTS]


# Each parallelism of these is there alone, or in a pair with the same other one, without them.
COVERED = {"dense-4-tensor2-pipeline2", "mixture-2-tensor2", "mixture-2-pipeline2", "mixture-2-tensor2-expert2"}
# What divides the matrices, their optimizer's state and the experts in every way, and chunks of stages, with as few runs as will do.
TELLING = {
    "dense-2",
    "dense-4-tensor2-pipeline2-virtual_pipeline2",
    "mixture-4-tensor2-expert2-expert_tensor2",
    "mixture-4-context2-pipeline2-virtual_pipeline2-expert_tensor2",
}


def gradient_norms(run: Path) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """The folder of a whole run at a layout, trained when it is first asked for; layout (1, {}, moe) is what all must follow."""
    folders = {}

    def run(world: int, sizes: dict[str, int], moe: Any) -> Path:
        key = name((world, sizes, moe))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(key)
            run_ranks(world, train_here, tiny(prepared, folders[key], moe=moe, parallel=sizes))
        return folders[key]

    return run


def stopped_at_6(run: Path, to: Path) -> None:
    """A copy of a run as it stood at the end of its first phase."""
    shutil.copytree(run, to, dirs_exist_ok=True, symlinks=True)
    for later in ("step-00000009", "step-00000010"):
        shutil.rmtree(to / "checkpoints" / later)


@pytest.mark.parametrize("case", cases(COVERED.__contains__))
def test_every_layout_follows_one_process(trained, case):
    alone, run = trained(1, {}, case[2]), trained(*case)
    expected = losses(alone)
    assert len(expected) == 10 and expected[5] < expected[0]
    assert losses(run) == pytest.approx(expected, rel=1e-4)
    assert gradient_norms(run) == pytest.approx(gradient_norms(alone), rel=1e-4)


@pytest.mark.parametrize("case", cases(lambda layout: layout not in TELLING))
def test_a_checkpoint_of_one_process_goes_on_at_every_layout(prepared, tmp_path, trained, case):
    """Also the optimizer's state: without it the losses behind the restart would differ by far more.

    A rounding difference may send a token of a mixture to another expert, hence the bound of 1e-4.
    """
    world, sizes, moe = case
    stopped_at_6(trained(1, {}, moe), tmp_path)
    run_ranks(world, train_here, tiny(prepared, tmp_path, moe=moe, parallel=sizes))
    assert losses(tmp_path) == pytest.approx(losses(trained(1, {}, moe)), rel=1e-4)


@pytest.mark.parametrize("case", cases(lambda layout: layout not in TELLING))
def test_a_checkpoint_of_every_layout_goes_on_in_one_process(prepared, tmp_path, trained, case):
    stopped_at_6(trained(*case), tmp_path)
    run_ranks(1, train_here, tiny(prepared, tmp_path, moe=case[2]))
    assert losses(tmp_path) == pytest.approx(losses(trained(1, {}, case[2])), rel=1e-4)


@pytest.mark.parametrize("case", cases(lambda layout: layout not in TELLING))
def test_a_restart_at_the_same_layout_is_bit_identical(prepared, tmp_path, trained, case):
    """Stopped in the middle of a phase and again at the phase boundary; losses and final weights and moments are equal."""
    world, sizes, moe = case
    for last_step in (3, 6, None):
        run_ranks(world, train_here, tiny(prepared, tmp_path, moe=moe, parallel=sizes), last_step)
    assert losses(tmp_path) == losses(trained(*case))
    one, other = (Checkpoint(run / "checkpoints/latest") for run in (trained(*case), tmp_path))
    assert one.ledger == other.ledger
    for matrix, (rows, columns) in one.shapes.items():
        for state in STATES:
            assert one.read(matrix, Box(0, rows, 0, columns), state).equal(other.read(matrix, Box(0, rows, 0, columns), state)), (
                matrix,
                state,
            )


UNEVEN = dict(num_attention_heads=6, num_query_groups=3, head_size=8, qkv_bias=True, qk_norm=True)


def test_query_groups_that_tensor_does_not_divide(prepared, tmp_path):
    """3 groups on 2 ranks: one of zeros makes it 4. No loss or checkpoint knows of it, whatever the layout before and after."""
    alone, split = tmp_path / "alone", tmp_path / "split"
    for run, world in ((alone, 1), (split, 2)):
        run_ranks(world, train_here, tiny(prepared, run, model=UNEVEN, parallel=dict(tensor=world)))
    assert losses(split) == pytest.approx(losses(alone), rel=1e-4)
    assert gradient_norms(split) == pytest.approx(gradient_norms(alone), rel=1e-4)
    assert Checkpoint(split / "checkpoints/latest").shapes == Checkpoint(alone / "checkpoints/latest").shapes
    for run, world in ((alone, 2), (split, 1)):
        stopped_at_6(run, tmp_path / f"on-{world}")
        run_ranks(world, train_here, tiny(prepared, tmp_path / f"on-{world}", model=UNEVEN, parallel=dict(tensor=world)))
        assert losses(tmp_path / f"on-{world}") == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_groups_of_zeros_stay_zero(prepared, tmp_path, precision):
    config = tiny(prepared, tmp_path, model=UNEVEN, parallel=dict(tensor=2), train=dict(precision=precision))
    first, second = run_ranks(2, after_updates, config)
    assert first == {"values without a part": 0}
    hidden, head = config.model.hidden_size, config.model.head_size
    # of a query group: 2 queries, a key and a value with their biases, and the columns that take in what the 2 heads give
    assert second == {"values without a part": config.model.num_layers * (4 * head * (hidden + 1) + hidden * 2 * head), "largest": 0.0}


def after_updates(config: RunConfig) -> dict[str, float]:
    """What this rank's parameters and their optimizer's state hold outside of the named matrices, after three updates."""
    import torch

    from megatron_jobs import train
    from megatron_jobs.engine import groups
    from megatron_jobs.engine.state import TrainingState

    states = []
    made = TrainingState.__init__
    TrainingState.__init__ = lambda self, config: (made(self, config), states.append(self))[0]
    with groups.of_run(config.parallel, config.seed):
        train.train(config, last_step=3)
        [state] = states
        outside = []
        for local in state.parameters:
            is_outside = torch.ones(local.parameter.shape, dtype=torch.bool).view(-1, local.columns)
            for part in local.parts:
                part.of(is_outside).fill_(False)
            outside.append(local.parameter.detach().view(-1, local.columns)[is_outside])
    values = torch.cat(outside)
    return {"values without a part": len(values)} | ({"largest": float(values.abs().max())} if len(values) else {})


@pytest.mark.parametrize("recompute, case", [("attention", (2, dict(tensor=2), None)), ("layers", (2, dict(expert=2), MOE))])
def test_recomputed_activations_change_nothing(prepared, tmp_path, trained, recompute, case):
    world, sizes, moe = case
    run_ranks(world, train_here, tiny(prepared, tmp_path, moe=moe, parallel=sizes, train=dict(recompute=recompute)))
    assert losses(tmp_path) == pytest.approx(losses(trained(*case)), rel=1e-6)


@pytest.mark.parametrize(
    "world, sizes, moe, message",
    [
        (4, dict(context=8), None, "tensor × parallel.pipeline × parallel.context (8) must divide the number of processes (4)"),
        (2, dict(virtual_pipeline=2), None, "parallel.virtual_pipeline (2) needs parallel.pipeline above 1"),
        (2, dict(pipeline=2, virtual_pipeline=4), None, "parallel.virtual_pipeline (8) must divide model.num_layers (4)"),
        (2, dict(expert_tensor=2), None, "parallel.expert_tensor (2) needs a moe section"),
        (2, dict(expert=2, expert_tensor=2), MOE, "parallel.expert_tensor (4) must divide the processes of a pipeline stage (2)"),
        (3, dict(expert_tensor=3), MOE, "parallel.expert_tensor (3) must divide model.ffn_hidden_size (64): the nearest that do are 1, 2"),
        (32, dict(context=32), None, "2 × parallel.context (64) must divide phases.web.sequence_length (32)"),
        (4, dict(pipeline=2, virtual_pipeline=2), None, "parallel.pipeline (8) must divide phases.chat.global_batch_size (4)"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_that_can(prepared, tmp_path, world, sizes, moe, message):
    config = tiny(prepared, tmp_path, moe=moe, parallel=sizes)
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        layouts.check(config, world)
    assert "that can" in str(refused.value)
    for layout in layouts.nearest(config, world):
        layouts.check(config.model_copy(update={"parallel": layout}), world)


def test_the_nearest_layouts_come_first(prepared, tmp_path):
    config = tiny(prepared, tmp_path, parallel=dict(tensor=2, pipeline=2, virtual_pipeline=4))
    assert next(layouts.nearest(config, 4)) == ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2)
    first = "the nearest layouts of 4 processes that can be: tensor 2, pipeline 2, virtual_pipeline 2; "
    with pytest.raises(UserError, match=re.escape(first)):
        layouts.check(config, 4)
    with pytest.raises(UserError, match="no layout of 3 processes can be; the nearest number that can is 2 "):
        layouts.check(config, 3)


def test_check_accepts_what_megatron_core_builds(prepared, tmp_path):
    """Every size of every field over 1 … 4 processes; `layouts.nearest` lists all of them, also over 8 (without building)."""
    model = dict(num_query_groups=4)  # tensor ranks may share fewer in megatron-core, but not in `placement.py`
    for moe in (None, MOE):
        config = tiny(prepared, tmp_path, model=model, moe=moe, train=dict(micro_batch_size=1))
        wanted = {world: every_layout(world, moe) for world in (1, 2, 3, 4, 8)}
        accepted = {world: [layout for layout in every if is_accepted(config, world, layout)] for world, every in wanted.items()}
        for world, possible in accepted.items():
            assert sorted(map(str, possible)) == sorted(map(str, layouts.nearest(config, world)))
        assert len(accepted[8]) > len(accepted[4]) > len(accepted[2]) > 2
        del wanted[8], accepted[8]
        assert run_ranks(1, buildable, config, wanted)[0] == accepted


def every_layout(world: int, moe: Any) -> list[ParallelConfig]:
    """Those that pass the two rules which megatron-core begins with, virtual pipelines of up to 4 chunks."""
    sizes = [size for size in (1, 2, 3, 4, 8) if size <= world]
    return [
        ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context, expert=expert, expert_tensor=cut)
        for tensor, pipeline, context in product(sizes, repeat=3)
        for virtual in (1, 2, 3, 4)
        for expert, cut in (product(sizes, repeat=2) if moe else [(1, 1)])
        if world % (tensor * pipeline * context) == 0
        and world % (pipeline * expert * cut) == 0
        and tensor != 3  # of 4 query groups: 2, 2 and none; megatron-core builds groups of zeros alone, `check` refuses them
    ]


def is_accepted(config: RunConfig, world: int, layout: ParallelConfig) -> bool:
    try:
        layouts.check(config.model_copy(update={"parallel": layout}), world)
        return True
    except UserError:
        return False


def buildable(config: RunConfig, wanted: dict[int, list[ParallelConfig]]) -> dict[int, list[ParallelConfig]]:
    """Those whose groups, model and batches megatron-core can make, by its own assertions; no process is started for it."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
    from megatron.core.utils import get_batch_on_this_cp_rank
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_jobs.engine import gpt, groups

    def build(world: int, layout: ParallelConfig) -> None:
        groups.initialize(layout)
        for chunk in range(layout.virtual_pipeline):
            gpt.build(config.model, config.moe, layout, torch.float32, 64, chunk=chunk)
        for phase in config.phases:
            count = ConstantNumMicroBatchesCalculator(phase.global_batch_size, 1, layout.data(world), False, 0).get()
            if layout.virtual_pipeline > 1 and count % layout.pipeline:
                raise ValueError("raised by the interleaved schedule, once it runs")
            batch = {"tokens": torch.zeros(1, phase.sequence_length)}
            get_batch_on_this_cp_rank(batch, False, cp_group=parallel_state.get_context_parallel_group())

    groups.prepare_device()
    result: dict[int, list[ParallelConfig]] = {}
    for world in wanted:
        result[world] = []
        dist.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
        for layout in wanted[world]:
            try:
                build(world, layout)
                result[world].append(layout)
            except (AssertionError, RuntimeError, ValueError):
                pass
            finally:
                parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return result


def test_fp8_asks_for_transformer_engine(prepared, tmp_path):
    with pytest.raises(AssertionError, match=r"UserError: train.precision \(fp8\) needs Transformer Engine on a GPU"):
        run_ranks(1, train_here, tiny(prepared, tmp_path, train=dict(precision="fp8")))


def test_without_fp8_turns_it_off_and_on_again(prepared, tmp_path):
    inside, after = run_ranks(1, toggled, tiny(prepared, tmp_path))[0]
    assert inside == {None} and after == {"hybrid"}


def toggled(config: RunConfig) -> tuple[set[Any], set[Any]]:
    """What the modules of a model stand at within `without_fp8` and behind it."""
    import torch

    from megatron_jobs.engine import groups
    from megatron_jobs.engine.gpt import build, forward, transformer_config, without_fp8

    fp8 = transformer_config(config.model, None, config.parallel, torch.bfloat16, fp8=True).fp8
    with groups.alone():
        gpt = build(config.model, None, config.parallel, torch.bfloat16, 64)
        gpt.config.fp8 = fp8  # such a model is built by Transformer Engine alone

        def states() -> set[Any]:
            return {module.config.fp8 for module in gpt.modules() if hasattr(module, "config")}

        with without_fp8(gpt):
            inside = states()
            forward(gpt, torch.zeros(1, 8, dtype=torch.long))
        return inside, states()
