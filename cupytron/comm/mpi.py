"""Ranks as processes under MPI, through mpi4py's buffers. Imported only where a launcher is at work."""

import atexit
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from cupytron import progress
from cupytron.comm.bookkeeping import CommunicationError
from cupytron.comm.communicator import Communicator
from cupytron.comm.half import ordered_sum
from cupytron.errors import CupytronError
from cupytron.failing import end_job

# elements in one operation: MPI counted with a C int until version 4
MOST_ELEMENTS = 2**31 - 1 if MPI.Get_version()[0] < 4 else 2**63 - 1


class _Request:
    """A request of MPI's, the buffers that it reads and writes, and how it ended."""

    def __init__(self, owner: Communicator, request: Any, buffers: tuple[Any, ...]) -> None:
        self.owner, self.buffers = owner, buffers
        self.buffered = False  # a send that nobody waits for
        self.status = MPI.Status()
        self.error: Exception | None = None
        self._request = request

    def done(self) -> bool:
        return self._end(self._request.Test)

    def wait(self) -> None:
        # a wait that was interrupted may be repeated; one that is over returns at once
        self._end(self._request.Wait)
        if self.error is not None:
            raise self.error

    def _end(self, call: Callable[[Any], bool]) -> bool:
        if self._request == MPI.REQUEST_NULL:
            return True  # asking again would empty the status
        try:
            return call(self.status)
        except MPI.Exception as error:
            # kept for whoever waits: another operation may be the one that finds out
            self.error = error
            return True


# MPI reads and writes buffers until a request is done, also if nobody keeps the handle
_pending: list[_Request] = []


def _complete(wanted: Callable[[_Request], bool]) -> None:
    global _pending
    for request in _pending:
        if wanted(request):
            request.wait()
    _pending = [request for request in _pending if not wanted(request)]


class MPICommunicator(Communicator):
    """A group of MPI processes; all of them, unless `comm` says otherwise."""

    def __init__(self, comm: Any = None, axis: str = "world") -> None:
        self._comm = MPI.COMM_WORLD if comm is None else comm
        self._own = comm is not None
        super().__init__(self._comm.rank, self._comm.size, axis)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            known = isinstance(error, CupytronError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            end_job(error, text, 1, show_traceback=not known)

    def split(self, color: int, key: int, axis: str) -> Communicator:
        with progress.waiting(f"split on {self.axis}"):
            return MPICommunicator(self._comm.Split(color, key), axis)

    def close(self) -> None:
        _complete(lambda request: request.owner is self)
        if self._own:
            self._own = False
            with progress.waiting(f"close on {self.axis}"):
                self._comm.Free()

    def _all_reduce(self, x: Any) -> Callable[[], None]:
        self._check_count("all_reduce", x.size)
        return self._started(self._comm.Iallreduce(MPI.IN_PLACE, x, MPI.SUM), x).wait

    def _all_gather(self, x: Any, out: Any, in_place: bool) -> Callable[[], None]:
        self._check_count("all_gather", x.size)
        request = self._comm.Iallgather(MPI.IN_PLACE if in_place else x, out)
        return self._started(request, x, out).wait

    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], None]:
        # ten times faster than MPICH's Ireduce_scatter_block on a bucket of a megabyte, and the sums have
        # the order of the ranks whatever the library
        parts = np.empty_like(x)
        wait = self._all_to_all(x, parts)

        def finish() -> None:
            wait()
            ordered_sum(parts.reshape(self.size, *out.shape), out)

        return finish

    def _all_to_all(self, x: Any, out: Any) -> Callable[[], None]:
        self._check_count("all_to_all", x.size // self.size)
        return self._started(self._comm.Ialltoall(x, out), x, out).wait

    def _broadcast(self, x: Any, root: int) -> None:
        self._check_count("broadcast", x.size)
        self._comm.Bcast(x, root)

    def _barrier(self) -> None:
        self._comm.Barrier()

    def _gather_objects(self, value: Any) -> list[Any]:
        return self._comm.allgather(value)

    def _collect_objects(self, value: Any) -> list[Any]:
        return self._comm.gather(value) or []

    def _send(self, x: Any, to: int, buffered: bool) -> Callable[[], None]:
        return self._post_send(x.copy() if buffered else x, to, buffered)

    def _post_send(self, x: Any, to: int, buffered: bool) -> Callable[[], None]:
        """Start to send an array that nobody will change; buffered: nobody will wait for it, either."""
        self._check_count("send", x.size)
        request = self._started(self._comm.Isend(x, to), x)
        request.buffered = buffered
        return request.wait

    def _recv(self, out: Any, source: int) -> Callable[[], None]:
        self._check_count("recv", out.size)
        request = self._started(self._comm.Irecv(out, source), out)

        def wait() -> None:
            try:
                request.wait()
            except MPI.Exception as error:
                if error.Get_error_class() != MPI.ERR_TRUNCATE:
                    raise
                # one library says how long the message was, the other how much of it came
                sent = _bytes_of(request.status)
                more = "more than " if sent <= out.nbytes else ""
                raise self._misfit(out, source, f"{more}{sent} bytes") from None
            if (sent := _bytes_of(request.status)) != out.nbytes:
                raise self._misfit(out, source, f"{sent} bytes")

        return wait

    def _check_count(self, operation: str, count: int) -> None:
        """Refuse a message with more elements than this MPI library can count.

        Args:
            operation: for the message.
            count: elements that go to or come from one rank.

        Raises:
            CommunicationError: there are more than MOST_ELEMENTS.
        """
        if count > MOST_ELEMENTS:
            major, minor = MPI.Get_version()
            raise CommunicationError(
                f"{operation} on {self.axis}: {count:,} elements, and this library's MPI {major}.{minor} "
                f"takes at most {MOST_ELEMENTS:,} at once; use a library with MPI 4 or later, such as "
                "MPICH, or cut the model into smaller parts (tp)"
            )

    def _started(self, request: Any, *buffers: Any) -> _Request:
        global _pending
        started = _Request(self, request, buffers)
        _pending = [*(other for other in _pending if not other.done()), started]
        return started


def _bytes_of(status: Any) -> int:
    """Bytes of a received message. Before MPI 4, Get_count cannot count 2 GiB or more."""
    return status.Get_elements(MPI.BYTE)


# mpi4py ends MPI after this
atexit.register(_complete, lambda request: request.buffered and not MPI.Is_finalized())
