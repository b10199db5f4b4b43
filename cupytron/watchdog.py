"""A thread that ends the job when a rank makes no progress: a rank that hangs says nothing by itself."""

import contextlib
import faulthandler
import sys
import threading
from collections.abc import Callable

from cupytron.failing import abort

STUCK = 66  # exit code: no progress for too long
_LATER = 1.0  # seconds that a rank which waits for others leaves them to speak first


Note = Callable[[int, str], None]  # Watchdog.note: (step, what comes next)


def unwatched(step: int, phase: str) -> None:
    """A Note where nobody watches."""


class Watchdog:
    """Ends the job with exit code 66 if `note` was not called for some time; a context manager.

    Args:
        timeout: seconds without progress; None or 0: never.
        rank: of this process.
        describe: what the rank waits for just now, such as "all_reduce on dp", or "" if for nobody.
    """

    def __init__(self, timeout: float | None, rank: int, describe: Callable[[], str]) -> None:
        self.timeout = timeout or 0.0
        self.rank, self._describe = rank, describe
        self._noted: tuple[int, str] = (0, "at the start")
        self._ticks = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, step: int, phase: str) -> None:
        """Say that the rank makes progress: the last step that is done, and what comes next."""
        self._noted = (step, phase)
        self._ticks = 0

    def __enter__(self) -> "Watchdog":
        if self.timeout > 0:
            self._ticks = 0
            self._over.clear()
            # a daemon: it must not keep a process that ends
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        # ticks, not a clock: time in which this process was stopped, in a debugger or by its scheduler,
        # is not held against it
        tick = min(1.0, self.timeout / 8)
        while not self._over.wait(tick):
            self._ticks += 1
            late = self._ticks * tick - self.timeout
            waits_for = self._describe()
            # the one that waits for nobody is the one to hear; failing that, the first of the others
            patience = min(4.0, _LATER + 0.4 * self.rank) if waits_for else 0.0
            if late >= patience:
                self._bite(waits_for)

    def _bite(self, waits_for: str) -> None:
        step, phase = self._noted
        waiting = f", waiting in {waits_for}" if waits_for else ""
        with contextlib.suppress(Exception):
            sys.stderr.write(
                f"error: rank {self.rank}: no progress for {self.timeout:g} seconds "
                f"(after step {step}, {phase}{waiting}); the stacks of its threads follow\n"
            )
            sys.stderr.flush()
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        abort(STUCK)
