"""What this process is doing just now: the work says it, and the watchdog's thread reads it.

It imports the standard library only, for it is needed before NumPy and MPI are there. There is one process
a rank, so there is one state a process. Where ranks are threads nobody reads it.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

Note = Callable[[int, str], None]  # such as `note`: (the last step that is done, what comes next)

# what a rank waits for where MPI itself begins or ends, and takes no other calls
MPI_ITSELF = ("MPI_Init", "MPI_Finalize")

# what Python tells of itself (PEP 578) that counts as a piece of work: a slow import or a slow removal of
# a folder is many of these
_EVENTS = {
    "import",
    "open",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "subprocess.Popen",
}


class _Now:
    """The state. Only the main thread writes to it."""

    __slots__ = ("beats", "groups", "phase", "slow", "step", "waits_for")

    def __init__(self) -> None:
        self.beats = 0
        self.step, self.phase = 0, "at the start"
        self.waits_for = ""  # outside of communicators
        self.slow = ""  # what the disk has been asked to do
        self.groups: Any = None


_now = _Now()
_hears_files = False


def unwatched(step: int, phase: str) -> None:
    """A Note where nobody watches."""


def beat() -> None:
    """A piece of work is done: a layer, a message, a block of a file. It costs one addition."""
    _now.beats += 1


def note(step: int, phase: str) -> None:
    """Say the last step that is done, and what comes next; that is a beat, too."""
    _now.step, _now.phase = step, phase
    _now.beats += 1


def phase(text: str) -> None:
    """Say what comes next, after the same step as before; that is a beat, too."""
    note(_now.step, text)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """The others set the pace while this lasts; communicators say by themselves that they wait."""
    before, _now.waits_for = _now.waits_for, what
    try:
        yield
    finally:
        _now.waits_for = before
        _now.beats += 1


@contextlib.contextmanager
def patiently(what: str) -> Iterator[None]:
    """A single call that may take long and tells nothing meanwhile, such as an fsync."""
    before, _now.slow = _now.slow, what
    try:
        yield
    finally:
        _now.slow = before
        _now.beats += 1


def follow(groups: Any) -> None:
    """Say whose `operation` tells what this rank waits for: a communicator, or a mesh."""
    _now.groups = groups


def count_files() -> None:
    """Take the main thread's imports, and files that it opens, renames or removes, for beats, too."""
    global _hears_files
    if _hears_files:
        return  # a hook stays for ever
    _hears_files = True
    main = threading.main_thread().ident

    def hear(event: str, _: object) -> None:
        if event in _EVENTS and threading.get_ident() == main:
            _now.beats += 1

    sys.addaudithook(hear)


# what the watchdog asks for


def beats() -> int:
    """How many pieces of work have been done."""
    return _now.beats


def slow() -> bool:
    """Whether a call is under way that may take long."""
    return bool(_now.slow)


def waits_for() -> str:
    """What this rank waits for, such as "all_reduce on dp"; "" if for nobody."""
    return _now.waits_for or (_now.groups.operation if _now.groups is not None else "") or ""


def where() -> str:
    """Step, phase, and what is waited for, for messages."""
    waits = waits_for()
    parts = [f"after step {_now.step}", _now.phase]
    parts += [f"waiting in {waits}"] if waits else []
    parts += [_now.slow] if _now.slow else []
    return ", ".join(parts)
