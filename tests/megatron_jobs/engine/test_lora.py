"""Adapters beside a frozen base: the same at every layout, to the last bit after a restart, merged to what they compute."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_jobs import check
from megatron_jobs.checkpoints.checkpoint import STATES, Checkpoint, write_weights
from megatron_jobs.checkpoints.weights import InitialWeights, trained_shapes
from megatron_jobs.config import RunConfig
from megatron_jobs.data import phases
from megatron_jobs.data.ledger import Ledger
from mujina.matrices import Box
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.engine.test_passes import one_phase
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks

ATTENTION = ["query", "key", "value", "attention_out"]
DENSE = dict(rank=4, alpha=8, matrices=[*ATTENTION, "gate", "up", "down"])
EACH = dict(rank=3, alpha=8, matrices=["query", "value", "experts.gate", "experts.up", "experts.down"])
ONE_FOR_ALL = EACH | dict(experts="shared", rank_pattern={"experts.up": 5}, alpha_pattern={"experts.down": 2})
# Every other layer dense, a shared expert, and query alone of what lies in one parameter.
HALF = dict(rank=2, alpha=1, matrices=["query", "up", "shared.gate", "shared.down", "experts.down"])
HALF |= dict(rank_pattern={"up": 5, "experts.down": 3}, alpha_pattern={"query": 3})
OF_HALF = MOE | dict(every=2, ffn_hidden_size=32, shared_ffn_hidden_size=32)
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "dense": (DENSE, None),
    "each": (EACH, MOE),
    "one-for-all": (ONE_FOR_ALL, MOE),
    "half": (HALF, OF_HALF),
}
LAYOUTS = [
    ("dense", 2, dict()),
    ("dense", 4, dict(tensor=2, pipeline=2, virtual_pipeline=2)),
    ("dense", 2, dict(context=2)),
    ("each", 4, dict(tensor=2, expert=2, expert_tensor=2)),
    ("each", 4, dict(context=2, pipeline=2, virtual_pipeline=2, expert_tensor=2)),
    ("each", 2, dict(expert=2)),
    ("one-for-all", 4, dict(tensor=2, expert=2, expert_tensor=2)),
    ("one-for-all", 4, dict(context=2, tensor=2, expert=4)),
    ("half", 2, dict(tensor=2)),
    ("half", 4, dict(pipeline=2, expert=2)),
]
# 3 query groups on 2 tensor-parallel ranks: one of zeros is there for them alone.
MODEL_OF_HALF = dict(num_attention_heads=6, num_query_groups=3, head_size=8, qkv_bias=True, qk_norm=True)


def cases(*telling: int) -> list[Any]:
    """All layouts; those that prove again what the `telling` ones do are left to ./run_tests.sh --all."""
    return [
        pytest.param(
            layout,
            id="-".join([layout[0], str(layout[1]), *(f"{key}{size}" for key, size in layout[2].items())]),
            marks=() if n in telling else pytest.mark.repeats,
        )
        for n, layout in enumerate(LAYOUTS)
    ]


@pytest.fixture(scope="module")
def configured(prepared, tmp_path_factory):
    """The configuration of a run of four steps with an adapter of MODELS, beside a base without training."""
    bases: dict[str, Path] = {}

    def of(kind: str, run: Path, **sections: Any) -> RunConfig:
        (adapter, moe), model = MODELS[kind], MODEL_OF_HALF if kind == "half" else {}
        if kind not in bases:
            folder = tmp_path_factory.mktemp(f"base-{kind}")
            config = tiny(prepared, folder, moe=moe, model=model)
            weights = InitialWeights(config.model, config.moe, 7)
            bases[kind] = write_weights(folder / "checkpoints", config, weights, weights.shapes, Ledger(), "writing")
        train = dict(init_from=str(bases[kind]), checkpoint_interval=2) | sections.pop("train", {})
        sections = dict(adapter=adapter, moe=moe, model=model, phases=one_phase(4)) | sections
        return tiny(prepared, run, train=train, **sections)

    return of


@pytest.fixture(scope="module")
def trained(configured, tmp_path_factory):
    """The folder of a whole run, trained when it is first asked for."""
    folders: dict[str, Path] = {}

    def run(kind: str, world: int = 1, sizes: Any = None) -> Path:
        key = f"{kind}-{world}-{sizes}"
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(kind)
            run_ranks(world, train_here, configured(kind, folders[key], parallel=sizes or {}))
        return folders[key]

    return run


def norms(run: Path) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def whole(checkpoint: Checkpoint, name: str, state: str = "master") -> Any:
    rows, columns = checkpoint.shapes[name]
    return checkpoint.read(name, Box(0, rows, 0, columns), state)


@pytest.mark.parametrize("case", cases(0, 1, 3, 6, 8))
def test_every_layout_follows_one_process(trained, case):
    kind, world, sizes = case
    alone, run = trained(kind), trained(*case)
    assert len(losses(alone)) == 4 and losses(alone)[3] < losses(alone)[0]
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    assert norms(run) == pytest.approx(norms(alone), rel=1e-4)
    one, other = (Checkpoint(folder / "checkpoints/latest") for folder in (alone, run))
    assert other.shapes == one.shapes
    for name in one.shapes:
        assert whole(other, name).sub(whole(one, name)).abs().max() < 2e-3, name  # a learning rate is 1e-2


@pytest.mark.parametrize("case", cases(1, 3))
def test_a_restart_is_bit_identical_and_goes_to_another_layout(configured, tmp_path, trained, case):
    kind, world, sizes = case
    again, elsewhere = tmp_path / "again", tmp_path / "elsewhere"
    for run, ranks, parallel in ((again, world, sizes), (elsewhere, 1, {})):
        shutil.copytree(trained(*case), run, symlinks=True)
        shutil.rmtree(run / "checkpoints/step-00000004")
        run_ranks(ranks, train_here, configured(kind, run, parallel=parallel))
    assert losses(again) == losses(trained(*case))
    assert losses(elsewhere) == pytest.approx(losses(trained(*case)), rel=1e-4)
    one, other = (Checkpoint(run / "checkpoints/latest") for run in (again, trained(*case)))
    for name in one.shapes:
        assert all(whole(one, name, state).equal(whole(other, name, state)) for state in STATES), name


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_loss_is_that_of_the_base(configured, tmp_path, trained, kind):
    run_ranks(1, train_here, configured(kind, tmp_path, adapter=None), 1)
    assert losses(trained(kind))[0] == losses(tmp_path)[0]


@pytest.mark.parametrize("kind, world, sizes", [("each", 1, {}), ("half", 2, dict(tensor=2))])
def test_the_base_has_no_gradient_and_stays_to_the_last_bit(configured, tmp_path, kind, world, sizes):
    moe = MODELS[kind][1] | dict(scores="sigmoid", balancing="bias", bias_update_rate=0.1)
    run_ranks(1, train_here, configured(kind, tmp_path / "base", moe=moe, adapter=None, train=dict(init_from=None)), 2)
    config = configured(kind, tmp_path / "run", moe=moe, parallel=sizes, train=dict(init_from=str(tmp_path / "base/checkpoints/latest")))
    assert run_ranks(world, frozen_after_training, config) == [("same", sum(r * c for r, c in trained_shapes(config).values()))] * world


def frozen_after_training(config: RunConfig) -> tuple[str, int]:
    """What differs from the base after a run, and how many values have a gradient buffer."""
    from megatron_jobs import train
    from megatron_jobs.engine import groups, placement

    with groups.of_run(config.parallel, config.seed):
        trainer = train.Trainer(config, lambda: None)
        trainer.train(lambda: False)
        base, buffered = Checkpoint(config.train.init_from), 0
        for chunk in trainer.state.chunks:
            buffered += sum(parameter.numel() for parameter in chunk.parameters() if hasattr(parameter, "main_grad"))
            for local in placement.local_parameters(chunk.module, config.model, config.moe):
                for part in local.parts:
                    if "lora_" not in part.name:
                        values = part.of(local.parameter.detach().view(-1, local.columns))
                        if not values.equal(base.read(part.name, part.box)):
                            return part.name, buffered
        return "same", buffered


@pytest.mark.parametrize("world, sizes", [(1, {}), (2, dict(pipeline=2))])
def test_experts_alone_of_the_first_layer_alone(configured, tmp_path, world, sizes):
    """No dense matrix is trained; of two stages the second one trains nothing at all."""
    sections = dict(moe=MOE | dict(every=4), adapter=dict(rank=2, alpha=4, matrices=["experts.up", "experts.down"]), parallel=sizes)
    config = configured("half", tmp_path / "run", train=dict(init_from=str(tmp_path / "base")), **sections)
    weights, whole_model = InitialWeights(config.model, config.moe, 7), config.model_copy(update={"adapter": None})
    (tmp_path / "base").symlink_to(write_weights(tmp_path / "checkpoints", whole_model, weights, weights.shapes, Ledger(), "writing"))
    run_ranks(world, train_here, config)
    assert len(losses(config.run)) == 4 and losses(config.run)[3] < losses(config.run)[0] and min(norms(config.run)) > 0


@pytest.mark.parametrize("recompute", ["attention", "layers"])
def test_recomputed_activations_change_nothing(configured, tmp_path, trained, recompute):
    run_ranks(1, train_here, configured("dense", tmp_path, train=dict(recompute=recompute)))
    assert losses(tmp_path) == pytest.approx(losses(trained("dense")), rel=1e-6)


def test_bf16(configured, tmp_path, trained):
    run_ranks(1, train_here, configured("dense", tmp_path, train=dict(precision="bf16")))
    assert losses(tmp_path) == pytest.approx(losses(trained("dense")), rel=2e-2)


@pytest.mark.parametrize("kind", ["dense", "each", "one-for-all"])
def test_the_merged_folder_computes_what_the_adapter_does(configured, tmp_path, trained, kind):
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_jobs.conversion import convert

    run = trained(kind)
    run_ranks(1, convert.main, run / "checkpoints/latest", tmp_path / "merged")
    tokens = torch.arange(64).view(2, 32) % 300
    beside, base = map(torch.from_numpy, run_ranks(1, logits_of_adapter_and_base, configured(kind, run), tokens)[0])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens).logits
    assert (merged - beside).abs().max() / beside.abs().max() < 1e-5
    assert (base - beside).abs().max() / beside.abs().max() > 1e-2


def logits_of_adapter_and_base(config: RunConfig, tokens: Any) -> list[Any]:
    import torch

    from megatron_jobs.conversion import agreement
    from megatron_jobs.engine import groups
    from megatron_jobs.engine.gpt import forward
    from megatron_jobs.engine.state import TrainingState

    base = Checkpoint(config.train.init_from)
    with groups.of_run(config.parallel, config.seed):
        state = TrainingState(config)
        state.freeze(base)
        state.restore(Checkpoint(config.run / "checkpoints/latest"))
        with torch.no_grad():
            beside = forward(state.chunks[0].module.eval(), tokens)[..., : config.model.vocab_size]
        return [beside.numpy(), agreement.megatron_logits(config.model, config.moe, base, tokens).numpy()]


def test_another_base_is_refused_by_name(configured, tmp_path, trained):
    run = tmp_path / "run"
    shutil.copytree(trained("dense"), run, symlinks=True)
    config = configured("dense", tmp_path / "other", adapter=None)
    run_ranks(1, train_here, config, 2)
    other = tmp_path / "other/checkpoints/step-00000002"
    its_base = Checkpoint(run / "checkpoints/latest").ledger.base["run"]
    message = f"train.init_from ({other}): is not the base of the adapter in {run}/checkpoints/step-00000004, which was trained beside "
    message += its_base
    changed = configured("dense", run, train=dict(init_from=str(other)))
    with pytest.raises(AssertionError, match=re.escape(message)):
        run_ranks(1, train_here, changed)
    with pytest.raises(UserError, match=re.escape(message)):
        check.check(changed, 1)
    with pytest.raises(UserError, match=r"train.init_from \(.*away\): no such folder"):
        check.check(configured("dense", run, train=dict(init_from=str(tmp_path / "away"))), 1)
    check.check(configured("dense", run), 1)
    with pytest.raises(AssertionError, match=r"train.init_from \(.*\): holds an adapter alone, and a whole model is needed: name its base"):
        run_ranks(1, train_here, configured("dense", tmp_path / "new", train=dict(init_from=str(run / "checkpoints/latest"))))


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("dense", dict(rank=0), "adapter.rank (0)"),
        ("dense", dict(alpha=0), "adapter.alpha (0)"),
        ("dense", dict(matrices=["querry"]), "is no matrix that can have an adapter: did you mean query?"),
        ("dense", dict(matrices=[]), "adapter.matrices"),
        ("dense", dict(matrices=["up", "up"]), "every name must stand once"),
        ("dense", dict(matrices=["experts.up"]), "adapter.matrices (experts.up): a dense model has no experts: write up, or take it out"),
        ("each", dict(matrices=["up"]), "adapter.matrices (up): all FFNs of this model are mixtures: write experts.up"),
        ("each", dict(matrices=["shared.up"]), "adapter.matrices (shared.up): this model has no shared expert"),
        ("dense", dict(dropout=0.1), "dropout (0.1) must be 0"),
        ("dense", dict(rank_pattern={"experts.up": 2}), "rank_pattern: experts.up is none of matrices (query, "),
    ],
)
def test_what_cannot_be_is_refused(configured, tmp_path, kind, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        configured(kind, tmp_path, adapter=MODELS[kind][0] | change)


def test_a_run_keeps_its_adapter(configured, tmp_path):
    """At a restart all that decides what A and B are is as it was; where the first ones were read from is past."""
    before = configured("dense", tmp_path)
    for field, value in dict(rank=5, alpha=9.0, matrices=["query"], experts="shared", rank_pattern={"up": 2}).items():
        with pytest.raises(UserError, match=rf"^adapter.{field} was .* when this run began, and is .* now: restore it, or start another"):
            phases.check_resumable(before, configured("dense", tmp_path, adapter=DENSE | {field: value}), 1)
    for one, other in ((None, DENSE), (DENSE, None)):
        with pytest.raises(UserError, match="^adapter was .* when this run began"):
            phases.check_resumable(configured("dense", tmp_path, adapter=one), configured("dense", tmp_path, adapter=other), 1)
    phases.check_resumable(before, configured("dense", tmp_path, adapter=DENSE | {"init_from": "elsewhere"}), 1)


def test_an_adapter_needs_a_base_and_not_in_fp8(configured, tmp_path):
    with pytest.raises(UserError, match=r"train.precision \(fp8\) must be bf16 or fp32 with an adapter"):
        configured("dense", tmp_path, train=dict(precision="fp8"))
    with pytest.raises(UserError, match="adapter needs a base: write train.init_from"):
        configured("dense", tmp_path, train=dict(init_from=None))
