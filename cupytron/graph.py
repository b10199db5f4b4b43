"""CUDA graphs: work that is recorded once and replayed, and the memory that belongs to it."""

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any

WARMUP = 2  # runs before one is recorded: kernels are compiled, plans are made


class _Source:
    """Where a pool gets memory from; notes when there was none.

    The pool then gives back all that is free, and asks again. What is free may be what the recording under
    way has used.
    """

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.ran_short = False

    def __call__(self, size: int) -> Any:
        try:
            return self.memory.MemoryPointer(self.memory.Memory(size), 0)
        except Exception:
            self.ran_short = True
            raise


# A pool of CuPy's that is dropped never gives its memory back: those of graphs that are gone wait here, by
# array library, for the next ones
_idle: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def _new_pool(xp: Any) -> tuple[_Source, Any]:
    source = _Source(xp.cuda.memory)
    return source, xp.cuda.MemoryPool(source)


def _retire(idle: list[Any], source: _Source, pool: Any) -> None:
    pool.free_all_blocks()
    idle.append((source, pool))


class Graph:
    """Work that is run a few times, then recorded once, and replayed from then on.

    What it allocates comes from a memory pool of its own, which lives as long as the recording: nobody
    else may have the addresses that a replay writes to.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self.usable = True
        idle = _idle.setdefault(device.xp, [])
        found: tuple[_Source, Any] = idle.pop() if idle else _new_pool(device.xp)
        self._source, self.pool = found
        weakref.finalize(self, _retire, idle, self._source, self.pool).atexit = False
        self.forget()
        device.graphs.add(self)

    def forget(self) -> None:
        """Start again: what is recorded does not fit any more."""
        self._runs = 0
        self._graph: Any = None

    def run(self, work: Callable[[], None]) -> None:
        """Run the work, by itself or as a replay."""
        if not self.usable:
            work()
            return
        if self._graph is None and self._runs >= WARMUP:
            self._record(work)
        if self._graph is not None:
            self._graph.launch(self.device.stream)
            return
        self._runs += 1
        with self._allocating() if self.usable else contextlib.nullcontext():
            work()

    def _allocating(self) -> Any:
        return self.device.xp.cuda.using_allocator(self.pool.malloc)

    def _record(self, work: Callable[[], None]) -> None:
        stream = self.device.stream
        self._source.ran_short = False
        with self._allocating():
            stream.begin_capture()
            try:
                work()
                self._graph = stream.end_capture()
            # whatever a library says of an operation that it cannot record, at once or at the end
            except Exception as error:
                with contextlib.suppress(Exception):  # the capture is invalid or over, and says so
                    stream.end_capture()
                self._give_up(f"{type(error).__name__}: {error}")
                return
        if self._source.ran_short:
            self._graph = None
            self._give_up("there is too little memory for a pool of its own")

    def _give_up(self, why: str) -> None:
        self.usable = False
        self.pool.free_all_blocks()  # lets go of what the recording has taken
        warnings.warn(
            f"CUDA graphs are off: a step cannot be recorded ({why}); "
            "it runs kernel by kernel, which is slower for small models",
            RuntimeWarning,
            stacklevel=2,
        )
