"""The rules of a layout are data, and become words only where they are shown. test_parallel.py holds them against megatron-core."""

import pytest

from megatron_jobs import config as configuration
from megatron_jobs.config import ParallelConfig
from megatron_jobs.planning import layouts
from megatron_jobs.planning.layouts import DIVIDES, Violation
from mujina.user_input import UserError


@pytest.fixture
def mixture():
    return configuration.load("megatron_jobs/configs/tanuki_8x8b.yaml")


def test_what_is_broken_is_told_in_numbers_and_in_words(mixture):
    parallel = mixture.parallel.model_copy(update={"expert": 3})
    first = next(layouts.violations(mixture, parallel, 128))
    assert first == Violation(DIVIDES, "parallel.expert", 3, "moe.num_experts", 8)
    assert str(first) == "parallel.expert (3) must divide moe.num_experts (8): the nearest that do are 1, 2, 4, 8"
    assert not layouts.is_possible(mixture, parallel, 128) and layouts.is_possible(mixture, mixture.parallel, 128)
    with pytest.raises(UserError, match=r"moe.num_experts \(8\).*; the nearest layouts of 128 processes that can be: pipeline 4, expert 4"):
        layouts.check(mixture.model_copy(update={"parallel": parallel}), 128)


def test_a_search_writes_no_words(mixture, monkeypatch):
    monkeypatch.setattr(Violation, "__str__", lambda violation: pytest.fail("an error was written that nobody reads"))
    found = list(layouts.nearest(mixture, 16))
    assert len(found) > 100 and not layouts.is_possible(mixture, ParallelConfig(tensor=3), 16)


def test_divisors():
    assert layouts.divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36] and layouts.divisors(1) == [1]
