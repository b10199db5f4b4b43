"""Stopping a run from outside: all ranks learn of a signal, and the run ends after its step, saved."""

import signal

import numpy as np

from cupytron import signals
from cupytron.comm import Communicator
from cupytron.signals import SIGNALS, Signals

# exit code: stopped by SIGTERM, SIGUSR1 or SIGHUP, saved, start me again (EX_TEMPFAIL)
REQUEUE = 75
CALLER = -1  # in a signal's place: the program that trains the run has asked


class StopRequest:
    """Whether a signal has asked the run to stop.

    A command listens from its first moment on; a script listens in this context.

    Args:
        speaks: whether to answer signals, where no command listens yet.

    Attributes:
        signal: the one that all ranks know of, and stop for: set by `agree`.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.signal: int | None = None
        self._command = signals.here()
        self._signals = self._command or Signals(speaks)

    def __enter__(self) -> "StopRequest":
        if self._command is None:
            self._signals.__enter__()
        else:
            self._signals.catch()  # SIGTERM, too, since MPI has begun
        return self

    def __exit__(self, *_: object) -> None:
        if self._command is None:
            self._signals.__exit__()

    @property
    def received(self) -> int | None:
        """The last signal that has come to this process, at any moment."""
        return self._signals.received

    @received.setter
    def received(self, number: int | None) -> None:
        self._signals.received = number

    def steps_begin(self) -> None:
        """From now on a signal is answered with the words that the run stops after its step."""
        self._signals.when = "after this step"

    def agree(self, comm: Communicator) -> bool:
        """Whether to stop: all ranks learn of a signal that any of them has received. Collective."""
        if comm.size == 1:
            self.signal = self.received or self.signal
            return self.signal is not None
        asked = (*SIGNALS, CALLER)
        came = np.array([number == self.received for number in asked], np.int32)
        comm.all_reduce(came)
        numbers = [number for number, count in zip(asked, came, strict=True) if count]
        self.signal = max([*numbers, *([] if self.signal is None else [self.signal])], default=None)
        return self.signal is not None

    def ask(self) -> None:
        """Ask the run to stop, as a signal would."""
        if self.received is None:
            self.received = CALLER

    @property
    def name(self) -> str:
        """What the run stops for, for messages."""
        if self.signal is None or self.signal == CALLER:
            return "its caller"
        return signal.Signals(self.signal).name

    @property
    def exit_code(self) -> int:
        return (
            0 if self.signal in (None, CALLER) else 130 if self.signal == signal.SIGINT else REQUEUE
        )
