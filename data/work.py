"""A hidden folder beside an output. The output is made in it, and gets its name when it is whole.

If a process is killed, the next process with the same output removes the folder. A lock in it tells whether
its owner still lives: the system releases the lock when the owner ends, in whatever way.

    .NAME.01234567.tmp/lock    locked as long as its owner lives
    .NAME.01234567.tmp/new     the output, until it is whole
    .NAME.01234567.tmp/old     the folder that had the output's name, where names cannot be exchanged
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cupytron.durable import exchange, sync_folder, synced

from .errors import DataError


class WorkFolder:
    """A work folder of `out`, as a context. Its end leaves `out`, old or new, and removes the work folder.

    Args:
        out: the output, a folder.

    Attributes:
        path: the work folder.
        new: a folder inside it, empty at first, in which the output is to be made.
        notes: at the end, a line for each thing that could not be removed.
    """

    def __init__(self, out: Path) -> None:
        # the first two until the work folder is there
        self.path = self.new = self.out = out
        self.notes: list[str] = []

    def __enter__(self) -> "WorkFolder":
        make_folders(self.out.parent)
        self._lock = None
        while self._lock is None:
            self.path = self.out.parent / f".{self.out.name}.{secrets.token_hex(4)}.tmp"
            self.path.mkdir()
            # None: another process took this folder for a dead one's, and removed it
            self._lock = _new_lock(self.path)
        self.new = self.path / "new"
        self.new.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._lock is not None
        _bring_back(self.path, self.out)
        self.notes += _remove(self.path)
        with contextlib.suppress(OSError):
            # a network file system may report an error here, when the work is done
            self._lock.close()

    def place_of(self, file: str) -> Path | None:
        """Where a file of the output will be in the end, or the nearest folder that the user knows.

        Args:
            file: a path that an error names.

        Returns: None for a file that has nothing to do with the output.
        """
        path = Path(file)
        if path.is_relative_to(self.new):
            return self.out / path.relative_to(self.new)
        if path.is_relative_to(self.path):
            return self.out
        return path if path in self.out.parents else None

    def publish(self) -> None:
        """Give `new` the output's name, synced to the disk.

        A folder that had the name is removed with the work folder.

        Raises:
            OSError: the output is the old one. If only the sync of the names has failed, it is the new one.
        """
        _sync_files(self.new)
        if not self.out.exists() or not any(self.out.iterdir()):
            self.new.rename(self.out)
        elif not exchange(self.new, self.out):
            # after a kill between these two lines nothing has the name; `remove_dead` restores the old one
            self.out.rename(self.path / "old")
            self.new.rename(self.out)
        for folder in (self.out.parent, self.path):
            sync_folder(folder)


def remove_dead(out: Path, report: Callable[[str], None]) -> list[str]:
    """Remove the work folders of `out` whose owners were killed, and bring back an output set aside there.

    Args:
        out: the output.
        report: called with a line for each thing that is done.

    Returns: notes on folders that had to stay, a line each.
    """
    notes = []
    for folder in _work_folders(out):
        with contextlib.suppress(OSError):
            folder.rmdir()  # killed before there was a lock in it, or after
            continue
        try:
            with open(folder / "lock", "r+b") as lock:
                if not _lock(lock):
                    continue  # its owner lives
                if _bring_back(folder, out):
                    report(f"bringing back {out}, which a killed data prepare had set aside")
                report(f"removing {folder.name}, which a killed data prepare left behind")
                notes += _remove(folder)
        except OSError as error:
            # FileNotFoundError: earlier versions made no lock
            notes.append(
                f"{folder}: left by another data prepare, which may still be running "
                f"({error.strerror}); remove it if none is"
            )
    return notes


def set_aside(out: Path) -> Path | None:
    """Where a killed process set aside the folder that had the name `out`; None if none did."""
    found = (folder / "old" for folder in _work_folders(Path(os.path.realpath(out))))
    return next((old for old in found if old.is_dir()), None)


def _work_folders(out: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.tmp")
    try:
        entries = sorted(os.scandir(out.parent), key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        Path(entry.path)
        for entry in entries
        if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    ]


def _new_lock(folder: Path) -> BinaryIO | None:
    """Make and lock the lock of a new work folder; None if another process has removed the folder."""
    path = folder / "lock"
    try:
        file = open(path, "xb")
    except FileNotFoundError:
        return None
    try:
        ours = _lock(file)
    except OSError:
        return file  # on a file system without locks, no process removes another one's folder
    if ours and path.exists():
        return file
    file.close()
    return None


def _lock(file: BinaryIO) -> bool:
    """Lock an open file; False if another process has its lock.

    Raises:
        OSError: files cannot be locked here.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _bring_back(folder: Path, out: Path) -> bool:
    """Give an output that was set aside its name back, if nothing has taken it; returns whether it did."""
    old = folder / "old"
    if not old.exists() or out.exists():
        return False
    try:
        old.rename(out)
    except OSError as error:
        raise DataError(
            f"{out}: the data set of this name is in {old} now, and cannot be moved back "
            f"({error.strerror}); move it by hand"
        ) from error
    sync_folder(out.parent)
    return True


def _remove(folder: Path) -> list[str]:
    """Remove a work folder, its lock last, so that a kill half-way leaves a folder with a lock.

    Returns: a note if something cannot be removed; the next process with this output tries again.
    """
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        (folder / "lock").unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        return [f"{error.filename}: cannot be removed: {error.strerror}"]
    return []


def make_folders(path: Path) -> None:
    """Make a folder and those above it, each synced to the disk before the next is made."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        synced(path)
    sync_folder(folder)
