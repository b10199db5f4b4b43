"""Catches the signals that ask this process to stop, from the first moment on, and answers at once.

It imports no NumPy, since a command listens before anything heavy is imported. What a signal means for a
run is decided in stop.py.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from cupytron.failing import abort
from cupytron.launcher import launched_rank, launched_tasks, mpi_has_begun

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
AGAIN = 5.0  # seconds; launchers, terminals and Slurm deliver one signal twice within them
_TWICE = 0.5  # seconds; a person who presses Ctrl-C again takes longer
_FIRST = 0.7  # seconds that other ranks leave rank 0, so that one speaks
_HARD = (signal.SIGINT, signal.SIGTERM)  # a second one of these ends the process without a save


class Signals:
    """Notes signals in a context, answers each on stderr, and ends the process for a late second one.

    The answer comes from a thread: the main thread may wait for other ranks inside MPI, where Python runs
    no handler. A second Ctrl-C or SIGTERM counts if it comes AGAIN seconds or more after the first. Then a
    job of several processes ends, and a single process gets the signal as if nobody had caught it.

    Args:
        speaks: whether to answer.

    Attributes:
        received: the last signal that has come.
        when: when the run will stop, for the answer.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.received: int | None = None
        self.when = "before the first step"
        self._speaks = speaks
        self._answered = False
        self._asked: float | None = None  # when the first of _HARD came
        self._over = False
        self._before: dict[int, Any] = {}
        self._writing, self._wakeup = -1, -1

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self  # a notebook's worker: signals stay as they are
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()
        self.catch()
        return self

    def catch(self) -> None:
        """Catch the signals that are not caught yet; for the main thread."""
        if self._writing < 0:
            return
        for number in SIGNALS:
            if number in self._before or signal.getsignal(number) == signal.SIG_IGN:
                continue  # ignored on purpose, by nohup or in a script's background job
            if number == signal.SIGTERM and launched_tasks() > 1 and not mpi_has_begun():
                # a launcher ends its ranks by SIGTERM. Open MPI's launcher hangs if a rank goes on with
                # MPI_Init then, and there is nothing to save yet
                continue
            self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self._writing >= 0:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writing)  # which ends the thread
            self._writing = -1

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._over:
            self._restore()
            signal.raise_signal(number)

    def _listen(self, reading: int) -> None:
        # Python's C handler writes the number of each signal, whatever the main thread does
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number in SIGNALS and not self._over:
                    self.hear(signal.Signals(number), time.monotonic())
        os.close(reading)

    def hear(self, number: signal.Signals, now: float) -> None:
        """Answer a signal.

        Args:
            number: the signal.
            now: seconds of a clock.
        """
        late = (
            f"Ctrl-C or SIGTERM {AGAIN:g} s or more after the first stops at once, without a save"
        )
        if not self._answered:
            self._answered = True
            self._say(f"{number.name}: stopping {self.when}; {late}")
        if number not in _HARD:
            return
        if self._asked is None:
            self._asked = now
        elif now - self._asked >= AGAIN:
            self._end(number)
        elif now - self._asked >= _TWICE:
            self._say(f"{number.name} again: still stopping {self.when}; {late}")

    def _end(self, number: signal.Signals) -> None:
        self._over = True
        text = (
            f"{number.name} again: stopped at once, without a save; the same command goes on from the last "
            "save"
        )
        if launched_tasks() == 1:
            self._say(text)
            os.kill(os.getpid(), number)  # once more, for the handler that was there before
            return
        if launched_rank():
            time.sleep(_FIRST)
        self._say(text, any_rank=True)
        abort(128 + number)

    def _say(self, text: str, any_rank: bool = False) -> None:
        if self._speaks and (any_rank or launched_rank() == 0):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                # on a terminal it takes the place of the line that renews itself
                clear = "\r\x1b[K" if sys.stderr.isatty() else ""
                os.write(2, f"{clear}{text}\n".encode())


_here: Signals | None = None  # of this process's command


def here() -> Signals | None:
    """The Signals with which this process's command listens; None if it does not listen."""
    return _here


@contextlib.contextmanager
def listening(speaks: bool = True) -> Iterator[Signals]:
    """A context in which this process's command listens. A run in it learns of earlier signals, too.

    Args:
        speaks: as Signals'.
    """
    global _here
    with Signals(speaks) as _here:
        try:
            yield _here
        finally:
            _here = None
