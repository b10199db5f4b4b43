"""All scenarios, and the log's marks of what was promised."""

import shutil
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


def note_saves(planted: bool = False) -> None:
    """Let the log say when a save has returned, which is a promise.

    Args:
        planted: remove an old checkpoint before the new one is written: a fault that has to be seen.
    """
    write = checkpoint.write

    def write_and_mark(folder: Path, pieces: Any, about: Any, *rest: Any, **more: Any) -> None:
        if planted:
            shutil.rmtree(folder, ignore_errors=True)
        write(folder, pieces, about, *rest, **more)
        shim.mark(f"saved {about['step']}")

    checkpoint.write = write_and_mark
