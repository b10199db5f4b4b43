"""Signals that end a process become exceptions, so that a half-made output can be removed."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

# only these handlers are replaced; any other was set on purpose, as by nohup
_USUAL: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


class Stopped(SystemExit):
    """SIGTERM or SIGHUP has come. A process that catches nothing exits with 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class OrderlyStop:
    """A context in which SIGTERM, SIGHUP and SIGINT raise a single exception, and only inside `released`.

    A signal at another moment waits for the next `released`, or for the end of the context. Signals after
    the first change nothing: they must not interrupt the clean-up. In another thread than the main one, no
    handler is changed.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._received: int | None = None
        self._raised = False
        self._held = True

    def __enter__(self) -> "OrderlyStop":
        with contextlib.suppress(ValueError):  # not the main thread
            for number, usual in _USUAL.items():
                if signal.getsignal(number) == usual:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._raise()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """A context that a signal interrupts at once."""
        self._held = False
        try:
            self._raise()
            yield
        finally:
            self._held = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = number
            if not self._held:
                self._raise()

    def _raise(self) -> None:
        if self._received is None or self._raised:
            return
        self._raised = True
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(self._received)
