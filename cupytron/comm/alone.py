"""One process alone."""

from collections.abc import Callable
from typing import Any

from cupytron.comm.bookkeeping import CommunicationError
from cupytron.comm.communicator import Communicator


def _nothing() -> None:
    return None


class SelfCommunicator(Communicator):
    """A group of one rank, so that nothing anywhere has to ask whether there are others."""

    def __init__(self, axis: str = "world") -> None:
        super().__init__(0, 1, axis)
        self._mail: list[Any] = []

    def split(self, color: int, key: int, axis: str) -> Communicator:
        return SelfCommunicator(axis)

    def _all_reduce(self, x: Any) -> Callable[[], None]:
        return _nothing

    def _all_gather(self, x: Any, out: Any, in_place: bool) -> Callable[[], None]:
        if not in_place:
            out[...] = x
        return _nothing

    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], None]:
        out[...] = x
        return _nothing

    def _all_to_all(self, x: Any, out: Any) -> Callable[[], None]:
        out[...] = x
        return _nothing

    def _broadcast(self, x: Any, root: int) -> None:
        pass

    def _barrier(self) -> None:
        pass

    def _gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def _send(self, x: Any, to: int, buffered: bool) -> Callable[[], None]:
        self._mail.append(x.copy())
        return _nothing

    def _recv(self, out: Any, source: int) -> Callable[[], None]:
        def wait() -> None:
            if not self._mail:
                raise CommunicationError(
                    f"rank 0 of {self.axis} waits for itself: nothing was sent"
                )
            self._take(self._mail.pop(0), out, source)

        return wait
