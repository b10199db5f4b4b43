"""What ranks say to each other: one protocol for one process, threads and MPI.

Arrays are contiguous and are split and joined along axis 0 only. 16-bit floats are moved as raw bits and
summed in float32 here, never by the library underneath: MPI knows no bfloat16, and one MPI library sums
its bytes without a word.
"""

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cupytron import backend
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


class Communicator(ABC):
    """A group of ranks along one axis of the mesh.

    Attributes:
        rank, size: of this process within the group.
        axis: the name that counters and messages use, such as "dp".
        calls, bytes: how often each operation was called here, and how many bytes this rank sent.
        debug: compare operation, shape and dtype over the ranks before each collective.
    """

    def __init__(self, rank: int, size: int, axis: str = "world") -> None:
        self.rank, self.size, self.axis = rank, size, axis
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.debug = False

    # collectives

    def all_reduce(self, x: Any, async_op: bool = False) -> Any:
        """Sum over the ranks, in place. Every rank's result has the same bits.

        Communication: 2 (size - 1) / size of the array's bytes sent by each rank.
        """
        self._begin("all_reduce", x, 2 * x.nbytes * (self.size - 1) // self.size)
        if _is_half(x):
            return self._done(self._half_all_reduce(x), async_op)
        return self._run(lambda: self._all_reduce(x), async_op)

    def all_gather(self, x: Any, async_op: bool = False) -> Any:
        """(n, ...) on each rank -> (size n, ...), in the order of the ranks; a new array."""
        self._begin("all_gather", x, x.nbytes * (self.size - 1))
        out = backend.array_module(x).empty((self.size * x.shape[0], *x.shape[1:]), x.dtype)
        raw, raw_out = _bits(x), _bits(out)

        def finish(wait: Callable[[], Any]) -> Any:
            wait()
            return out

        return self._run(lambda: self._all_gather(raw, raw_out), async_op, finish)

    def reduce_scatter(self, x: Any, async_op: bool = False) -> Any:
        """(size n, ...) on each rank -> this rank's part (n, ...) of the sum; a new array."""
        self._check_divides("reduce_scatter", x)
        self._begin("reduce_scatter", x, x.nbytes * (self.size - 1) // self.size)
        if _is_half(x):
            return self._done(self._half_reduce_scatter(x), async_op)
        out = backend.array_module(x).empty((x.shape[0] // self.size, *x.shape[1:]), x.dtype)

        def finish(wait: Callable[[], Any]) -> Any:
            wait()
            return out

        return self._run(lambda: self._reduce_scatter(x, out), async_op, finish)

    def all_to_all(self, x: Any) -> Any:
        """(size n, ...): part r goes to rank r -> (size n, ...): part r came from rank r; new."""
        self._check_divides("all_to_all", x)
        self._begin("all_to_all", x, x.nbytes * (self.size - 1) // self.size)
        out = backend.array_module(x).empty_like(x)
        self._all_to_all(_bits(x), _bits(out))
        return out

    def broadcast(self, x: Any, root: int = 0) -> Any:
        """Rank root's values, in place on every rank."""
        self._check_rank("root", root)
        sent = x.nbytes if self.rank == root and self.size > 1 else 0
        self._begin("broadcast", x, sent, f" from rank {root}")
        self._broadcast(_bits(x), root)
        return x

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.debug:
            self._compare("barrier")
        self.calls["barrier"] += 1
        self._barrier()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank: for settings and messages."""
        self.calls["gather_objects"] += 1
        return self._gather_objects(value)

    # between two ranks

    def send(self, x: Any, to: int, async_op: bool = False) -> Any:
        """Send an array to a rank."""
        self._check_rank("to", to)
        self._count("send", x, x.nbytes)
        return self._run(lambda: self._send(_bits(x), to), async_op)

    def recv(self, out: Any, source: int, async_op: bool = False) -> Any:
        """Receive an array from a rank into `out`; returns it."""
        self._check_rank("source", source)
        self._count("recv", out, 0)

        def finish(wait: Callable[[], Any]) -> Any:
            wait()
            return out

        return self._run(lambda: self._recv(_bits(out), source), async_op, finish)

    def exchange(
        self, sends: Sequence[tuple[Any, int]], recvs: Sequence[tuple[Any, int]]
    ) -> list[Any]:
        """Sends (array, to) and receives (array, source) together: no order of them can deadlock."""
        handles = [self.recv(out, source, async_op=True) for out, source in recvs]
        handles += [self.send(x, to, async_op=True) for x, to in sends]
        return [handle.wait() for handle in handles][: len(recvs)]

    @abstractmethod
    def split(self, color: int, key: int, axis: str) -> "Communicator":
        """The ranks of the same color as a group of their own, ordered by key. Collective."""

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Compare the ranks' calls while this lasts."""
        before, self.debug = self.debug, True
        try:
            yield
        finally:
            self.debug = before

    # what a kind of communicator implements: blocking parts return a function that waits

    @abstractmethod
    def _all_reduce(self, x: Any) -> Callable[[], Any]: ...
    @abstractmethod
    def _all_gather(self, x: Any, out: Any) -> Callable[[], Any]: ...
    @abstractmethod
    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], Any]: ...
    @abstractmethod
    def _all_to_all(self, x: Any, out: Any) -> None: ...
    @abstractmethod
    def _broadcast(self, x: Any, root: int) -> None: ...
    @abstractmethod
    def _barrier(self) -> None: ...
    @abstractmethod
    def _gather_objects(self, value: Any) -> list[Any]: ...
    @abstractmethod
    def _send(self, x: Any, to: int) -> Callable[[], Any]: ...
    @abstractmethod
    def _recv(self, out: Any, source: int) -> Callable[[], Any]: ...

    # shared

    def _run(
        self,
        start: Callable[[], Callable[[], Any]],
        async_op: bool,
        finish: Callable[[Callable[[], Any]], Any] | None = None,
    ) -> Any:
        wait = start()
        handle = Handle(wait if finish is None else lambda: finish(wait))
        return handle if async_op else handle.wait()

    def _done(self, result: Any, async_op: bool) -> Any:
        return Handle(lambda: result) if async_op else result

    def _half_reduce_scatter(self, x: Any) -> Any:
        out = backend.array_module(x).empty_like(x)
        self._all_to_all(_bits(x), _bits(out))
        parts = out.reshape(self.size, x.shape[0] // self.size, *x.shape[1:])
        # the order of the ranks, in float32, rounded once
        return parts.astype(np.float32).sum(axis=0).astype(x.dtype)

    def _half_all_reduce(self, x: Any) -> Any:
        xp, flat = backend.array_module(x), x.reshape(-1)
        padded = xp.zeros(-(-flat.size // self.size) * self.size, x.dtype)
        padded[: flat.size] = flat
        mine = self._half_reduce_scatter(padded)
        self._all_gather(_bits(mine), _bits(padded))()
        flat[...] = padded[: flat.size]
        return x

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
        self.calls[operation] += 1
        self.bytes[operation] += sent

    def _compare(self, call: str) -> None:
        said = self._gather_objects(call)
        for rank, other in enumerate(said):
            if other != said[0]:
                raise CommunicationError(
                    f"ranks of {self.axis} disagree: rank 0 calls {said[0]}, rank {rank} {other}"
                )

    def _check_divides(self, operation: str, x: Any) -> None:
        if x.ndim == 0 or x.shape[0] % self.size:
            raise CommunicationError(
                f"{operation} on {self.axis}: shape {x.shape} cannot be cut into {self.size} "
                "parts; pad axis 0"
            )

    def _check_rank(self, name: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise CommunicationError(
                f"{name}={rank} is not a rank of {self.axis}, which has 0 ... {self.size - 1}"
            )


def _is_half(x: Any) -> bool:
    return x.dtype.itemsize == 2 and x.dtype.kind not in "iu"


def _bits(x: Any) -> Any:
    """16-bit floats as integers: every library can move those."""
    return x.view(np.uint16) if _is_half(x) else x


def _nothing() -> None:
    return None


class SelfCommunicator(Communicator):
    """A group of one rank, so that nothing anywhere has to ask whether there are others."""

    def __init__(self, axis: str = "world") -> None:
        super().__init__(0, 1, axis)
        self._mail: list[Any] = []

    def split(self, color: int, key: int, axis: str) -> Communicator:
        return SelfCommunicator(axis)

    def _all_reduce(self, x: Any) -> Callable[[], Any]:
        return lambda: x

    def _all_gather(self, x: Any, out: Any) -> Callable[[], Any]:
        out[...] = x
        return _nothing

    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], Any]:
        out[...] = x
        return _nothing

    def _all_to_all(self, x: Any, out: Any) -> None:
        out[...] = x

    def _broadcast(self, x: Any, root: int) -> None:
        pass

    def _barrier(self) -> None:
        pass

    def _gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def _send(self, x: Any, to: int) -> Callable[[], Any]:
        self._mail.append(x.copy())
        return _nothing

    def _recv(self, out: Any, source: int) -> Callable[[], Any]:
        def wait() -> None:
            if not self._mail:
                raise CommunicationError(
                    f"rank 0 of {self.axis} waits for itself: nothing was sent"
                )
            out[...] = self._mail.pop(0)

        return wait
