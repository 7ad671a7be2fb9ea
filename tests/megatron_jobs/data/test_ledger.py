"""Where weights came from is known after every restart, average and new start; ledgers of earlier versions are read."""

import json
import shutil

import pytest

from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.checkpoints.tools import average, summary
from megatron_jobs.data.ledger import Ledger, Origin, PhaseRecord
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_train import train_here
from tests.ranks import run_ranks

DENSE = {"run": "runs/dense", "step": 3, "tokens": 7, "files": {"a": {"bytes": 1, "sha256": "x"}}}
IMPORTED = {"config": {"model_type": "llama", "bos_token_id": None}, "type": "BF16", "other_types": {}}
TWO = "the mean of runs/dense, step 3, 7 tokens; runs/dense, step 4, 7 tokens"


def test_there_and_back():
    before = Ledger(tokens=7, block_length=64, origin=Origin(kind="upcycled", of=(DENSE,), ledger=Ledger(tokens=3)))
    assert Ledger.from_json(before.to_json(), "here") == before


@pytest.mark.parametrize(
    ("key", "value", "kind", "told"),
    [
        ("upcycled_from", DENSE | {"ledger": {"tokens": 7, "phases": []}}, "upcycled", "upcycled from runs/dense, step 3, 7 tokens"),
        ("upcycled_from", {"folder": "hf", "files": {}}, "upcycled", "upcycled from hf"),
        ("averaged_from", [DENSE, DENSE | {"step": 4}], "averaged", TWO),
        ("imported_from", {"folder": "hf"} | IMPORTED, "imported", "imported from hf"),
    ],
)
def test_ledgers_of_version_0_1_are_read(key, value, kind, told):
    ledger = Ledger.from_json(json.dumps({"tokens": 0, "phases": [], key: value}), "here")
    assert ledger.origin.kind == kind and str(ledger.origin) == told
    if kind == "imported":
        assert ledger.untouched_import == IMPORTED
    if "run" in value:
        assert ledger.origin.ledger.tokens == 7


@pytest.mark.parametrize("kind", ["trained", "averaged", "upcycled"])
def test_the_folder_that_it_began_with_is_known_at_the_end_of_any_chain(kind):
    trained = Ledger(tokens=7, origin=Origin(kind="imported", of=({"folder": "hf"},), hugging_face=IMPORTED))
    later = Ledger(tokens=9, origin=Origin(kind=kind, of=(DENSE,), ledger=trained))
    assert Ledger.from_json(later.to_json(), "here").hugging_face == trained.hugging_face == IMPORTED
    assert later.untouched_import is None and Ledger(tokens=9).hugging_face is None


def test_the_longest_sequence_of_any_run_before_is_known():
    def trained(length, **values):
        phases = [PhaseRecord(name="a", steps=1, tokens=length, sequence_length=length, sources={})]
        phases.append(PhaseRecord(name="b", steps=0, tokens=0, sequence_length=4096, sources={}))  # not begun
        return Ledger(tokens=length, phases=tuple(phases), **values)

    for kind in ("trained", "averaged", "upcycled"):
        assert trained(64, origin=Origin(kind=kind, of=(DENSE,), ledger=trained(2048))).context == 2048
    assert trained(128, origin=Origin(kind="trained", of=(DENSE,), ledger=trained(64))).context == 128
    assert Ledger(tokens=3, phases=(PhaseRecord(name="a", steps=1, tokens=3, sources={}),)).context == 0  # of an older version


def test_what_is_no_ledger_is_told():
    with pytest.raises(UserError, match="here: unknown key tokns: did you mean tokens"):
        Ledger.from_json('{"tokns": 3}', "here")


def test_the_origin_survives_restarts_averages_and_new_starts(prepared, tmp_path):
    """A dense run, a mixture upcycled from it that is stopped and goes on, a mean of it, and a run from that mean."""
    run_ranks(1, train_here, tiny(prepared, tmp_path / "dense"), 3)
    mixture = tiny(prepared, tmp_path / "mixture", moe=MOE | {"upcycle_from": str(tmp_path / "dense/checkpoints/latest")})
    run_ranks(1, train_here, mixture, 3)
    first = Checkpoint(tmp_path / "mixture/checkpoints/latest").ledger
    shutil.rmtree(tmp_path / "dense")  # nothing is asked of it again
    run_ranks(1, train_here, mixture)
    second = Checkpoint(tmp_path / "mixture/checkpoints/latest").ledger
    assert first.origin == second.origin and second.origin.kind == "upcycled" and second.origin.ledger.tokens == 3 * 8 * 32
    average([tmp_path / "mixture", tmp_path / "mean"], last=2)
    run_ranks(1, train_here, tiny(prepared, tmp_path / "last", moe=MOE, train=dict(init_from=str(tmp_path / "mean/latest"))), 3)
    last = Checkpoint(tmp_path / "last/checkpoints/latest")
    kinds, ledger = [], last.ledger
    while ledger and ledger.origin:
        kinds.append(ledger.origin.kind)
        ledger = ledger.origin.ledger
    assert kinds == ["trained", "averaged", "upcycled"]
    assert [line.split()[1] for line in summary(last) if line.startswith("origin: ")] == ["from", "the", "upcycled"]
