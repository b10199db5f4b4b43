"""Which array library an array belongs to, and this process's threads.

BLAS runs with one thread. Our own few workers split matrix products by rows and elementwise work by
slices instead: NumPy's elementwise functions use one thread only, and OpenBLAS's idle threads spin on the
cores that the workers need (docs/decisions/0002-own-threads.md).
"""

import itertools
import queue
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

# Elements of a slice: a few temporaries of this size fit a core's L2 cache.
BLOCK = 1 << 16


def array_module(array: Any) -> ModuleType:
    """NumPy or CuPy, whichever `array` belongs to; CuPy is never imported here."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    return np


class Workers:
    """A fixed number of threads that share out the slices of one loop; the caller is one of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._busy = threading.Lock()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for _ in range(count - 1):
            threading.Thread(target=self._work, name="cupytron-worker", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._tasks.get()()

    def run(self, body: Callable[[int], None], length: int) -> None:
        """Call body(0) ... body(length - 1), each once, in any order, and wait for all of them."""
        # a loop inside a loop, or another rank's thread: no free worker, so the caller does it alone
        if self.count == 1 or length < 2 or not self._busy.acquire(blocking=False):
            for index in range(length):
                body(index)
            return
        try:
            self._share(body, length)
        finally:
            self._busy.release()

    def _share(self, body: Callable[[int], None], length: int) -> None:
        helpers = min(self.count, length) - 1
        indices = itertools.count()  # next() on it is atomic
        finished: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def take() -> None:
            while (index := next(indices)) < length:
                body(index)

        def helper() -> None:
            try:
                take()
            except BaseException as error:
                finished.put(error)
            else:
                finished.put(None)

        for _ in range(helpers):
            self._tasks.put(helper)
        errors = []
        try:
            take()
        except BaseException as error:
            errors.append(error)
        errors += [error for error in (finished.get() for _ in range(helpers)) if error]
        if errors:
            raise errors[0]


_workers = Workers(1)


def set_threads(count: int) -> None:
    """Let this process work with `count` threads (1 at first)."""
    global _workers
    if count != _workers.count:
        _workers = Workers(count)


def threads() -> int:
    """How many threads this process works with."""
    return _workers.count


def for_slices(xp: ModuleType, body: Callable[[slice], None], length: int, block: int) -> None:
    """Call `body` on slices of `block` that cover 0 ... length, on all threads; on a GPU on one slice.

    Where the slices begin depends on `length` and `block` only, so what `body` computes in a slice has
    the same bits for any number of threads.
    """
    block = max(1, block)
    count = slice_count(xp, length, block)
    if count == 1:
        body(slice(0, length))
        return
    _workers.run(lambda i: body(slice(i * block, min((i + 1) * block, length))), count)


def slice_count(xp: ModuleType, length: int, block: int) -> int:
    """How many slices for_slices makes."""
    return 1 if xp is not np else max(1, -(-length // max(1, block)))


def for_tasks(xp: ModuleType, body: Callable[[int], None], count: int) -> None:
    """Call body(0) ... body(count - 1) on all threads; on a GPU one after the other."""
    if xp is np:
        _workers.run(body, count)
    else:
        for index in range(count):
            body(index)


def rows_per_block(width: int) -> int:
    """Rows of `width` elements in a slice of about BLOCK elements."""
    return max(1, BLOCK // max(1, width))
