"""Checkpoints: any layout reads what any other saved; damage, kills, full disks and saves beside training lose nothing."""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_jobs.checkpoints import checkpoint
from megatron_jobs.checkpoints.checkpoint import STATES, Checkpoint, Writer, box_key, newest_whole, prune, seal
from megatron_jobs.data.ledger import Ledger
from mujina.matrices import Box
from mujina.user_input import UserError
from tests.conftest import MOE, tiny
from tests.megatron_jobs.test_train import losses, train_here
from tests.ranks import run_ranks

ROWS, COLUMNS = 40, 50
WHOLE = Box(0, ROWS, 0, COLUMNS)


def pieces_of(step: int, rank: int = 0, num_ranks: int = 1) -> dict[str, torch.Tensor]:
    """A matrix `a` that is full of the step's number, in equal parts of its rows."""
    rows = ROWS // num_ranks
    box = Box(rank * rows, (rank + 1) * rows, 0, COLUMNS)
    return {box_key(state, "a", box): torch.full((rows, COLUMNS), float(step)) for state in STATES}


def save(config: Any, folder: Path, step: int, num_ranks: int = 1) -> Path:
    writer = Writer(folder, step)
    writer.clear()
    for rank in range(num_ranks):
        writer.add_rank_file(rank, pieces_of(step, rank, num_ranks))
    return writer.finish(config, step, {"a": (ROWS, COLUMNS)}, Ledger(tokens=step))


def is_whole(found: Checkpoint, step: int) -> bool:
    return found.step == step and all((found.read("a", WHOLE, state) == step).all() for state in STATES)


# Damage


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(position: float) -> Any:
    def flip_byte(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return flip_byte


DAMAGE = {"removed": Path.unlink, "halved": halve, "emptied": empty} | {f"flipped at {at}": flip(at) for at in (0, 0.002, 0.01, 0.5, 1)}


@pytest.mark.parametrize("file", ["checkpoint.json", "ledger.json", "rank-00000.safetensors", "rank-00001.safetensors"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_one_is_found_and_the_damaged_one_named(prepared, tmp_path, capsys, file, damage):
    for step in (1, 2):
        save(tiny(prepared, tmp_path), tmp_path, step, num_ranks=2)
    DAMAGE[damage](tmp_path / "step-00000002" / file)
    assert is_whole(newest_whole(tmp_path), 1)
    said = capsys.readouterr().out
    assert "passing over a damaged checkpoint" in said and "step-00000002" in said
    if file != "checkpoint.json":
        assert file in said


def test_every_file_is_verified_by_exactly_one_share(prepared, tmp_path):
    found = Checkpoint(save(tiny(prepared, tmp_path), tmp_path, 1, num_ranks=4))
    for file in found.files:
        whole = (found.folder / file).read_bytes()
        flip(0.5)(found.folder / file)
        refused = []
        for share in range(3):
            try:
                found.verify(share, 3)
            except UserError as error:
                refused.append(str(error))
        assert len(refused) == 1 and file in refused[0]
        (found.folder / file).write_bytes(whole)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(prepared, tmp_path):
    assert newest_whole(tmp_path) is None
    halve(save(tiny(prepared, tmp_path), tmp_path, 1) / "ledger.json")
    with pytest.raises(UserError, match="none of its 1 checkpoints is whole .* bring one back, or move the folder away to start anew"):
        newest_whole(tmp_path)


def test_a_rank_waits_for_what_another_one_sees(prepared, tmp_path):
    """Its file system shows the newest checkpoint later."""
    for step in (1, 2):
        save(tiny(prepared, tmp_path), tmp_path / "early", step, num_ranks=2)
    shutil.copytree(tmp_path / "early", tmp_path / "late", symlinks=True)
    shutil.rmtree(tmp_path / "late/step-00000002")
    barrier, said = threading.Barrier(2), [None, None]

    def find(rank: int, folder: Path) -> Checkpoint | None:
        def gathered(value: Any) -> list[Any]:
            said[rank] = value
            barrier.wait(60)
            values = list(said)
            barrier.wait(60)
            return values

        return newest_whole(folder, rank=rank, gathered=gathered)

    def appear() -> None:
        shutil.copytree(tmp_path / "early/step-00000002", tmp_path / "late/.step")
        (tmp_path / "late/.step").rename(tmp_path / "late/step-00000002")

    threading.Timer(1.5, appear).start()
    with ThreadPoolExecutor(2) as ranks:
        found = list(ranks.map(find, (0, 1), (tmp_path / "early", tmp_path / "late")))
    assert [one.step for one in found] == [2, 2]


def test_nothing_is_removed_where_nothing_would_be_left(prepared, tmp_path):
    """Neither those that were rolled back nor the damaged one."""
    for step in (1, 2):
        save(tiny(prepared, tmp_path), tmp_path, step)
    halve(tmp_path / "step-00000001/ledger.json")
    with pytest.raises(UserError, match=r"none of its 2 checkpoints is whole \(1 were rolled back\)"):
        newest_whole(tmp_path, lambda candidate: candidate.step < 2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000002"]


def test_what_cannot_be_removed_is_told_and_tried_again(prepared, tmp_path, capsys, monkeypatch):
    """As on NFS, where somebody has a file open."""

    def refuse(path: Path) -> None:
        raise OSError(39, "Directory not empty", ".nfs000001")

    save(tiny(prepared, tmp_path), tmp_path, 1)
    save(tiny(prepared, tmp_path), tmp_path, 2)
    with monkeypatch.context() as busy:
        busy.setattr(shutil, "rmtree", refuse)
        prune(tmp_path, 1, lambda step: False, back_to=2)
        assert "step-00000001: could not be removed" in capsys.readouterr().out
        save(tiny(prepared, tmp_path), tmp_path, 3)
    assert is_whole(newest_whole(tmp_path), 3) and not (tmp_path / "step-00000001").exists()
    save(tiny(prepared, tmp_path), tmp_path, 4)
    assert not list(tmp_path.glob(".removed-*"))


# Writing


def test_a_rank_file_is_what_safetensors_reads(tmp_path):
    pieces = {"one": torch.randn(3, 5), "column": torch.randn(5, 3).t(), "vector": torch.randn(7, 1)}
    writer = Writer(tmp_path, 1)
    writer.clear()
    writer.add_rank_file(0, pieces)
    read = load_file(writer.temporary / "rank-00000.safetensors")
    assert read.keys() == pieces.keys() and all(read[key].equal(pieces[key]) for key in pieces)


def test_the_rules_of_keeping(prepared, tmp_path):
    for step in range(1, 10):
        save(tiny(prepared, tmp_path), tmp_path, step)
        prune(tmp_path, 2, lambda step: step == 4 or step % 3 == 0, back_to=step)
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == [3, 4, 6, 7, 8, 9]
    assert (tmp_path / "latest").resolve().name == "step-00000009"


def test_the_end_of_a_phase_is_a_name_for_a_checkpoint(prepared, tmp_path):
    run = tmp_path / "run"
    for step in (6, 8, 10):  # of phases with 6 and 4 steps
        save(tiny(prepared, run), run / "checkpoints", step)
    assert is_whole(Checkpoint(tmp_path / "run@web"), 6) and is_whole(Checkpoint(tmp_path / "run@chat"), 10)
    with pytest.raises(UserError, match="run@wbe: the run has no phase wbe: did you mean web?"):
        Checkpoint(tmp_path / "run@wbe")
    shutil.rmtree(run / "checkpoints/step-00000006")
    with pytest.raises(UserError, match="step-00000006: not a whole checkpoint"):
        Checkpoint(tmp_path / "run@web")


def test_killed_at_every_change_of_the_disk(prepared, tmp_path):
    """A child that saves step 2 and removes step 1 is killed at its first change of the disk, at its second, and so on."""
    config = tiny(prepared, tmp_path)
    seen = set()
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        save(config, folder, 1)
        child = os.fork()
        if child == 0:
            kill_at_change(number)
            save(config, folder, 2)
            prune(folder, 1, lambda step: False, back_to=2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        for named in (*folder.glob("step-*"), folder / "latest"):
            found = Checkpoint(named)
            found.verify()
            assert is_whole(found, found.step)
        seen.add(newest_whole(folder).step)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        save(config, folder, 2)  # what was left is no hindrance, and is removed
        assert is_whole(newest_whole(folder), 2) and not [*folder.glob(".step-*"), *folder.glob(".removed-*")]
    assert seen == {1, 2} and number > 15


def kill_at_change(number: int) -> None:
    changes = itertools.count(1)

    def hook(event: str, arguments: Any) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink") and next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# Saving beside training


def with_groups(function: Any, config: Any, *arguments: Any) -> Any:
    from megatron_jobs.engine import groups

    with groups.of_run(config.parallel, config.seed):
        return function(config, *arguments)


def test_what_changes_after_the_snapshot_is_not_written(prepared, tmp_path):
    run_ranks(2, with_groups, saves_in_a_row, tiny(prepared, tmp_path))
    for step in (1, 2):
        found = Checkpoint(tmp_path / f"checkpoints/step-{step:08d}")
        found.verify()
        assert is_whole(found, step) and found.updates == step


def saves_in_a_row(config: Any) -> None:
    import torch.distributed as dist

    from megatron_jobs.checkpoints.saver import Saver

    may_write, write = threading.Event(), checkpoint._write
    checkpoint._write = lambda *arguments: may_write.wait() and write(*arguments)
    saver = Saver(config, set())
    pieces = pieces_of(1, dist.get_rank(), 2)
    saver.save(1, 1, pieces, Ledger())
    for piece in pieces.values():
        piece.fill_(2)
    threading.Timer(0.5, may_write.set).start()
    saver.save(2, 2, pieces, Ledger())  # waits for the first, whose buffers it takes
    for piece in pieces.values():
        piece.fill_(3)
    saver.wait()


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "mixture"])
def test_saved_beside_training_or_not_is_the_same(prepared, tmp_path, moe):
    parallel = dict(tensor=2) if moe is None else dict(expert=2)
    for asynchronous in (True, False):
        train = dict(asynchronous_save=asynchronous, checkpoint_interval=1, keep_checkpoints=10)
        run_ranks(2, train_here, tiny(prepared, tmp_path / str(asynchronous), moe=moe, parallel=parallel, train=train))
    for step in range(1, 11):
        one, other = (Checkpoint(tmp_path / str(mode) / f"checkpoints/step-{step:08d}") for mode in (True, False))
        assert one.files == other.files  # sizes and checksums
        assert (one.step, one.updates) == (step, step)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(prepared, tmp_path, asynchronous):
    config = tiny(prepared, tmp_path, train=dict(asynchronous_save=asynchronous))
    run_ranks(2, with_groups, full_disk_on_rank_1, config)
    assert is_whole(newest_whole(tmp_path / "checkpoints"), 1)
    assert (tmp_path / "checkpoints/latest").resolve().name == "step-00000001"
    run_ranks(2, with_groups, save_step_2, config)
    assert is_whole(newest_whole(tmp_path / "checkpoints"), 2)


def full_disk_on_rank_1(config: Any) -> None:
    import torch.distributed as dist

    from megatron_jobs.checkpoints.saver import Saver

    rank = dist.get_rank()
    saver = Saver(config, set())
    saver.save(1, 1, pieces_of(1, rank, 2), Ledger())
    saver.wait()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
    try:
        saver.save(2, 2, pieces_of(2, rank, 2), Ledger())
        if rank == 1:
            saver._save.thread.join()
            with pytest.raises(OSError, match="File too large"):  # at the next step
                saver.check()
        saver.wait()
    except (OSError, UserError) as error:
        assert "rank-00001.safetensors" in str(error) and "File too large" in str(error), error
        if rank == 1:
            assert isinstance(error, OSError) and error.errno == errno.EFBIG
        return
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    raise AssertionError("the save went through")


def save_step_2(config: Any) -> None:
    import torch.distributed as dist

    from megatron_jobs.checkpoints.saver import Saver

    saver = Saver(config, set())
    assert saver.newest().step == 1
    saver.save(2, 2, pieces_of(2, dist.get_rank(), 2), Ledger())
    saver.wait()


def test_all_ranks_pass_over_what_one_of_them_finds_damaged(prepared, tmp_path):
    for step in (1, 2):
        save(tiny(prepared, tmp_path), tmp_path / "checkpoints", step, num_ranks=2)
    flip(0.5)(tmp_path / "checkpoints/step-00000002/rank-00001.safetensors")
    assert run_ranks(2, with_groups, newest_step, tiny(prepared, tmp_path)) == [1, 1]


def newest_step(config: Any) -> int:
    from megatron_jobs.checkpoints.saver import Saver

    return Saver(config, set()).newest().step


# Loading

DENSE = [(1, {}), (2, dict(tensor=2)), (2, dict(pipeline=2)), (2, {}), (4, dict(tensor=2, pipeline=2))]
MIXTURE = [
    (1, {}),
    (2, dict(expert=2)),
    (2, dict(tensor=2)),
    (2, dict(pipeline=2)),
    (4, dict(tensor=2, expert=2)),
    (4, dict(pipeline=2, expert=2)),
]


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "mixture"])
def test_the_next_loss_and_all_values_are_the_same_at_another_layout(prepared, tmp_path, moe):
    """Each layout saves for the next one of the list: weights and moments are equal to the last bit, the next loss to 1e-5."""
    layouts = DENSE if moe is None else MIXTURE
    for (world, parallel), (other_world, other) in zip(layouts, layouts[1:] + layouts[:1], strict=True):
        at, to = (tmp_path / f"{world}-{parallel}" / name for name in ("at", "to"))
        run_ranks(world, train_here, tiny(prepared, at, moe=moe, parallel=parallel), 4)
        shutil.copytree(at, to, symlinks=True)
        run_ranks(other_world, with_groups, load_save_and_go_on, tiny(prepared, to, moe=moe, parallel=other))
        assert len(losses(to)) == 4 and losses(to)[3] == pytest.approx(losses(at)[3], rel=1e-5)
        saved, again = Checkpoint(at / "checkpoints/step-00000003"), Checkpoint(to / "again/checkpoints/step-00000003")
        for name, (rows, columns) in saved.shapes.items():
            box = Box(0, rows, 0, columns)
            assert all(saved.read(name, box, state).equal(again.read(name, box, state)) for state in STATES), name
            assert saved.read(name, box, "exp_avg_sq").any()


def load_save_and_go_on(config: Any) -> None:
    from megatron_jobs import train
    from megatron_jobs.checkpoints.saver import Saver
    from megatron_jobs.engine.state import TrainingState

    start = Saver(config, set()).newest()
    state = TrainingState(config)
    state.restore(start)
    saver = Saver(config.model_copy(update={"run": config.run / "again"}), set())
    saver.save(start.step, state.updates, state.boxes(), start.ledger)
    saver.wait()
    train.train(config, last_step=4)


def test_updates_that_were_left_out_are_not_counted(prepared, tmp_path):
    """AdamW's bias correction goes by the updates, not by the steps."""
    config = tiny(prepared, tmp_path)
    run_ranks(1, train_here, config, 3)
    description = tmp_path / "checkpoints/step-00000003/checkpoint.json"
    about = json.loads(description.read_text()) | {"updates": 2}
    del about["sha256"]
    description.write_text(json.dumps(about | {"sha256": seal(about)}))
    assert run_ranks(1, with_groups, counts_after_restoring, config) == [(2, {2.0})]


def counts_after_restoring(config: Any) -> tuple[int, set[float]]:
    from megatron_jobs.engine import core
    from megatron_jobs.engine.state import TrainingState

    start = Checkpoint(config.run / "checkpoints/latest")
    state = TrainingState(config)
    state.restore(start)
    return state.updates, {float(owned.state["step"]) for owned in core.owned_ranges(state.optimizer)}


def test_loading_never_unpickles(prepared, tmp_path):
    config = tiny(prepared, tmp_path)
    run_ranks(1, train_here, config, 3)
    assert run_ranks(1, with_groups, load_where_pickle_is_forbidden, config) == [3]


def load_where_pickle_is_forbidden(config: Any) -> int:
    import pickle

    from megatron_jobs.engine.state import TrainingState

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something is unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pickle, "_Unpickler"), (torch, "load")):
        setattr(module, name, refuse)
    start = newest_whole(config.run / "checkpoints")
    state = TrainingState(config)
    state.restore(start)
    assert start.ledger
    return start.step
