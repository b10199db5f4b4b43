"""Names, replaces and removes the folders of checkpoints, so that a crash loses no checkpoint.

Three kinds of hidden folders stand beside the checkpoints for a while. A killed process leaves them there.
At the next start, `recover` tells them apart by their names, and restores or removes them:

.tmp-NAME-...    a save that is not complete, or a checkpoint that a complete save has replaced
.old-NAME-...    a whole checkpoint that is being replaced where names cannot be exchanged at once
.trash-NAME-...  a checkpoint that is being removed
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from cupytron.durable import exchange, sync_folder
from cupytron.errors import CheckpointError, UnreadableCheckpoint
from cupytron.manifest import read_manifest

_REPLACED = re.compile(r"\.old-(.+)-[^-]+")


def put_in_place(new: Path, folder: Path) -> None:
    """Give a complete folder its name; a folder that has the name is removed afterwards.

    At each moment one of the two has the name, or the old one waits for `recover` as .old-NAME-...

    Raises:
        OSError: it failed, and the names are as they were before.
    """
    undo, replaced = _give_name(new, folder)
    try:
        sync_folder(folder.parent)
    except OSError:
        undo()
        raise
    if replaced is not None:
        _remove(replaced)


def _give_name(new: Path, folder: Path) -> tuple[Callable[[], object], Path | None]:
    """Give `new` the name of `folder`.

    Returns: a function that undoes it, and the place of the folder that had the name (None: none had).
    """
    if not os.path.lexists(folder):
        new.rename(folder)
        return lambda: folder.rename(new), None
    if exchange(new, folder):
        return lambda: exchange(new, folder), new
    old = _beside(folder, "old")
    folder.rename(old)

    def restore() -> None:
        if folder.exists():
            folder.rename(new)
        old.rename(folder)

    try:
        new.rename(folder)
    except OSError:
        restore()
        raise
    return restore, old


def discard(folder: Path) -> None:
    """Remove a checkpoint; a kill half-way leaves nothing that looks like one."""
    trash = _beside(folder, "trash")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(trash)
        _remove(trash)


def recover(checkpoints: Path) -> list[str]:
    """Restore or remove the folders that a killed process left among the checkpoints.

    The caller holds the run's lock. A checkpoint whose replacement was cut short gets its name back. All
    other leftovers are removed.

    Args:
        checkpoints: the folder that holds them; it need not exist.

    Returns: a line for each checkpoint that was restored, or could not be read.
    """
    said = []
    for left in sorted(checkpoints.glob(".old-*")):
        name = _REPLACED.fullmatch(left.name)
        place = left.with_name(name[1] if name else left.name)
        try:
            if not os.path.lexists(place) and _has_all_files(left):
                left.rename(place)
                sync_folder(checkpoints)
                said.append(f"{place}: restored; a save that replaced it was cut short")
                continue
        except UnreadableCheckpoint as error:
            said.append(f"{error}; it is left there")
            continue
        _remove(left)
    for kind in ("tmp", "trash"):
        for left in checkpoints.glob(f".{kind}-*"):
            _remove(left)
    return said


def _has_all_files(folder: Path) -> bool:
    """Whether the manifest is whole, and each file that it names is there and has its size.

    Raises:
        UnreadableCheckpoint: the system cannot tell now.
    """
    try:
        files = read_manifest(folder).body["files"]
        return all((folder / name).stat().st_size == f["bytes"] for name, f in files.items())
    except UnreadableCheckpoint:
        raise
    except (CheckpointError, FileNotFoundError, KeyError, TypeError, AttributeError):
        return False
    except OSError as error:
        raise UnreadableCheckpoint(f"{folder}: cannot be read ({error.strerror})") from None


def _beside(folder: Path, kind: str) -> Path:
    """A hidden name that nothing has yet, so that a leftover that cannot be removed is not in the way."""
    return folder.with_name(f".{kind}-{folder.name}-{os.getpid()}.{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    """Remove a folder as far as possible; the next start removes the rest."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
