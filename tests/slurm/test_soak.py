"""One fault after the other in one run on a real Slurm: losses, ledger and checkpoint are those of a run without any."""

import pytest

from slurm import history
from tests.slurm import faults
from tests.slurm.faults import FAULTS, submit

pytest_plugins = ["tests.cluster"]
INTERVAL, TOKENS_PER_STEP = 4, 8 * 128
TRAIN = dict(micro_batch_size=4, checkpoint_interval=INTERVAL, hang_minutes=0.5)


@pytest.mark.parametrize("count", [len(FAULTS), pytest.param(20, marks=pytest.mark.repeats)])
def test_faults_leave_no_trace(cluster, prepared, tmp_path, count):
    """One of each kind, in a random order."""
    steps = 10 * count
    struck_run, undisturbed = (faults.quickstarts_model(prepared, tmp_path / name, steps, **TRAIN) for name in ("struck", "undisturbed"))
    job = submit(cluster, struck_run)
    struck = faults.soak(job, count, seed=1, steps_between=(2, 6))
    assert job.wait() == "COMPLETED", job.log()
    other = submit(cluster, undisturbed)
    assert other.wait() == "COMPLETED", other.log()
    assert faults.differences(job.run, other.run) == []

    expected = {fault.__name__: outcome for fault, outcome in FAULTS.items()}
    assert {one.kind for one in struck} == set(expected)
    assert [attempt.outcome for attempt in history.attempts(job.run)] == [expected[one.kind] for one in struck] + ["done"]
    # What was trained since the last checkpoint, and while it was written; nothing where there was time to save.
    assert max(one.tokens_lost for one in struck) <= 2 * INTERVAL * TOKENS_PER_STEP
    assert not any(one.tokens_lost for one in struck if expected[one.kind] == "time")
