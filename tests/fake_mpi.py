"""A stand-in for mpi4py's MPI that is CUDA-aware: ranks are threads, memory is the simulated GPU's.

Each call is noted. It refuses memory on which work is under way that the host has not waited for: MPI knows
nothing of streams. Like a real library it can add no bfloat16, and it is never asked to add device memory.
"""

import threading
import types
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from simulated import bytes_at, find_memory, state


class Call(NamedTuple):
    """One call of a communicator's method."""

    name: str
    rank: int
    dtypes: tuple[str, ...]  # of device memory
    peer: int | None


class Status:
    def __init__(self) -> None:
        self.count = 0

    def Get_elements(self, datatype: Any) -> int:
        return self.count


class Truncated(Exception):
    def Get_error_class(self) -> int:
        return 15


NULL = object()


class Request:
    """Something under way; over once it was waited for."""

    def __init__(self, finish: Callable[[], None], received: int = 0) -> None:
        self._finish: Callable[[], None] | None = finish
        self._received = received
        self._lock = threading.Lock()

    def __eq__(self, other: object) -> bool:
        return other is NULL and self._finish is None

    __hash__ = None  # type: ignore[assignment]

    def Test(self, status: Status) -> bool:
        return False

    def Wait(self, status: Status) -> bool:
        with self._lock:
            if self._finish is not None:
                self._finish()
                self._finish = None
                status.count = self._received
        return True


class Comm:
    """A communicator over threads; what it does is done by a ThreadCommunicator on the bytes."""

    def __init__(self, threads: Any, calls: list[Call]) -> None:
        self._threads, self.calls = threads, calls
        self.rank, self.size = threads.rank, threads.size
        self._mail = threads._group.mail  # by sender and receiver
        self._changed = threads._group.world.changed

    def Split(self, color: int, key: int) -> "Comm":
        return Comm(self._threads.split(color, key, "split"), self.calls)

    def Free(self) -> None:
        pass

    def Barrier(self) -> None:
        self._threads._barrier()

    def allgather(self, value: Any) -> list[Any]:
        return self._threads._gather_objects(value)

    def Iallreduce(self, in_place: Any, x: Any, op: Any) -> Request:
        assert isinstance(x, np.ndarray), "a sum over device memory"
        return Request(self._threads._all_reduce(x))

    def Iallgather(self, x: Any, out: Any) -> Request:
        whole = self._memory("Iallgather", out, also=None if x is IN_PLACE else x)
        if x is IN_PLACE:
            n = len(whole) // self.size
            part = whole[self.rank * n : (self.rank + 1) * n]
        else:
            part = _bytes(x)
        return Request(self._threads._all_gather(part, whole, x is IN_PLACE))

    def Ialltoall(self, x: Any, out: Any) -> Request:
        target = self._memory("Ialltoall", out, also=x)
        return Request(self._threads._all_to_all(_bytes(x), target))

    def Bcast(self, x: Any, root: int) -> None:
        self._threads._broadcast(self._memory("Bcast", x, peer=root), root)

    def Isend(self, x: Any, to: int) -> Request:
        """The memory is read as late as it may be: when the message is received, or in Wait."""
        message = [self._memory("Isend", x, peer=to)]
        with self._changed:
            self._mail.setdefault((self.rank, to), deque()).append(message)
            self._changed.notify_all()

        def finish() -> None:
            with self._changed:
                message[0] = message[0].copy()

        return Request(finish)

    def Irecv(self, out: Any, source: int) -> Request:
        target = self._memory("Irecv", out, peer=source)

        def take() -> None:
            with self._changed:
                assert self._changed.wait_for(lambda: self._mail.get((source, self.rank)), 20)
                target[...] = self._mail[source, self.rank].popleft()[0]

        return Request(take, out.nbytes)

    def _memory(self, name: str, x: Any, also: Any = None, peer: int | None = None) -> np.ndarray:
        device = [a for a in (x, also) if a is not None and not isinstance(a, np.ndarray)]
        for array in device:
            assert array.dtype.kind in "iuf" and array.flags.c_contiguous, array.dtype
            assert over(array), (
                f"{name}: the host has not waited for what writes or reads the array"
            )
        dtypes = tuple(array.dtype.name for array in device)
        self.calls.append(Call(name, self.rank, dtypes, peer))
        return _bytes(x)


def over(array: Any) -> bool:
    """Whether the host has waited for all work on an array's memory."""
    if array.nbytes == 0:
        return True
    host, (block, first, behind) = state.sim().host_clock, find_memory(array.data.ptr, array.nbytes)
    return all(
        host.get(stream, 0) >= when
        for low, high, _, stream, when, _ in block.touched
        if low < behind and first < high
    )


def _bytes(x: Any) -> np.ndarray:
    if isinstance(x, np.ndarray):
        return x.reshape(-1).view(np.uint8)
    return bytes_at(x.data.ptr, x.nbytes)


IN_PLACE = object()
MPI = types.SimpleNamespace(
    Status=Status,
    Exception=Truncated,
    ERR_TRUNCATE=15,
    REQUEST_NULL=NULL,
    BYTE=object(),
    Get_version=lambda: (4, 0),
    SUM=object(),
    IN_PLACE=IN_PLACE,
    Is_finalized=lambda: False,
)
