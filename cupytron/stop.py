"""Stopping a run from outside: a signal sets a flag, and the run ends after its step, saved."""

import signal
from types import FrameType
from typing import Any

# exit code: stopped by SIGTERM, SIGUSR1 or SIGHUP, saved, start me again (EX_TEMPFAIL)
REQUEUE = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Whether a signal has asked the run to stop. A second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.signal: int | None = None
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    @property
    def exit_code(self) -> int:
        return 0 if self.signal is None else 130 if self.signal == signal.SIGINT else REQUEUE
