"""What ranks say to each other: one protocol for one process, threads and MPI.

Arrays are contiguous and are split and joined along axis 0 only. An operation's array belongs to it until
it is done: with async_op=True, until the handle's `wait` has returned.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from cupytron import backend
from cupytron.comm.bookkeeping import Bookkeeping
from cupytron.comm.half import bits, is_half, ordered_sum


class Communicator(Bookkeeping):
    """A group of ranks along one axis of the mesh.

    Attributes:
        rank, size: of this process within the group.
        axis: the name that counters and messages use, such as "dp".
        calls, bytes: how often each operation was called here, and how many bytes this rank sent.
        debug: compare operation, shape and dtype over the ranks before each collective.
        operation: what this rank waits for just now, such as "all_reduce on dp", or None.
        trace: what hears when each operation and each wait began and ended (a bookkeeping.Recorder); None.
    """

    def __init__(self, rank: int, size: int, axis: str = "world") -> None:
        super().__init__(rank, size, axis)

    def __enter__(self) -> "Communicator":
        """`with open_world() as world:` ends all ranks if one of them fails."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        pass

    # collectives

    def all_reduce(self, x: Any, async_op: bool = False) -> Any:
        """Sum over the ranks, in place. Every rank's result has the same bits.

        Communication: 2 (size - 1) / size of the array's bytes sent by each rank. 16-bit floats with
        async_op take one phase, in which each rank sends its whole array to all others: (size - 1)
        times the array's bytes. For much data, a reduce_scatter and an all_gather are better.
        """
        if is_half(x):
            return self._half_all_reduce(x, async_op)
        self._begin("all_reduce", x, 2 * x.nbytes * (self.size - 1) // self.size)
        return self._run("all_reduce", self._all_reduce(x), async_op, x)

    def all_gather(self, x: Any, out: Any = None, async_op: bool = False) -> Any:
        """(n, ...) on each rank -> (size n, ...), in the order of the ranks.

        Args:
            x: this rank's part.
            out: where the parts go; None: a new array. x may be this rank's own part of it: then
                nothing is copied.
            async_op: return a handle.
        """
        if out is None:
            self._check_has_rows("all_gather", x)
            shape = (self.size * x.shape[0], *x.shape[1:])
            out, in_place = backend.array_module(x).empty(shape, x.dtype), False
        else:
            in_place = self._check_gathers(x, out)
        self._begin("all_gather", x, x.nbytes * (self.size - 1))
        return self._run(
            "all_gather", self._all_gather(bits(x), bits(out), in_place), async_op, out
        )

    def reduce_scatter(self, x: Any, async_op: bool = False) -> Any:
        """(size n, ...) on each rank -> this rank's part (n, ...) of the sum; a new array."""
        self._check_divides("reduce_scatter", x)
        self._begin("reduce_scatter", x, x.nbytes * (self.size - 1) // self.size)
        out = backend.array_module(x).empty((x.shape[0] // self.size, *x.shape[1:]), x.dtype)
        if is_half(x):
            wait = self._half_reduce_scatter(x, out)
        else:
            wait = self._reduce_scatter(x, out)
        return self._run("reduce_scatter", wait, async_op, out)

    def all_to_all(self, x: Any, async_op: bool = False) -> Any:
        """(size n, ...): part r goes to rank r -> (size n, ...): part r came from rank r; new."""
        self._check_divides("all_to_all", x)
        self._begin("all_to_all", x, x.nbytes * (self.size - 1) // self.size)
        out = backend.array_module(x).empty_like(x)
        return self._run("all_to_all", self._all_to_all(bits(x), bits(out)), async_op, out)

    def broadcast(self, x: Any, root: int = 0) -> Any:
        """Rank root's values, in place on every rank."""
        self._check_rank("root", root)
        sent = x.nbytes if self.rank == root and self.size > 1 else 0
        self._begin("broadcast", x, sent, f" from rank {root}")
        return self._run("broadcast", lambda: self._broadcast(bits(x), root), result=x)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.debug:
            self._compare("barrier")
        self.calls["barrier"] += 1
        self._run("barrier", self._barrier)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank: for settings and messages."""
        self.calls["gather_objects"] += 1
        values: list[Any] = []
        self._run("gather_objects", lambda: values.extend(self._gather_objects(value)))
        return values

    def collect_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on rank 0; [] on the others.

        For what only rank 0 needs: on every rank it would grow with the square of their number.
        """
        self.calls["collect_objects"] += 1
        values: list[Any] = []
        self._run("collect_objects", lambda: values.extend(self._collect_objects(value)))
        return values

    # between two ranks

    def send(self, x: Any, to: int, async_op: bool = False) -> Any:
        """Send an array to a rank.

        Without async_op the array is copied and may be used again at once: the call does not wait for
        the other rank, however large the array. With async_op nothing is copied.
        """
        self._check_rank("to", to)
        self._count("send", x, x.nbytes)
        wait = self._send(bits(x), to, buffered=not async_op)
        return self._run("send", wait if async_op else lambda: None, async_op)

    def recv(self, out: Any, source: int, async_op: bool = False) -> Any:
        """Receive an array from a rank into `out`; returns it."""
        self._check_rank("source", source)
        self._count("recv", out, 0)
        return self._run("recv", self._recv(bits(out), source), async_op, out)

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

    def connect(self, messages: bool = False) -> None:
        """Make now what the first array on a GPU would have to make. Collective.

        Best called where nothing is under way: before the first step, and before a CUDA graph is captured.

        Args:
            messages: neighbouring ranks, the last and the first among them, will send each other arrays.
        """

    def close(self) -> None:
        """Give a group made by `split` back, once everything under way in it is done. Collective.

        MPI libraries have room for about two thousand groups. The world stays open.
        """

    # what a kind of communicator implements; what returns a function does not wait, the function does

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
    def _barrier(self) -> None: ...
    @abstractmethod
    def _gather_objects(self, value: Any) -> list[Any]: ...

    def _collect_objects(self, value: Any) -> list[Any]:
        values = self._gather_objects(value)
        return values if self.rank == 0 else []

    @abstractmethod
    def _send(self, x: Any, to: int, buffered: bool) -> Callable[[], None]: ...
    @abstractmethod
    def _recv(self, out: Any, source: int) -> Callable[[], None]: ...

    # 16-bit floats

    def _half_reduce_scatter(self, x: Any, out: Any) -> Callable[[], None]:
        came = backend.array_module(x).empty_like(x)
        wait = self._all_to_all(bits(x), bits(came))

        def finish() -> None:
            wait()
            ordered_sum(came.reshape(self.size, *out.shape), out)

        return finish

    def _half_all_reduce(self, x: Any, async_op: bool) -> Any:
        xp, flat = backend.array_module(x), x.reshape(-1)
        n = -(-x.size // self.size)  # of the part that each rank sums, padded
        if async_op or self.size == 1:
            # one phase: a second collective, begun by wait, could come in another order on each rank
            self._begin("all_reduce", x, x.nbytes * (self.size - 1))
            parts = xp.empty((self.size, x.size), x.dtype)
            gathered = self._all_gather(bits(flat), bits(parts.reshape(-1)), False)

            def finish() -> None:
                gathered()
                ordered_sum(parts, flat)

            return self._run("all_reduce", finish, async_op, x)
        self._begin("all_reduce", x, 2 * n * x.itemsize * (self.size - 1))
        padded = xp.zeros(n * self.size, x.dtype)
        padded[: x.size] = flat
        mine = xp.empty(n, x.dtype)

        def both() -> None:
            self._half_reduce_scatter(padded, mine)()
            self._all_gather(bits(mine), bits(padded), False)()
            flat[...] = padded[: x.size]

        return self._run("all_reduce", both, result=x)
