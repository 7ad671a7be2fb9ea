"""Random histories of a run's checkpoints: the real trainer, with a model that only remembers which steps it was updated by.

A history is a pure function of its seed: a run is started again and again, with other settings; steps are not finite, processes are told
to stop or die, folders are damaged, removed by hand, or cannot be removed. What must hold whatever happens is asserted on the way.
"""

import json
import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_jobs import check, train
from megatron_jobs.checkpoints.checkpoint import Checkpoint
from megatron_jobs.config import from_dict
from megatron_jobs.data import phases
from mujina.checkpoint_folders import step_folder, steps
from mujina.matrices import Box
from mujina.user_input import UserError

LENGTH = 256  # of what the model remembers: more than a run has steps
KEY = "master/updates/0/0"


class Died(BaseException):
    """The process is gone at this moment."""


class Model:
    """Stands for `TrainingState`: its weights are the steps that it was updated by."""

    def __init__(self) -> None:
        self.by: list[int] = []
        self.updates, self.gradients_at, self.norm = 0, 0.0, 1.0

    def boxes(self) -> dict[str, torch.Tensor]:
        return {KEY: torch.tensor([self.by + [0] * (LENGTH - len(self.by))], dtype=torch.float32)}

    def restore(self, start: Checkpoint) -> None:
        self.by, self.updates = remembered(start), start.updates

    def start_from(self, weights: Any) -> dict[str, int]:
        self.by, self.updates = [], 0
        return {}

    def gradient_norm(self) -> float:
        return self.norm


def remembered(start: Checkpoint) -> list[int]:
    return [int(step) for step in start.read("updates", Box(0, 1, 0, LENGTH))[0].tolist() if step]


class History:
    """What happens to one run."""

    def __init__(self, seed: int, run: Path, base: dict[str, Any]) -> None:
        self.chance, self.disk = random.Random(f"history {seed}"), random.Random(f"disk {seed}")  # the latter for saves beside training
        self.run, self.base = run, base
        self.folder = run / "checkpoints"
        self.counts = dict.fromkeys(("starts", "rollbacks", "stops", "deaths", "damages", "losses", "saves", "ends", "refusals"), 0)
        lengths = [self.chance.choice([1, 3, 7, 12, 25, 40]) for _ in range(self.chance.choice([1, 2, 3]))]
        self.values = base | {"phases": [self._phase(number, steps) for number, steps in enumerate(lengths)]}
        self.saved = set[int]()  # on the path that holds, whether or not they are still there
        self.touched = set[int]()  # by hand
        self.highest, self.least_pass_over, self.is_regular = 0, 10**9, True
        self.known = list[dict[str, Any]]()  # the rollbacks
        self.forgets = self.chance.random() < 0.2  # the file of the rollbacks is torn again and again; else checkpoints are damaged
        self.cannot_remove = 0.0
        self.faults = self.chance.choice([0.0, 0.02, 0.1])
        self.deadly = self.chance.choice([0.0, 0.02, 0.1])

    def _phase(self, number: int, steps: int) -> dict[str, Any]:
        rate = {"start": 1e-2, "end": 1e-3}
        sizes = {"sequence_length": 32, "global_batch_size": 4, "tokens": steps * 128}
        return {"name": f"p{number}", "sources": {"web": 1.0}, "learning_rate": rate, **sizes}

    def go(self) -> None:
        interval = self.chance.choice([1, 2, 3, 5, 10, 20])
        for start in range(30):
            if start and self.chance.random() < 0.3:
                interval = self.chance.choice([1, 2, 3, 5, 10, 20])
                self.is_regular = False
            self.settings = {
                "train": self.base["train"]
                | {
                    "checkpoint_interval": interval,
                    "keep_checkpoints": self.chance.choice([1, 1, 2, 3]),
                    "keep_every": self.chance.choice([None, None, 2 * interval]),
                    "asynchronous_save": self.chance.random() < 0.5,
                },
                "stability": {
                    "pass_over": self.chance.choice([1, 2, 4, 8, 15, 30]),
                    "max_rollbacks": 6,
                    "on_not_finite": "rollback" if self.chance.random() < 0.9 else "skip",
                },
            }
            self.config = from_dict(self.values | self.settings | {"run": str(self.run)}, "history")
            if start == 29:
                self.faults = self.deadly = 0.0
            self.cannot_remove = self.chance.choice([0.0, 0.0, 0.3])
            if self.one_start():
                return
            self.by_hand()

    # what is there

    def usable(self) -> list[int]:
        """The steps of those that are whole and lie on the path, the fewest first; found without the code that is tried."""
        found, backs = [], self.rollbacks()
        for step in steps(self.folder):
            try:
                one = Checkpoint(step_folder(self.folder, step))
                one.verify()
            except UserError:
                continue
            known = (one.ledger.interventions or {})["rollbacks"]
            if all(back["first"] > step or back in known for back in backs):
                found.append(step)
        return found

    def rollbacks(self) -> list[dict[str, Any]]:
        try:
            written = json.loads((self.run / "rollbacks.json").read_bytes())
        except (OSError, ValueError):
            written = []
        return max(written, self.known, key=len)

    # what happens

    def one_start(self) -> bool:
        """Whether the run is over."""
        self.counts["starts"] += 1
        before, there = self.usable(), steps(self.folder)
        self.stop = False
        told = self.asked_before()
        try:
            trainer = train.Trainer(self.config, lambda: None)
        except UserError as error:
            assert there and not before and "none of its" in str(error), (error, there, before)
            assert steps(self.folder) == there  # nothing is removed
            self.counts["refusals"] += 1
            self.bring_back()
            return False
        except Died:
            self.counts["deaths"] += 1
            assert set(before) <= set(self.usable())
            return False
        assert trainer.step == max(before, default=0), (trainer.step, before)
        assert bool(before) or not there
        assert told in (None, trainer.step) or told > trainer.step, (told, trainer.step)  # sizes alone may be right of what is damaged
        self.expect(trainer)
        assert set(before) <= set(self.usable())
        self.trainer = trainer
        self.touched &= set(steps(self.folder))
        self.saved = {one for one in self.saved if one <= trainer.step}
        if self.config.stability.may_roll_back:
            self.least_pass_over = min(self.least_pass_over, self.config.stability.pass_over)
        else:
            self.least_pass_over = 1
        try:
            trainer.train(lambda: self.stop)
        except SystemExit:
            self.counts["stops"] += 1
            assert self.usable()[-1] == trainer.step
            return False
        except (Died, OSError):
            self.counts["deaths"] += 1
            trainer.saver._save and trainer.saver._save.thread.join()
            return False
        except UserError as error:
            text = str(error)
            if "none of its" in text or "are gone" in text:
                self.counts["refusals"] += 1
                self.bring_back()
                return False
            assert "stability.max_" in text or "none has updated" in text, text
            self.counts["ends"] += 1
            return True
        assert trainer.step == phases.num_steps(self.config.phases) == self.usable()[-1]
        self.expect(trainer)
        self.counts["ends"] += 1
        return True

    def asked_before(self) -> int | None:
        """Where `mujina train` and `mujina submit` say that the run goes on."""
        try:
            found = check._newest(self.config)
        except UserError:
            return None
        return found.step if found else 0

    def expect(self, trainer: Any) -> None:
        """The weights are what the steps made of them that hold."""
        backs, skipped = trainer.guard.rollbacks, {skip["step"] for skip in trainer.guard.skipped}
        is_left_out = lambda step: step in skipped or any(back["first"] <= step <= back["last"] for back in backs)  # noqa: E731
        assert trainer.state.by == [step for step in range(1, trainer.step + 1) if not is_left_out(step)], trainer.step

    def may_die(self, chance: float = 1.0) -> None:
        if self.chance.random() < self.deadly * chance:
            raise Died

    def gradients(self, *_: Any) -> Any:
        self.may_die(0.3)
        self.stop |= self.chance.random() < self.deadly
        if self.chance.random() < 0.01:
            self.trainer.saver.wait()
            self.damage(may_be_the_last=True)
        self.trainer.state.norm = math.nan if self.chance.random() < self.faults else 1.0
        return SimpleNamespace(loss=1.0, as_record=dict)

    def update(self, *_: Any) -> None:
        self.trainer.state.by.append(self.trainer.step + 1)
        self.trainer.state.updates += 1

    @contextmanager
    def rolls_back(self, trainer: Any, step_in_phase: int) -> Iterator[None]:
        """Around a rollback."""
        self.counts["rollbacks"] += 1
        trainer.saver.wait()
        step, pass_over = trainer.step + 1, self.config.stability.pass_over
        before, there = self.usable(), steps(self.folder)
        wanted = step - min(pass_over, step_in_phase + 1)
        old, new = [one for one in before if one <= wanted], [one for one in before if one > wanted]
        expected = old[-1] if old else new[0] if new else 0
        try:
            yield
        except UserError:
            assert not before, before
            assert steps(self.folder) == there
            raise
        except Died:
            assert not before or expected in self.usable()
            raise
        assert trainer.step == expected, (trainer.step, expected, before)
        assert trainer.step > 0 or not self.saved, "a new start, though the run had a checkpoint"
        assert not before or expected in self.usable()
        back = trainer.guard.rollbacks[-1]
        num_passed = back["last"] - back["first"] + 1
        assert back["last"] == step and (num_passed == min(pass_over, step_in_phase + 1) or not old), back
        # What a rollback can need was not pruned: as if everything that was ever saved were there.
        if step > self.highest and pass_over <= self.least_pass_over and not self.touched:
            ideal = [one for one in self.saved if one <= wanted]
            assert not ideal or trainer.step == max(ideal), (trainer.step, sorted(self.saved), wanted)
            begun = step - 1 - step_in_phase
            if self.is_regular and not self.cannot_remove:
                reach = pass_over + self.config.train.checkpoint_interval - 1  # what `plan` says
                assert step - trainer.step <= reach or trainer.step == 0, (step, trainer.step, reach)
                assert trainer.step >= begun, (trainer.step, begun)
        self.saved = {one for one in self.saved if one <= trainer.step}
        self.known = trainer.guard.rollbacks
        self.expect(trainer)

    def finished(self, step: int, before: list[int]) -> None:
        """After a save and what it prunes."""
        self.counts["saves"] += 1
        self.saved.add(step)
        self.highest = max(self.highest, step)
        there, now = steps(self.folder), self.usable()
        assert step in now, (step, now, there, self.rollbacks())
        assert (self.folder / "latest").resolve().name == f"step-{step:08d}", (step, (self.folder / "latest").resolve())
        config, ends = self.config, self.trainer.phase_ends
        self.is_regular &= step % config.train.checkpoint_interval == 0 or step in ends
        assert {one for one in before if one in ends and one < step} <= set(now), "the end of a phase"
        if self.is_regular and not self.touched and not any(self.folder.glob(".removed-*")) and not self.cannot_remove:
            kept = max(config.train.keep_checkpoints, self.most_needed())
            others = [one for one in there if one not in ends and not (config.train.keep_every and one % config.train.keep_every == 0)]
            assert len(others) <= kept, (there, kept)

    def most_needed(self) -> int:
        self.needed = max(getattr(self, "needed", 0), self.config.stability.checkpoints_needed(self.config.train.checkpoint_interval))
        return self.needed

    # what people and disks do

    def by_hand(self) -> None:
        for _ in range(self.chance.choice([0, 0, 1, 2])):
            self.damage()
        if self.forgets and self.chance.random() < 0.5 and (usable := self.usable()):
            newest = Checkpoint(step_folder(self.folder, usable[-1])).ledger.interventions
            if newest and newest["rollbacks"] == self.rollbacks():  # else nobody knows of them any more
                (self.run / "rollbacks.json").write_bytes(self.chance.choice([b"", bytes(9), b"[{"]))
                self.known = newest["rollbacks"]
        if self.chance.random() < 0.1 and self.folder.exists():
            latest = self.folder / "latest"
            latest.unlink(missing_ok=True)
            if self.chance.random() < 0.5:
                latest.symlink_to("step-99999999")
        if self.chance.random() < 0.2 and len(self.values["phases"]) > 1:  # a phase that has not begun may change
            last = self.values["phases"][-1]
            before = sum(one["tokens"] // 128 for one in self.values["phases"][:-1])
            if before >= max(steps(self.folder), default=0):
                self.values = self.values | {
                    "phases": [*self.values["phases"][:-1], last | {"tokens": 128 * self.chance.choice([2, 5, 30])}]
                }

    def damage(self, may_be_the_last: bool = False) -> None:
        there = steps(self.folder)
        if not there or self.forgets:
            return
        step = self.chance.choice([there[-1], self.chance.choice(there)])
        folder = step_folder(self.folder, step)
        how = self.chance.choice(["flip", "cut", "no description", "torn description", "removed", "empty"])
        if how == "removed" and len(there) == 1 and not may_be_the_last:
            return  # that is how a run is begun anew
        self.counts["losses" if how == "removed" else "damages"] += 1
        self.touched.add(step)
        description, file = folder / "checkpoint.json", next(iter(sorted(folder.glob("*.safetensors"))), None)
        if how == "removed":
            shutil.rmtree(folder)
        elif how == "empty":
            for path in folder.iterdir():
                path.unlink()
        elif how == "no description" or file is None:
            description.unlink(missing_ok=True)
        elif how == "torn description":
            description.write_bytes(description.read_bytes()[:100] if description.exists() else b"")
        else:
            data = file.read_bytes()
            file.write_bytes(data[:-8] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1 if data else 0]))

    def bring_back(self) -> None:
        """None is usable: begun anew, as the message says."""
        shutil.rmtree(self.folder)
        (self.run / "rollbacks.json").unlink(missing_ok=True)
        self.saved, self.known, self.touched, self.highest = set(), [], set(), 0
