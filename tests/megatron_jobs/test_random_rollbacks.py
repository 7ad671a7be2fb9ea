"""Whatever happens to a run and its checkpoints: the last usable one stays, and a rollback finds the one that it needs.

./run_tests.sh tests/megatron_jobs/test_random_rollbacks.py                a few random histories (`random_rollbacks.py`)
./run_tests.sh --all tests/megatron_jobs/test_random_rollbacks.py          three thousand
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_jobs import stability, train
from megatron_jobs.checkpoints import saver as saving
from megatron_jobs.config import RunConfig
from megatron_jobs.data import feeder
from mujina import disks
from tests.conftest import tiny
from tests.megatron_jobs.random_rollbacks import LENGTH, History, Model
from tests.ranks import run_ranks

FEW, ALL = 25, 3000


@pytest.mark.parametrize("seeds", [range(FEW), pytest.param(range(FEW, ALL), marks=pytest.mark.repeats)], ids=["few", "all"])
def test_random_histories(prepared, tmp_path, seeds):
    [counts] = run_ranks(1, histories, seeds, tiny(prepared, tmp_path), tmp_path)
    assert min(counts.values()) > 0, counts


@contextmanager
def instead_of_the_model(binaries: Any) -> Iterator[dict[str, Any]]:
    """The trainer without ranks, models, data and a log; the history under way stands in what is yielded."""
    now: dict[str, Any] = {}

    def passes(*_: Any) -> Any:
        history = now["history"]
        return SimpleNamespace(gradients=history.gradients, update=history.update, routing=None)

    replace, prune, finish, roll_back, remove_after, write_rollbacks = (
        disks.rename,
        saving.prune,
        saving.Writer.finish,
        train.Trainer._roll_back,
        saving.remove_after,
        stability.write_rollbacks,
    )

    def rename(old: Path, new: Path) -> None:
        if new.name.startswith(".removed-") and now["history"].disk.random() < now["history"].cannot_remove:
            raise OSError(16, "Device or resource busy")
        replace(old, new)

    def rolls_back(self: Any, verdict: Any, step_in_phase: int) -> None:
        with now["history"].rolls_back(self, step_in_phase):
            roll_back(self, verdict, step_in_phase)

    def removes_after(*arguments: Any) -> None:
        now["history"].may_die(3)
        remove_after(*arguments)
        now["history"].may_die(3)

    def writes(*arguments: Any) -> None:
        now["history"].may_die(3)
        write_rollbacks(*arguments)
        now["history"].may_die(3)

    def finishes(self: Any, *arguments: Any) -> Any:
        now["before"] = now["history"].usable()
        return finish(self, *arguments)

    def prunes(folder: Path, *arguments: Any) -> None:
        prune(folder, *arguments)
        now["history"].finished(now["step"], now["before"])

    save = saving.Saver.save

    def saves(self: Any, step: int, *arguments: Any) -> None:
        self.wait()
        now["step"] = step
        save(self, step, *arguments)

    with ExitStack() as stack:
        for where, name, what in (
            (train, "TrainingState", lambda config: Model()),
            (train, "Passes", passes),
            (train, "Log", lambda *_: mock.MagicMock()),
            (train, "Watch", SimpleNamespace(of_this_process=lambda *_: SimpleNamespace(vitals=lambda *_: None))),
            (feeder, "Feeder", lambda *_: SimpleNamespace(take=lambda step: ([], 0.0))),
            (feeder, "open_sources", lambda config: binaries),
            (train.groups, "data_parallel", lambda: (0, 1)),
            (train.groups, "device_name", lambda: "CPU"),
            (train, "tell_hindrance", lambda config: None),
            (saving, "trained_shapes", lambda config: {"updates": (1, LENGTH)}),
            (saving, "POLL_SECONDS", 0.001),
            (disks, "_sync", lambda descriptor: None),
            (disks, "rename", rename),
            (saving, "prune", prunes),
            (saving.Writer, "finish", finishes),
            (saving, "remove_after", removes_after),
            (stability, "write_rollbacks", writes),
            (saving.Saver, "save", saves),
            (train.Trainer, "_roll_back", rolls_back),
        ):
            stack.enter_context(mock.patch.object(where, name, what))
        yield now


def histories(seeds: range, config: RunConfig, folder: Path) -> dict[str, int]:
    """Goes through them; returns how often what happened."""
    import torch.distributed as dist

    base = config.model_dump(mode="json")
    binaries = feeder.open_sources(config)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    total = Counter[str]()
    with instead_of_the_model(binaries) as now:
        for seed in seeds:
            run = folder / str(seed)
            now["history"] = history = History(seed, run, base)
            try:
                history.go()
            except BaseException as error:
                raise AssertionError(f"history {seed} ({history.counts}): {type(error).__name__}: {error}") from error
            shutil.rmtree(run, ignore_errors=True)
            total.update(history.counts)
    return total
