"""The current activity of this process. The work reports it, and the watchdog's thread reads it.

It imports the standard library only, since it is needed before NumPy and MPI are loaded. Each rank is a
process, so each process has one state. Where ranks are threads of one process, nobody reads the state.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Note = Callable[[int, str], None]  # such as `note`: (the last step that is done, the next phase)

# values of `waits_for` while MPI begins or ends, and takes no other calls
MPI_ITSELF = ("MPI_Init", "MPI_Finalize")

# Python's audit events (PEP 578) that count as pieces of work. A slow import, or the slow removal of a
# folder, causes many of them.
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


class Count(NamedTuple):
    """How much of a phase's work is done.

    Attributes:
        done, total: in units of `unit`, a plural such as "tokens", or "bytes".
        seconds: since the work began.
    """

    done: int
    total: int
    unit: str
    seconds: float


class _Now:
    """The state of this process. Only the main thread writes to it."""

    __slots__ = ("beats", "began", "count", "groups", "phase", "slow", "step", "waits_for")

    def __init__(self) -> None:
        self.beats = 0
        self.step, self.phase = 0, "at the start"
        self.began = time.monotonic()  # when the phase did
        self.count: tuple[int, int, str, float] | None = None  # as Count's, and when it began
        self.waits_for = ""  # what this rank waits for outside of communicators; "": nothing
        self.slow = ""  # the single call under way that may take long, such as an fsync; "": none
        self.groups: Any = None  # a communicator or a mesh: its `operation` is the call under way


_now = _Now()
_hears_files = False


def unwatched(step: int, phase: str) -> None:
    """A Note that does nothing, where nobody watches."""


def beat() -> None:
    """Say that a piece of work is done: a layer, a message, a block of a file. It costs one addition."""
    _now.beats += 1


def note(step: int, phase: str) -> None:
    """Report the last step that is done, and the next phase; that is a beat, too."""
    if (step, phase) != (_now.step, _now.phase):
        _now.began, _now.count = time.monotonic(), None
    _now.step, _now.phase = step, phase
    _now.beats += 1


def phase(text: str) -> None:
    """Report the next phase, after the same step as before; that is a beat, too."""
    note(_now.step, text)


def count(done: int, total: int, unit: str) -> None:
    """Report how much of the phase's work is done; that is a beat, too.

    Args:
        done: how much of `total`. If it is less than before, another piece of work has begun, such as the
            next file.
        total: more than 0.
        unit: a plural, such as "tokens", or "bytes".
    """
    before = _now.count
    same = before is not None and before[1:3] == (total, unit) and before[0] <= done
    _now.count = (done, total, unit, before[3] if same and before else time.monotonic())
    _now.beats += 1


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say that this rank waits for others inside this context. Communicators say so themselves.

    Args:
        what: what it waits for, for messages, such as "MPI_Init".
    """
    before, _now.waits_for = _now.waits_for, what
    try:
        yield
    finally:
        _now.waits_for = before
        _now.beats += 1


@contextlib.contextmanager
def patiently(what: str) -> Iterator[None]:
    """Say that a single call inside this context may take long without a beat, such as an fsync.

    Args:
        what: the call, for messages, such as "in the fsync of FILE".
    """
    before, _now.slow = _now.slow, what
    try:
        yield
    finally:
        _now.slow = before
        _now.beats += 1


def follow(groups: Any) -> None:
    """Report the `operation` of a communicator or a mesh, from now on, when this rank waits for others."""
    _now.groups = groups


def count_files() -> None:
    """Count the main thread's imports, and the files that it opens, renames or removes, as beats, too."""
    global _hears_files
    if _hears_files:
        return  # an audit hook cannot be removed, so one is enough
    _hears_files = True
    main = threading.main_thread().ident

    def hear(event: str, _: object) -> None:
        if event in _EVENTS and threading.get_ident() == main:
            _now.beats += 1

    sys.addaudithook(hear)


# for the terminal


class Doing(NamedTuple):
    """The current activity of this process.

    Attributes:
        step: the last step that is done.
        phase: the current phase, which began `seconds` ago.
        counted: how much of the phase is done; None: not known.
        waits_for: what this rank waits for; "": nothing.
    """

    step: int
    phase: str
    seconds: float
    counted: Count | None
    waits_for: str


def doing() -> Doing:
    """The current activity of this process, for a line on the terminal."""
    now, found = time.monotonic(), _now.count
    count = found and Count(*found[:3], now - found[3])
    return Doing(_now.step, _now.phase, now - _now.began, count, waits_for())


# for the watchdog


def beats() -> int:
    """How many pieces of work have been done."""
    return _now.beats


def slow() -> bool:
    """Whether a single call is under way that may take long without a beat."""
    return bool(_now.slow)


def waits_for() -> str:
    """The operation that this rank waits for, such as "all_reduce on dp"; "" if there is none."""
    return _now.waits_for or (_now.groups.operation if _now.groups is not None else "") or ""


def where() -> str:
    """The step, the phase, and the operation that this rank waits for, for messages."""
    waits = waits_for()
    parts = [f"after step {_now.step}", _now.phase]
    parts += [f"waiting in {waits}"] if waits else []
    parts += [_now.slow] if _now.slow else []
    return ", ".join(parts)
