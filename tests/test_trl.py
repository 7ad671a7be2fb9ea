"""`benchmarks/post_training.py`: what it finds against TRL and peft, which run_tests.sh puts beside .venv, is within its bounds."""

from pathlib import Path

import pytest

from benchmarks import post_training


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert post_training.PEERS.exists(), f"{post_training.PEERS} is missing: start the tests with ./run_tests.sh"
    folder = tmp_path_factory.mktemp("post_training")
    post_training.make_inputs(folder)
    return folder


@pytest.mark.repeats
@pytest.mark.parametrize("part", [post_training.sft, post_training.dpo, post_training.lora])
def test_ours_is_what_the_peers_compute(inputs, part):
    rows = list(part(inputs))
    assert rows and [row for row in rows if not row["found"] <= row["to_reach"]] == []
