"""What every rank keeps of its calls: counters, checks, and which operation it waits for."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from cupytron import backend, progress
from cupytron.comm.half import is_half
from cupytron.errors import CupytronError


class CommunicationError(CupytronError):
    """Ranks that do not say the same, or a rank that has failed."""


class Handle:
    """An operation under way; `wait` gives its result."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        self._finish: Callable[[], Any] | None = finish
        self._result: Any = None

    def wait(self) -> Any:
        """The operation's result, once it is there; may be called again."""
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        return self._result


class Recorder(Protocol):
    """What hears of a communicator's calls as its `trace`."""

    def operation(
        self, name: str, axis: str, start: float, end: float, sent: int, waiting: bool
    ) -> None:
        """An operation was called, which took from start to end (of time.perf_counter).

        Args:
            sent: bytes that this rank sends, as counted. waiting: this is the wait of a handle, which
                an earlier call has given.
        """


class Bookkeeping(ABC):
    """A rank of a group, without the operations; `Communicator` says what the attributes mean."""

    def __init__(self, rank: int, size: int, axis: str) -> None:
        self.rank, self.size, self.axis = rank, size, axis
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.debug = False
        self.trace: Recorder | None = None
        self._waits_for: str | None = None
        self._called: tuple[float, int] | None = None  # with a trace: when, and bytes to send

    @property
    def operation(self) -> str | None:
        """What this rank waits for just now, such as "all_reduce on dp"; another thread may ask."""
        name = self._waits_for
        return None if name is None else f"{name} on {self.axis}"

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Compare the ranks' calls while this lasts."""
        before, self.debug = self.debug, True
        try:
            yield
        finally:
            self.debug = before

    @abstractmethod
    def _gather_objects(self, value: Any) -> list[Any]: ...

    def _run(
        self, operation: str, wait: Callable[[], None], async_op: bool = False, result: Any = None
    ) -> Any:
        """Wait for an operation that has been started, now or when the handle is asked to."""
        if self.trace is not None:
            wait = self._traced(self.trace, operation, wait, async_op)

        def finish() -> Any:
            self._waits_for = operation
            try:
                wait()
            finally:
                self._waits_for = None
                progress.beat()
            return result

        return Handle(finish) if async_op else finish()

    def _traced(
        self, trace: Recorder, operation: str, wait: Callable[[], None], async_op: bool
    ) -> Callable[[], None]:
        """Tell of a call: at its end; and if it leaves a handle, of that one's wait too."""
        called, sent = self._called or (time.perf_counter(), 0)
        self._called = None
        if async_op:
            trace.operation(operation, self.axis, called, time.perf_counter(), sent, waiting=False)

        def traced_wait() -> None:
            start = time.perf_counter() if async_op else called
            wait()
            trace.operation(operation, self.axis, start, time.perf_counter(), sent, async_op)

        return traced_wait

    def _begin(self, operation: str, x: Any, sent: int, detail: str = "") -> None:
        if self.debug:
            self._compare(f"{operation} of {x.shape} {x.dtype}{detail}")
        self._count(operation, x, sent)

    def _count(self, operation: str, x: Any, sent: int) -> None:
        if not x.flags.c_contiguous:
            raise CommunicationError(
                f"{operation} on {self.axis}: the array of shape {x.shape} is not contiguous; "
                "make it so with ascontiguousarray"
            )
        if not (x.dtype.kind in "iuf" or is_half(x)) or not x.dtype.isnative or x.ndim == 0:
            raise CommunicationError(
                f"{operation} on {self.axis}: an array of shape {x.shape} {x.dtype} cannot be sent; send "
                "integers or floats of this machine's byte order, with at least one dim"
            )
        self.calls[operation] += 1
        self.bytes[operation] += sent
        if self.trace is not None:
            self._called = time.perf_counter(), sent

    def _compare(self, call: str) -> None:
        said = self._gather_objects(call)
        for rank, other in enumerate(said):
            if other != said[0]:
                raise CommunicationError(
                    f"ranks of {self.axis} disagree: rank 0 calls {said[0]}, rank {rank} {other}"
                )

    def _check_divides(self, operation: str, x: Any) -> None:
        self._check_has_rows(operation, x)
        if x.shape[0] % self.size:
            raise CommunicationError(
                f"{operation} on {self.axis}: shape {x.shape} cannot be cut into {self.size} "
                "parts; pad axis 0"
            )

    def _check_has_rows(self, operation: str, x: Any) -> None:
        if x.ndim == 0:
            raise CommunicationError(f"{operation} on {self.axis}: a scalar has no axis 0")

    def _check_rank(self, name: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise CommunicationError(
                f"{name}={rank} is not a rank of {self.axis}, which has 0 ... {self.size - 1}"
            )

    def _check_gathers(self, x: Any, out: Any) -> bool:
        """Refuse an `out` that does not take the parts; returns whether x is its own part of it."""
        self._check_has_rows("all_gather", x)
        problem = None
        if out.dtype != x.dtype or out.shape != (self.size * x.shape[0], *x.shape[1:]):
            problem = f"does not take {self.size} parts of {x.shape} {x.dtype}"
        elif not out.flags.c_contiguous:
            problem = "is not contiguous; make it so with ascontiguousarray"
        offset = _address(x) - _address(out)
        own = offset == self.rank * x.nbytes
        if problem is None and not own and -x.nbytes < offset < out.nbytes:
            problem = "overlaps the part that is sent, which is not this rank's own part of it"
        if problem:
            raise CommunicationError(
                f"all_gather on {self.axis}: out of {out.shape} {out.dtype} {problem}"
            )
        return own

    def _take(self, came: Any, out: Any, source: int) -> None:
        """Put a message where it belongs."""
        if came.shape != out.shape or came.dtype != out.dtype:
            raise self._misfit(out, source, f"{came.shape} {came.dtype}")
        out[...] = came

    def _misfit(self, out: Any, source: int, sent: str) -> CommunicationError:
        return CommunicationError(
            f"recv on {self.axis}: rank {source} sent {sent}, "
            f"rank {self.rank} expects {out.shape} {out.dtype}"
        )


def _address(x: Any) -> int:
    """Where an array's data begin."""
    return x.__array_interface__["data"][0] if backend.array_module(x) is np else x.data.ptr
