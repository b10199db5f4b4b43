"""Groups whose ranks have GPUs: arrays there take a way of their own, everything else the host's.

A program has one communicator and need not ask where its arrays are. All ranks give an operation the same
kind of array, and a message is received into the kind that was sent.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from cupytron import backend
from cupytron.comm.alone import SelfCommunicator
from cupytron.comm.bookkeeping import CommunicationError
from cupytron.comm.communicator import Communicator


class Transport(ABC):
    """How arrays on GPUs go from rank to rank of one group.

    Operations are a communicator's inner ones, with the same names and arguments: they start, and what
    they return waits. 16-bit floats come as their bits. To wait is to make the stream that is current then
    wait: what is enqueued on it later finds the result.

    Args:
        host: the same ranks, for host arrays and objects.
    """

    def __init__(self, host: Communicator) -> None:
        self.host = host
        self.rank, self.size, self.axis = host.rank, host.size, host.axis

    @abstractmethod
    def split(self, host: Communicator) -> "Transport":
        """The same way for a group that has been split off, `host`."""

    def connect(self, messages: bool) -> None:  # noqa: B027  not all have something to open
        """As Communicator.connect."""

    def close(self) -> None:  # noqa: B027
        """Give back what was opened; the next use opens it again. Collective."""

    @abstractmethod
    def _all_reduce(self, x: Any) -> Callable[[], None]: ...
    @abstractmethod
    def _all_gather(self, x: Any, out: Any, in_place: bool) -> Callable[[], None]: ...
    @abstractmethod
    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], None]: ...
    @abstractmethod
    def _all_to_all(self, x: Any, out: Any) -> Callable[[], None]: ...
    @abstractmethod
    def _broadcast(self, x: Any, root: int) -> None: ...
    @abstractmethod
    def _send(self, x: Any, to: int, buffered: bool) -> Callable[[], None]: ...
    @abstractmethod
    def _recv(self, out: Any, source: int) -> Callable[[], None]: ...

    def _refuse_capture(self, why: str) -> None:
        """An operation that the CUDA graph which is being captured, if any, cannot hold."""
        import cupy

        if cupy.cuda.get_current_stream().is_capturing():
            raise CommunicationError(f"{self.axis}: while a CUDA graph is captured, {why}")


class GPUCommunicator(Communicator):
    """Host arrays and objects through `host`, arrays on a GPU through `transport`.

    The times that its `trace` hears are the host's: of the calls, not of what the GPU does later.
    """

    def __init__(self, host: Communicator, transport: Transport) -> None:
        super().__init__(host.rank, host.size, host.axis)
        self.host, self.transport = host, transport
        # a rank alone copies within its GPU, if anything
        self._device = transport if host.size > 1 else SelfCommunicator(host.axis)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.host.__exit__(kind, error, trace)

    def split(self, color: int, key: int, axis: str) -> Communicator:
        group = self.host.split(color, key, axis)
        return GPUCommunicator(group, self.transport.split(group))

    def connect(self, messages: bool = False) -> None:
        if self.size > 1:
            self.transport.connect(messages)

    def close(self) -> None:
        self.transport.close()
        self.host.close()

    def _begin(self, operation: str, x: Any, sent: int, detail: str = "") -> None:
        where = "" if self._way(x) is self.host else " on a GPU"
        super()._begin(operation, x, sent, f"{where}{detail}")

    def _way(self, x: Any) -> Any:
        return self.host if backend.array_module(x) is np else self._device

    def _all_reduce(self, x: Any) -> Callable[[], None]:
        # a transport that adds by itself waits for the others' arrays here already
        self._waits_for = "all_reduce"
        try:
            return self._way(x)._all_reduce(x)
        finally:
            self._waits_for = None

    def _all_gather(self, x: Any, out: Any, in_place: bool) -> Callable[[], None]:
        return self._way(x)._all_gather(x, out, in_place)

    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], None]:
        return self._way(x)._reduce_scatter(x, out)

    def _all_to_all(self, x: Any, out: Any) -> Callable[[], None]:
        return self._way(x)._all_to_all(x, out)

    def _broadcast(self, x: Any, root: int) -> None:
        self._way(x)._broadcast(x, root)

    def _barrier(self) -> None:
        self.host._barrier()

    def _gather_objects(self, value: Any) -> list[Any]:
        return self.host._gather_objects(value)

    def _collect_objects(self, value: Any) -> list[Any]:
        return self.host._collect_objects(value)

    def _send(self, x: Any, to: int, buffered: bool) -> Callable[[], None]:
        return self._way(x)._send(x, to, buffered)

    def _recv(self, out: Any, source: int) -> Callable[[], None]:
        return self._way(out)._recv(out, source)
