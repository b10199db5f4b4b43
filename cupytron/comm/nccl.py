"""Arrays on GPUs through NCCL: from GPU to GPU, on a stream of its own, without the host waiting.

At a call NCCL's stream waits for the current one, so for what the array is computed from; at the handle's
`wait` the stream that is current then waits for NCCL's: the one from whose pool the arrays are. Both are
events, which a CUDA graph can capture: a handle is then waited for in the capture that it was made in.

NCCL adds float32, float64 and integers in an order that it does not promise; all ranks get the same bits.
16-bit types are only moved by it, and added here in float32 in the order of the ranks (half.ordered_sum).

Messages: a kernel of NCCL's that receives holds back all that follows it on its communicator, a send to
the same rank among them. So each pair of neighbours has a communicator of two ranks for each direction,
once `connect(messages=True)` was called. Messages of other pairs go through the host's memory. Both ranks
have to mean the same size: unlike the host's communicators, NCCL does not see a misfit.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from cupytron import backend
from cupytron.comm.bookkeeping import CommunicationError
from cupytron.comm.communicator import Communicator
from cupytron.comm.gpu import Transport
from cupytron.comm.half import ordered_sum
from cupytron.comm.staged import Staged

# dtypes that NCCL adds; the rest is moved as bytes, which NCCL makes of what it moves anyway
_ADDED = {"float32", "float64", "int8", "uint8", "int32", "uint32", "int64", "uint64"}


class _Work:
    """Something under way on a channel, and the arrays that it reads and writes."""

    def __init__(self, done: Any, captured: bool, arrays: tuple[Any, ...]) -> None:
        self.done, self.captured, self.arrays = done, captured, arrays

    @property
    def over(self) -> bool:
        # CUDA may not be asked about an event of a graph
        return not self.captured and self.done.done


class _Channel:
    """An NCCL communicator, its stream, and what is under way there. Collective to make."""

    def __init__(self, size: int, identity: bytes, rank: int, axis: str) -> None:
        import cupy
        from cupy.cuda import nccl

        self._cupy = cupy
        try:
            self.comm = nccl.NcclCommunicator(size, identity, rank)
        except nccl.NcclError as error:
            raise CommunicationError(
                f"{axis}: NCCL cannot connect {size} ranks ({error}); NCCL_DEBUG=WARN in the "
                "environment says more, and --comm mpi-staged works without NCCL"
            ) from error
        # of high priority: where a multiprocessor falls free, what other ranks wait for goes first
        self.stream = cupy.cuda.Stream(non_blocking=True, priority=-1)
        # memory that Python lets go of may be used again at once, whatever another stream still does to it
        self._under_way: list[_Work] = []

    def start(self, call: Callable[[Any, int], None], *arrays: Any) -> Callable[[], None]:
        """Have NCCL do call(communicator, stream); what is returned waits.

        Arrays that are not waited for are held until NCCL is done with them.
        """
        current = self._cupy.cuda.get_current_stream()
        captured = current.is_capturing()
        if not captured:
            self._under_way = [work for work in self._under_way if not work.over]
        self.stream.wait_event(self._record(current))
        if arrays[0].nbytes:
            call(self.comm, self.stream.ptr)
        work = _Work(self._record(self.stream), captured, arrays)
        self._under_way.append(work)

        def wait() -> None:
            self._cupy.cuda.get_current_stream().wait_event(work.done)
            # from here on the order of this stream protects them, as it does arrays of any other kernel
            self._under_way = [other for other in self._under_way if other is not work]

        return wait

    def _record(self, stream: Any) -> Any:
        return stream.record(self._cupy.cuda.Event(disable_timing=True))

    def close(self) -> None:
        self.stream.synchronize()
        self._under_way = []
        self.comm.destroy()


class NCCL(Transport):
    """Through NCCL, with a communicator for this group that is made when the first array needs it.

    Args:
        host: the ranks, each with a GPU. staged: for messages of ranks that are not connected.
    """

    def __init__(self, host: Communicator, staged: Staged | None = None) -> None:
        from cupy.cuda import nccl

        super().__init__(host)
        self._nccl, self._staged = nccl, staged or Staged(host)
        self._all: _Channel | None = None
        self._links: dict[tuple[int, int], _Channel] = {}  # by sender and receiver

    def split(self, host: Communicator) -> "NCCL":
        return NCCL(host, self._staged.split(host))

    def connect(self, messages: bool) -> None:
        self._group()
        if not messages or self._links:
            return
        ranks = range(self.size)
        pairs = {(r, n % self.size) for r in ranks for n in (r + 1, r - 1)}
        mine = sorted(pair for pair in pairs if self.rank in pair)
        made = {pair: self._nccl.get_unique_id() for pair in mine if pair[0] == self.rank}
        known = {
            pair: name for said in self.host._gather_objects(made) for pair, name in said.items()
        }
        # both ranks wait for each other at each of these, so all ranks take them in one order
        for pair in mine:
            axis = f"{self.axis} {pair[0]} to {pair[1]}"
            self._links[pair] = _Channel(2, known[pair], pair.index(self.rank), axis)
        for pair in mine:
            self._greet(pair)

    def _greet(self, pair: tuple[int, int]) -> None:
        """Send one byte: at a first message NCCL makes the host wait for the other rank's."""
        import cupy

        byte = cupy.zeros(1, "uint8")
        if pair[0] == self.rank:
            self._send(byte, pair[1], buffered=False)()
        else:
            self._recv(byte, pair[0])()
        self._links[pair].stream.synchronize()

    def close(self) -> None:
        """As Transport.close; CUDA graphs that use NCCL have to be gone: it waits for them to be."""
        for channel in [*self._links.values(), *([self._all] if self._all else [])]:
            channel.close()
        self._all, self._links = None, {}

    def _group(self) -> _Channel:
        if self._all is None:
            self._refuse_capture("NCCL cannot be started: use it once before, or call connect()")
            name = self._nccl.get_unique_id() if self.rank == 0 else None
            names = self.host._gather_objects(name)
            self._all = _Channel(self.size, names[0], self.rank, self.axis)
        return self._all

    def _all_reduce(self, x: Any) -> Callable[[], None]:
        if x.dtype.name not in _ADDED:
            return self._gather_and_add(x)
        kind, ptr = self._kind(x), x.data.ptr
        return self._group().start(
            lambda comm, stream: comm.allReduce(
                ptr, ptr, x.size, kind, self._nccl.NCCL_SUM, stream
            ),
            x,
        )

    def _gather_and_add(self, x: Any) -> Callable[[], None]:
        flat = x.reshape(-1)
        parts = backend.array_module(x).empty((self.size, x.size), x.dtype)
        gathered = self._all_gather(flat, parts.reshape(-1), False)

        def finish() -> None:
            gathered()
            ordered_sum(parts, flat)

        return finish

    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], None]:
        if x.dtype.name in _ADDED:
            kind = self._kind(x)
            return self._group().start(
                lambda comm, stream: comm.reduceScatter(
                    x.data.ptr, out.data.ptr, out.size, kind, self._nccl.NCCL_SUM, stream
                ),
                x,
                out,
            )
        parts = backend.array_module(x).empty_like(x)
        came = self._all_to_all(x, parts)

        def finish() -> None:
            came()
            ordered_sum(parts.reshape(self.size, *out.shape), out)

        return finish

    def _all_gather(self, x: Any, out: Any, in_place: bool) -> Callable[[], None]:
        # NCCL sees by itself that x is this rank's own part of out
        return self._group().start(
            lambda comm, stream: comm.allGather(
                x.data.ptr, out.data.ptr, x.nbytes, self._nccl.NCCL_UINT8, stream
            ),
            x,
            out,
        )

    def _all_to_all(self, x: Any, out: Any) -> Callable[[], None]:
        part, byte = x.nbytes // self.size, self._nccl.NCCL_UINT8

        def call(comm: Any, stream: int) -> None:
            with self._at_once():
                for rank in range(self.size):
                    comm.send(x.data.ptr + rank * part, part, byte, rank, stream)
                    comm.recv(out.data.ptr + rank * part, part, byte, rank, stream)

        return self._group().start(call, x, out)

    def _broadcast(self, x: Any, root: int) -> None:
        ptr = x.data.ptr
        self._group().start(
            lambda comm, stream: comm.broadcast(
                ptr, ptr, x.nbytes, self._nccl.NCCL_UINT8, root, stream
            ),
            x,
        )()

    def _send(self, x: Any, to: int, buffered: bool) -> Callable[[], None]:
        link = self._links.get((self.rank, to))
        if link is None:
            return self._staged._send(x, to, buffered)
        if buffered:
            self._refuse_capture("a send has to be waited for: send(..., async_op=True)")
            x = x.copy()
        byte = self._nccl.NCCL_UINT8
        return link.start(lambda comm, stream: comm.send(x.data.ptr, x.nbytes, byte, 1, stream), x)

    def _recv(self, out: Any, source: int) -> Callable[[], None]:
        link = self._links.get((source, self.rank))
        if link is None:
            return self._staged._recv(out, source)
        byte = self._nccl.NCCL_UINT8
        return link.start(
            lambda comm, stream: comm.recv(out.data.ptr, out.nbytes, byte, 0, stream), out
        )

    def _kind(self, x: Any) -> int:
        return getattr(self._nccl, f"NCCL_{x.dtype.name.upper()}")

    @contextlib.contextmanager
    def _at_once(self) -> Iterator[None]:
        """NCCL's calls in here start together: none of them waits for another."""
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()
