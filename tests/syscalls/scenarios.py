"""All scenarios, the marks in the log that say when a save has returned, and planted faults."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from syscalls import shim
from syscalls.scenario import Scenario
from syscalls.scenario_data import Overwrite, OverwriteWithoutExchange, Prepare
from syscalls.scenario_run import Recover, Resume, ResumeWithoutExchange, Train

from cupytron import checkpoint

SCENARIOS: list[type[Scenario]] = [
    Prepare,
    Overwrite,
    OverwriteWithoutExchange,
    Train,
    Resume,
    ResumeWithoutExchange,
    Recover,
]


def note_saves() -> None:
    """Let the log say when a save has returned, which is a promise."""
    write = checkpoint.write

    def write_and_mark(folder: Path, pieces: Any, about: Any, *rest: Any, **more: Any) -> None:
        write(folder, pieces, about, *rest, **more)
        shim.mark(f"saved {about['step']}")

    checkpoint.write = write_and_mark


# planted faults, which have to be seen: a check that never sees anything would pass, too


def planted() -> bool:
    """Whether the scripts are to try planted faults, too."""
    return bool(os.environ.get("CUPYTRON_PLANTED"))


@contextlib.contextmanager
def old_checkpoints_removed_first() -> Iterator[None]:
    """A save removes the checkpoint that it replaces before it begins."""
    write = checkpoint.write

    def remove_and_write(folder: Path, *rest: Any, **more: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, *rest, **more)

    checkpoint.write = remove_and_write
    try:
        yield
    finally:
        checkpoint.write = write


@contextlib.contextmanager
def nothing_synced() -> Iterator[None]:
    """Nothing is ever synced."""
    fsync = os.fsync
    os.fsync = lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = fsync
