"""The checkpoints of a run, as its ranks save, keep and find them together. Every rank has a `Saver` and makes the same calls.

A save copies what the rank owns to host memory; a thread writes it while training goes on. The threads of the ranks exchange nothing but
files: each puts its boxes and their checksum into the temporary folder, and that of rank 0 waits for all of them and then finishes.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_jobs import ranks
from megatron_jobs.checkpoints.checkpoint import Checkpoint, Writer, newest_whole, prune, remove_after, whole_before
from megatron_jobs.checkpoints.weights import trained_shapes
from megatron_jobs.config import RunConfig
from megatron_jobs.data.ledger import Ledger
from mujina.user_input import UserError

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole: training stood still for `seconds` of the `whole_seconds` that it took."""

    step: int
    seconds: float
    whole_seconds: float


class Saver:
    def __init__(self, config: RunConfig, phase_ends: set[int]) -> None:
        """Checkpoints of the steps in `phase_ends` are kept for ever."""
        self.config, self.phase_ends = config, phase_ends
        self.folder = config.run / "checkpoints"
        self._host_copies: dict[str, torch.Tensor] = {}
        self._save: _Save | None = None
        self._whole: list[Saved] = []  # that `check` has not told of
        self._has_any = False  # checkpoints, as far as this process has seen

    def newest(self, keeps: Callable[[Checkpoint], bool] = lambda checkpoint: True) -> Checkpoint | None:
        """The newest whole checkpoint of the run that `keeps` does not refuse, the same on every rank. Collective.

        Waits for the save under way; each rank verifies a share of the files.
        """
        self.wait()
        found = newest_whole(self.folder, keeps, dist.get_rank(), ranks.gathered)
        self._has_any = found is not None
        return found

    def before(self, step: int, keeps: Callable[[Checkpoint], bool]) -> Checkpoint | None:
        """The newest whole checkpoint of at most `step` steps that `keeps` does not refuse, else the oldest of more. As `newest`.

        Raises UserError when there were some, and all of them are gone: a run does not begin anew by itself."""
        self.wait()
        found = whole_before(self.folder, step, keeps, dist.get_rank(), ranks.gathered)
        if found is None and self._has_any:
            raise UserError(f"{self.folder}: the checkpoints that a rollback goes back to are gone: bring them back")
        return found

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of more than `step` steps. Collective."""
        if dist.get_rank() == 0:
            remove_after(self.folder, step)
        dist.barrier()

    def back_to(self, step: int) -> int:
        """The steps that are done where a rollback of the step behind `step` goes back to (`stability.Guard.back_to`)."""
        if not self.config.stability.may_roll_back:
            return step
        begun = max((end for end in self.phase_ends if end <= step), default=0)
        return max(begun, step + 1 - self.config.stability.pass_over)

    def save(self, step: int, updates: int, boxes: dict[str, torch.Tensor], ledger: Ledger) -> None:
        """Saves the boxes that this rank owns (`TrainingState.boxes`), which may change when this returns. Collective.

        Waits for the save before it, and for this one too without `train.asynchronous_save`. Raises as `wait` does.
        """
        began = time.monotonic()
        self.wait()
        writer = Writer(self.folder, step)
        if dist.get_rank() == 0:
            writer.clear()
        dist.barrier()
        if self.config.train.asynchronous_save:
            boxes = self._copied(boxes)
        else:
            boxes = {key: values.cpu() for key, values in boxes.items()}
        self._has_any = True
        self._save = _Save(self, writer, updates, boxes, ledger, began)
        if not self.config.train.asynchronous_save:
            self.wait()

    def check(self) -> Saved | None:
        """The checkpoint that has become whole since the last call, told to rank 0 only; costs next to nothing, for every step.

        Raises the error of the save under way, if there is one by now.
        """
        if self._save and self._save.error:
            raise self._save.error
        return self._whole.pop() if self._whole else None

    def wait(self) -> None:
        """Returns when the save under way, if any, is a whole checkpoint. Collective.

        Raises, on every rank, when one of them could not save (a full disk: OSError there, UserError elsewhere); the checkpoint before it
        is as it was.
        """
        if not self._save:
            return
        save, self._save = self._save, None
        save.written.wait()
        # This exchange, unlike a thread that waits for a file, ends when another rank has died.
        if not any(errors := ranks.gathered(save.error and str(save.error))):
            save.thread.join()
            errors = ranks.gathered(save.error and str(save.error))
        save.given_up.set()
        if save.error:
            raise save.error
        for rank, error in enumerate(errors):
            if error:
                raise UserError(f"{save.writer.final}: rank {rank} could not save it ({error}): the checkpoint before it is whole")

    def _copied(self, boxes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in host memory that is allocated once, page-locked where a GPU writes into it."""
        for key, values in boxes.items():
            if key not in self._host_copies:
                self._host_copies[key] = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
            self._host_copies[key].copy_(values, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return self._host_copies


class _Save:
    """A save under way, in its thread.

    written     is set when this rank has done its part, or failed
    given_up    stops rank 0 from waiting for the others
    """

    def __init__(
        self,
        saver: Saver,
        writer: Writer,
        updates: int,
        boxes: dict[str, torch.Tensor],
        ledger: Ledger,
        began: float,
    ) -> None:
        self.saver, self.writer = saver, writer
        self.updates, self.boxes, self.ledger = updates, boxes, ledger
        self.began, self.stood_still = began, time.monotonic() - began
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.written, self.given_up = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)  # a run that ends by an error does not wait for it
        self.thread.start()

    def _run(self) -> None:
        try:
            self.writer.add_rank_file(self.rank, self.boxes)
            self.written.set()
            if self.rank == 0:
                self._finish()
        except Exception as error:  # raised again in the thread that trains
            self.error = error
            self.written.set()

    def _finish(self) -> None:
        while len(self.writer.rank_files()) < self.num_ranks:
            if self.given_up.wait(POLL_SECONDS):
                return
        config = self.saver.config
        self.writer.finish(config, self.updates, trained_shapes(config), self.ledger)
        train, ends = config.train, self.saver.phase_ends
        prune(
            self.saver.folder,
            train.keep_checkpoints,
            lambda step: step in ends or bool(train.keep_every and step % train.keep_every == 0),
            self.saver.back_to(self.writer.step),
        )
        whole_seconds = time.monotonic() - self.began
        stood_still = self.stood_still if train.asynchronous_save else whole_seconds
        self.saver._whole.append(Saved(self.writer.step, stood_still, whole_seconds))
