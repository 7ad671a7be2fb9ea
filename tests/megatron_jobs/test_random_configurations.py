"""Random configurations, on random ways, train as one process does that nothing happens to; what `mujina train` accepts, no rank refuses.

    ./run_tests.sh tests/megatron_jobs/test_random_configurations.py                       the first ten
    ./run_tests.sh --all tests/megatron_jobs/test_random_configurations.py                 two hundred
    ./run_tests.sh --all "tests/megatron_jobs/test_random_configurations.py::test_a_random_run_is_that_of_one_process[17]"

What fails prints its seed, its configuration as a file for `mujina train`, and what happened on the way (`random_runs.py` draws it).

Rounding is told from error by a control. In float32 a run differs from one process by about 1e-7 of each number, but by far more once a
rounding has sent a token to another expert. So where the difference is more than NEAR, and always with --all, both are run again in
float64: rounding is then about 1e-16, even 1e-9 of it being amplified leaves it below FAR, and what is left above is no rounding.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_jobs.data.feeder import load_tokenizer
from tests.megatron_jobs import random_runs
from tests.megatron_jobs.engine.test_weights import binaries  # noqa: F401
from tests.megatron_jobs.random_runs import Case
from tests.ranks import run_ranks

NEAR, FAR = 1e-6, 1e-9
FEW, ALL = 10, 200
AT_ONCE = 10  # runs of one process that share a start


@pytest.fixture(scope="module")
def drawn(prepared: Path, binaries: Path) -> Callable[[int], Case]:  # noqa: F811
    vocab_size = load_tokenizer(prepared / "tokenizer").vocab_size
    return lambda seed: random_runs.draw(seed, prepared, binaries, vocab_size)


@pytest.fixture(scope="module")
def alone(drawn, tmp_path_factory) -> Callable[[int, bool], Path]:
    """The run folder of the one process of a seed, in float32 or float64."""
    folders: dict[tuple[int, bool], Path] = {}

    def of(seed: int, is_wide: bool) -> Path:
        if (seed, is_wide) not in folders:
            seeds = range(seed // AT_ONCE * AT_ONCE, (seed // AT_ONCE + 1) * AT_ONCE) if not is_wide or seed >= FEW else [seed]
            folders.update({(one, is_wide): tmp_path_factory.mktemp(f"alone-{one}") for one in seeds})
            cases = [drawn(one) for one in seeds]
            run_ranks(1, random_runs.train_alone, [(case.config(folders[case.seed, is_wide]), case.nan_at) for case in cases], is_wide)
        return folders[seed, is_wide]

    return of


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.repeats if seed >= FEW else ()) for seed in range(ALL)])
def test_a_random_run_is_that_of_one_process(drawn, alone, tmp_path, seed):
    case = drawn(seed)
    print(case)
    found = carried_out(case, tmp_path / "float32", alone, is_wide=False)
    if found > NEAR or seed >= FEW:
        control = carried_out(case, tmp_path / "float64", alone, is_wide=True)
        assert control < FAR, f"{found:.1e} in float32, and {control:.1e} in float64: no rounding"


def carried_out(case: Case, run: Path, alone: Callable[[int, bool], Path], is_wide: bool) -> float:
    """How far the run is from the one process."""
    for stage in case.stages:
        random_runs.start(case.config(run, stage), stage, case.nan_at, is_wide)
    return random_runs.difference(run, alone(case.seed, is_wide))


def test_the_draws_reach_every_option(drawn):
    """What a choice of the generator never gets past the check would not be tried."""
    cases = [drawn(seed) for seed in range(ALL)]
    layouts = [stage.parallel for case in cases for stage in case.stages]
    for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor"):
        assert sum(name in parallel for parallel in layouts) > 10, name
    mixtures = [case.values["moe"] for case in cases if case.values["moe"]]
    for name in ("balancing", "scores", "dispatcher", "top_k", "capacity_factor", "every", "normalize_logits"):
        values = [moe[name] for moe in mixtures]
        assert all(values.count(value) >= 5 for value in set(values)) and len(set(values)) > 1, (name, values)
    phases = [phase for case in cases for phase in case.values["phases"]]
    assert min(sum("batch_ramp" in phase for phase in phases), sum(phase["separate_documents"] for phase in phases)) > 10
    assert (
        min(sum(stage.killed is not None for case in cases for stage in case.stages), sum(case.nan_at is not None for case in cases)) > 10
    )
    assert sum(case.num_refused for case in cases) > len(cases)
