"""Ranks as processes under MPI, through mpi4py's buffers. Imported only where a launcher is at work."""

from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from cupytron.comm.communicator import Communicator


class MPICommunicator(Communicator):
    """A group of MPI processes; all of them, unless `comm` says otherwise."""

    def __init__(self, comm: Any = None, axis: str = "world") -> None:
        self._comm = MPI.COMM_WORLD if comm is None else comm
        super().__init__(self._comm.rank, self._comm.size, axis)
        self._pending: list[tuple[Any, tuple[Any, ...]]] = []

    def split(self, color: int, key: int, axis: str) -> Communicator:
        return MPICommunicator(self._comm.Split(color, key), axis)

    def _all_reduce(self, x: Any) -> Callable[[], Any]:
        done = self._waiting(self._comm.Iallreduce(MPI.IN_PLACE, x, MPI.SUM), x)

        def wait() -> Any:
            done()
            return x

        return wait

    def _all_gather(self, x: Any, out: Any) -> Callable[[], Any]:
        return self._waiting(self._comm.Iallgather(x, out), x, out)

    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], Any]:
        return self._waiting(self._comm.Ireduce_scatter_block(x, out, MPI.SUM), x, out)

    def _all_to_all(self, x: Any, out: Any) -> None:
        self._comm.Alltoall(x, out)

    def _broadcast(self, x: Any, root: int) -> None:
        self._comm.Bcast(x, root)

    def _barrier(self) -> None:
        self._comm.Barrier()

    def _gather_objects(self, value: Any) -> list[Any]:
        return self._comm.allgather(value)

    def _send(self, x: Any, to: int) -> Callable[[], Any]:
        return self._waiting(self._comm.Isend(x, to), x)

    def _recv(self, out: Any, source: int) -> Callable[[], Any]:
        return self._waiting(self._comm.Irecv(out, source), out)

    def _waiting(self, request: Any, *buffers: Any) -> Callable[[], Any]:
        # MPI reads and writes the buffers until the request is done, also if nobody keeps the handle
        self._pending = [entry for entry in self._pending if not entry[0].Test()]
        entry = (request, buffers)
        self._pending.append(entry)

        def wait() -> None:
            request.Wait()
            self._pending = [other for other in self._pending if other is not entry]

        return wait
