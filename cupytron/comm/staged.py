"""Arrays on a GPU sent through the host's memory: slow, and possible with every MPI library and GPU.

An operation copies its array to pinned memory, waits for the copy and hands it to the host's communicator;
`wait` waits for that one and has the GPU copy the result back. The host does wait here: what was enqueued
before an operation has to be over before it starts.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from cupytron.comm.communicator import Communicator
from cupytron.comm.gpu import Transport

_SMALLEST = 512  # bytes of a piece of pinned memory


class Pinned:
    """A piece of the host's memory that a GPU reads and writes by itself.

    Attributes:
        array: the part that is in use, as a NumPy array.
        read: recorded after the last copy to a GPU, or None.
    """

    def __init__(self, size: int) -> None:
        import cupy

        self.memory = np.ndarray(size, np.uint8, buffer=cupy.cuda.alloc_pinned_memory(size))
        self.array = self.memory
        self.read: Any = None


class PinnedPool:
    """Pinned memory that is used again: to allocate it takes longer than most copies.

    Pieces have sizes of powers of two. A piece that a copy to the GPU may still read is not given out.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Pinned]] = defaultdict(list)

    def take(self, x: Any) -> Pinned:
        """A piece whose `array` has the shape and dtype of x."""
        size = max(_SMALLEST, 1 << (x.nbytes - 1).bit_length())
        free = self._free[size]
        ready = next((i for i, p in enumerate(free) if p.read is None or p.read.done), None)
        pinned = Pinned(size) if ready is None else free.pop(ready)
        pinned.array = pinned.memory[: x.nbytes].view(x.dtype).reshape(x.shape)
        return pinned

    def give(self, pinned: Pinned, read: Any = None) -> None:
        """Take a piece back; `read`: an event after which nothing reads it any more."""
        pinned.read = read
        self._free[pinned.memory.nbytes].append(pinned)


class Staged(Transport):
    """Through pinned memory and `host`'s own operations.

    Args:
        host: the ranks. pool: of the pinned memory; None: a new one.
    """

    def __init__(self, host: Communicator, pool: PinnedPool | None = None) -> None:
        super().__init__(host)
        self._pool = pool or PinnedPool()

    def split(self, host: Communicator) -> "Staged":
        return Staged(host, self._pool)

    def _all_reduce(self, x: Any) -> Callable[[], None]:
        held = self._down(x)
        return self._then(self.host._all_reduce(held.array), held, x)

    def _all_gather(self, x: Any, out: Any, in_place: bool) -> Callable[[], None]:
        held = self._room(out)
        mine = held.array[self.rank * len(x) : (self.rank + 1) * len(x)]
        x.get(out=mine)
        return self._then(self.host._all_gather(mine, held.array, True), held, out)

    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], None]:
        whole, held = self._down(x), self._room(out)
        wait = self.host._reduce_scatter(whole.array, held.array)
        return self._then(wait, held, out, whole)

    def _all_to_all(self, x: Any, out: Any) -> Callable[[], None]:
        whole, held = self._down(x), self._room(out)
        wait = self.host._all_to_all(whole.array, held.array)
        return self._then(wait, held, out, whole)

    def _broadcast(self, x: Any, root: int) -> None:
        if self.rank == root:
            held = self._down(x)
            self.host._broadcast(held.array, root)
            self._pool.give(held)
        else:
            held = self._room(x)
            self.host._broadcast(held.array, root)
            self._up(held, x)

    def _send(self, x: Any, to: int, buffered: bool) -> Callable[[], None]:
        held = self._down(x)
        wait = self.host._send(held.array, to, buffered)
        if buffered:  # copied once more: nobody will say when this piece is free again
            self._pool.give(held)
            return wait

        def finish() -> None:
            wait()
            self._pool.give(held)

        return finish

    def _recv(self, out: Any, source: int) -> Callable[[], None]:
        held = self._room(out)
        return self._then(self.host._recv(held.array, source), held, out)

    def _then(
        self, wait: Callable[[], None], held: Pinned, out: Any, spent: Pinned | None = None
    ) -> Callable[[], None]:
        """Wait, then copy from held to out. A piece whose handle is forgotten never comes back."""

        def finish() -> None:
            wait()
            self._up(held, out)
            if spent is not None:
                self._pool.give(spent)

        return finish

    def _room(self, x: Any) -> Pinned:
        self._refuse_capture(
            "arrays cannot be sent through the host's memory: switch graphs off, or choose --comm nccl"
        )
        return self._pool.take(x)

    def _down(self, x: Any) -> Pinned:
        """A copy of x in pinned memory; waits for it, and so for all that x is computed from."""
        held = self._room(x)
        x.get(out=held.array)
        return held

    def _up(self, held: Pinned, x: Any) -> None:
        import cupy

        stream = cupy.cuda.get_current_stream()
        x.set(held.array, stream)
        self._pool.give(held, stream.record(cupy.cuda.Event(disable_timing=True)))
