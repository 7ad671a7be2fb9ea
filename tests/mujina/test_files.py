"""What is promised to be whole is on the disk before its name shows it, and rows of JSONL are strict."""

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import pipeline
from data_prep.indexed import BinaryWriter, Labels
from data_prep.steps.records import id_file, record_file
from megatron_jobs.stability import read_rollbacks, write_rollbacks
from mujina.files import parse_row, read_lines, read_rows, read_texts, rename_folder, whole_file, whole_folder, write_whole
from mujina.user_input import UserError


class Disk:
    """What was done, in order: ("sync", path, its bytes), ("remove", path, 0) and ("rename", new path, bytes), a folder's bytes being 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Path, int]] = []
        self.sources: dict[int, Path] = {}  # of the renames, by their place among the events
        fsync, replace, rename, unlink = os.fsync, os.replace, os.rename, os.unlink

        def move(old: Path, new: Path, how: Callable[[Path, Path], None]) -> None:
            self.sources[len(self.events)] = Path(old)
            self._note("rename", Path(old), Path(new))
            how(old, new)

        def sync(file: int) -> None:
            fsync(file)
            self._note("sync", Path(os.readlink(f"/proc/self/fd/{file}")))

        def remove(path: Path, **options: int) -> None:
            unlink(path, **options)
            self.events.append(("remove", Path(path), 0))

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "replace", lambda old, new: move(old, new, replace))
        monkeypatch.setattr(os, "rename", lambda old, new: move(old, new, rename))
        monkeypatch.setattr(os, "unlink", remove)

    def _note(self, what: str, path: Path, named: Path | None = None) -> None:
        self.events.append((what, named or path, 0 if path.is_dir() else path.stat().st_size))

    def check(self) -> set[str]:
        """Every file was synced, with all its bytes, before a rename showed it, and the folder of the name after it. The names."""
        names = set()
        for place, source in self.sources.items():
            _, new, size = self.events[place]
            before, after = self.events[:place], self.events[place + 1 :]
            if new.is_symlink() or new.name.startswith("."):  # `latest` of a checkpoint, and what makes room
                continue
            if new.is_dir():
                inside = [path for path in new.rglob("*") if not path.is_symlink()]
                for path in (new, *inside):
                    there = source / path.relative_to(new)
                    assert ("sync", there, 0 if path.is_dir() else path.stat().st_size) in before, f"{there} was not on the disk"
            else:
                assert ("sync", source, size) in before, f"{source} was not on the disk"
            assert ("sync", new.parent, 0) in after, f"{new} was not on the disk"
            names.add(new.name)
        return names


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def fill_folder(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "mark").write_bytes(b"x" * 10)
    (folder / "sub/deep").write_bytes(b"y" * 10)
    (folder / "link").symlink_to("nowhere")


def folder_of_files(path: Path) -> None:
    for _ in range(2):  # the second takes the place of the first
        with whole_folder(path / "made", mark="mark") as folder:
            fill_folder(folder / "below")
            (folder / "mark").touch()


def streamed(path: Path) -> None:
    with whole_file(path / "streamed") as file:
        for _ in range(3):
            file.write(b"x" * 100_000)


def renamed(path: Path) -> None:
    fill_folder(path / "partial")
    rename_folder(path / "partial", path / "renamed")


def marks(path: Path) -> None:
    with record_file(path / "records", 1) as records:
        records.add(np.arange(5, dtype=np.uint64)[None])
    with id_file(path, 0) as ids:
        ids.add("a")


def documents(path: Path) -> None:
    fill_folder(path / ".documents")
    pipeline.finish(path)


def binary(path: Path) -> None:
    writer = BinaryWriter(path / "web", np.dtype(np.uint16))
    writer.add_documents(np.arange(1, 8), np.array([3, 4]))
    writer.finish(LABELS)


LABELS = Labels(
    name="web", kind="web", origin="human", languages={}, licences={}, teachers={}, num_characters=10, tokenizer_hash="a" * 64,
    vocab_size=300, fingerprint="f",
)  # fmt: skip
PROMISES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "write_whole": (lambda path: write_whole(path / "new/file", b"abc"), {"file"}),
    "whole_file": (streamed, {"streamed"}),
    "whole_folder": (folder_of_files, {"made"}),
    "rename_folder": (renamed, {"renamed"}),
    "marks of steps": (marks, {"records", "ids-00000.text", "ids-00000.ends"}),
    "documents of a source": (documents, {"documents"}),
    "binary": (binary, {"web.bin", "web.idx", "web.json"}),
    "rollbacks": (lambda path: write_rollbacks(path, [{"first": 1}]), {"rollbacks.json"}),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_a_name_shows_only_what_is_on_the_disk(tmp_path: Path, disk: Disk, promise: str) -> None:
    write, names = PROMISES[promise]
    write(tmp_path)
    assert disk.check() == names


def test_a_manifest_is_gone_before_its_binary_changes_and_comes_after_it(tmp_path: Path, disk: Disk) -> None:
    binary(tmp_path)
    disk.events.clear()
    disk.sources.clear()
    binary(tmp_path)
    named = [(what, path.name) for what, path, _ in disk.events if path == tmp_path or path.suffix in (".bin", ".idx", ".json")]
    sync = ("sync", tmp_path.name)
    assert named == [
        ("remove", "web.json"), sync,
        ("rename", "web.bin"), ("rename", "web.idx"), sync,
        ("rename", "web.json"), sync,
    ]  # fmt: skip


def test_an_older_folder_is_there_until_the_new_one_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_files(tmp_path)
    fsync = os.fsync

    def there(file: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")) != tmp_path:
            assert (tmp_path / "made/mark").exists()
        fsync(file)

    monkeypatch.setattr(os, "fsync", there)
    folder_of_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "made", "mark") as partial:
        (partial / "mark").touch()
        with pytest.raises(UserError, match="made: another process writes it .*: wait for it to end, or stop it"):
            folder_of_files(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "mark"]
    (tmp_path / ".made.partial").mkdir()
    (tmp_path / ".made.partial/half").touch()  # of a process that was killed
    folder_of_files(tmp_path)
    assert not (tmp_path / "made/half").exists() and [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_full_disk_is_told_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, whole_folder(tmp_path / "made", "mark"):
        Path("/dev/full").write_text("x")
    assert error.value.filename == str(tmp_path / "made") and not list(tmp_path.iterdir())


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "made").symlink_to("scratch/made")
    for _ in range(2):
        folder_of_files(tmp_path)
        assert (tmp_path / "made").is_symlink() and [path.name for path in (tmp_path / "scratch").iterdir()] == ["made"]


def test_rollbacks_come_back(tmp_path: Path) -> None:
    write_rollbacks(tmp_path, [{"first": 1, "last": 2, "reason": "a spike"}])
    assert read_rollbacks(tmp_path) == [{"first": 1, "last": 2, "reason": "a spike"}]


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", b"old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "file") as file:
        file.write(b"half")
        raise RuntimeError

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space.*file"):
        write_whole(tmp_path / "file", b"new")
    with pytest.raises(OSError, match="No space"), whole_file(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": "caf\xe9"}', "byte 0xe9 at 10 is not UTF-8: convert"),
        (b'{"a": "cut', "is not JSON ("),
        (b"[" * 100_000, "is not JSON (recursion limit"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "is not JSON (number out of range"),
        (b'["a"]', "is a JSON list, not an object"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udc00": ""}', "half of a surrogate pair"),
    ],
)
def test_a_line_that_is_no_row_is_explained(tmp_path: Path, line: bytes, problem: str) -> None:
    told_of_it = parse_row(line + b"\n")
    assert problem in str(told_of_it)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n\n' + line + b"\n"))
    rows = read_rows(tmp_path / "rows.jsonl.gz")
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(UserError) as told:
        next(rows)
    assert f"rows.jsonl.gz line 3: {told_of_it}" in str(told.value)


def test_pairs_of_surrogates_are_one_character() -> None:
    assert parse_row(b'{"a": "\\ud83e\\udda1"}') == {"a": "\U0001f9a1"}


def test_a_line_of_somebody_else_has_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' + b'{"text": "' + b"x" * (3 << 20) + b'"}\n')
    assert len(list(read_rows(path))) == 2
    for reader in (read_rows, read_lines):
        with pytest.raises(UserError, match="a.jsonl line 2: the line is longer than 1 MiB: cut it"):
            list(reader(path, 1 << 20))
    path.write_bytes("\ufeff一\r\n二".encode() + b"\n\xff")
    texts = read_texts(path)
    assert [next(texts), next(texts)] == ["一", "二"]
    with pytest.raises(UserError, match="a.jsonl line 3: byte 0xff at 0 is not UTF-8"):
        next(texts)
