"""Stopping a run from outside: a signal sets a flag, and the run ends after its step, saved."""

import signal
import time
from types import FrameType
from typing import Any

import numpy as np

from cupytron.comm import Communicator
from cupytron.launcher import launched_tasks

# exit code: stopped by SIGTERM, SIGUSR1 or SIGHUP, saved, start me again (EX_TEMPFAIL)
REQUEUE = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_AGAIN = 1.0  # seconds; under a launcher, the terminal and the launcher may both send one Ctrl-C


class StopRequest:
    """Whether a signal has asked the run to stop. A second Ctrl-C does not wait.

    Attributes:
        received: the last signal that has come to this process, at any moment.
        signal: the one that all ranks know of, and stop for: set by `agree`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.signal: int | None = None
        self._since = 0.0
        self._launched = launched_tasks() > 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        try:
            for number in SIGNALS:
                if signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup, or a script's background job: that was meant
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:
            pass  # not the main thread (a notebook's worker): signals stay as they are
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, comm: Communicator) -> bool:
        """Whether to stop: all ranks learn of a signal that any of them has received. Collective."""
        if comm.size == 1:
            self.signal = self.received or self.signal
            return self.signal is not None
        came = np.array([number == self.received for number in SIGNALS], np.int32)
        comm.all_reduce(came)
        numbers = [number for number, count in zip(SIGNALS, came, strict=True) if count]
        self.signal = max([*numbers, *([] if self.signal is None else [self.signal])], default=None)
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self._since = now
        elif number == signal.SIGINT and not (self._launched and now - self._since < _AGAIN):
            raise KeyboardInterrupt
        self.received = number

    @property
    def exit_code(self) -> int:
        return 0 if self.signal is None else 130 if self.signal == signal.SIGINT else REQUEUE
