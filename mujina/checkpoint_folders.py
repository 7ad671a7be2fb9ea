"""The folders of checkpoints: RUN/checkpoints/step-00000200 for each that is kept, and `latest`, which leads to the newest one.

`latest` is a symbolic link, and a file that holds the name where a file system has no links. Where it is gone, or leads nowhere, as in a
copy of a run, it is read as the newest folder that holds a description.
"""

import errno
import re
from pathlib import Path

from mujina.disks import UNSUPPORTED, discard, rename
from mujina.files import write_whole

DESCRIPTION = "checkpoint.json"
_NO_LINKS = UNSUPPORTED | {errno.EPERM}  # of symlink: the last is what Linux says of a file system that has none


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of so many steps stands, or will, in a run's `checkpoints`."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Of the checkpoints that have their name, whole or not, the fewest first."""
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def resolved(named: Path) -> Path:
    """The folder of a checkpoint that somebody names: what stands in for `latest` where that leads nowhere, else as it is."""
    if named.name != "latest" or (named / DESCRIPTION).exists():
        return named
    folders = [step_folder(named.parent, step) for step in reversed(steps(named.parent))]
    return next((folder for folder in folders if (folder / DESCRIPTION).exists()), named)


def point_latest_at(final: Path) -> None:
    """`latest` beside a checkpoint leads to it, whatever it was before; where that cannot be, it is told, and stops nothing."""
    link, latest = final.with_name(".latest"), final.with_name("latest")
    try:
        if is_copied(latest):
            discard(latest)
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(final.name)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            latest.unlink(missing_ok=True)
            write_whole(latest, final.name.encode())
        else:
            rename(link, latest)
    except OSError as error:
        print(f"{latest}: could not be made to lead to {final.name} ({error})", flush=True)


def forget_latest(folder: Path) -> None:
    """Where nothing is left that it could lead to."""
    if not is_copied(folder / "latest"):
        (folder / "latest").unlink(missing_ok=True)


def is_copied(latest: Path) -> bool:
    """Whether it is a folder of its own, made by a copy that followed links."""
    return latest.is_dir() and not latest.is_symlink()
