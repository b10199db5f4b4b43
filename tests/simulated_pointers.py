"""Addresses of the simulated GPU, for stand-ins of libraries that are given nothing else."""

import bisect
import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from simulated import memory, streams

_blocks: dict[int, Any] = {}  # references by address
_addresses: list[int] = []  # of these, in order
_lock = threading.Lock()  # ranks may be threads


@contextlib.contextmanager
def known_blocks() -> Iterator[None]:
    """Allocations that are made from now on can be found by their addresses."""
    original = memory.Block

    class KnownBlock(original):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            with _lock:
                if self.ptr not in _blocks:
                    bisect.insort(_addresses, self.ptr)
                _blocks[self.ptr] = weakref.ref(self)

    memory.Block = KnownBlock
    try:
        yield
    finally:
        memory.Block = original
        _blocks.clear()
        _addresses.clear()


def device_view(
    pointer: int, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None
) -> np.ndarray:
    """Device memory as NumPy sees it. Strides are in bytes, and not negative.

    Raises:
        AssertionError: it reaches beyond the allocation.
    """
    dtype = np.dtype(dtype)
    if strides is None:
        strides = tuple(dtype.itemsize * int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    reach = dtype.itemsize + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 in shape:
        return np.empty(shape, dtype)
    block = _block(pointer)
    if block is not None:
        assert not block.returned, "this memory was given back to the system"
        end = block.ptr + block.asked
        assert pointer + reach <= end, f"{pointer + reach - end} bytes beyond the allocation"
    buffer = (ctypes.c_char * reach).from_address(pointer)
    return np.ndarray(shape, dtype, buffer, strides=strides)


def _block(pointer: int) -> Any:
    """The allocation that an address lies in, if it was made under known_blocks."""
    with _lock:
        while place := bisect.bisect(_addresses, pointer):
            address = _addresses[place - 1]
            block = _blocks[address]()
            if block is not None:
                return block if pointer < block.ptr + block.size else None
            del _addresses[place - 1], _blocks[address]  # the system has it back
    return None


class _Touched:
    """What streams.issue wants to know of an array."""

    def __init__(self, view: np.ndarray) -> None:
        self._host, self.size = view, view.size
        self._memory = type("Memory", (), {"block": _block(view.ctypes.data)})


def issue(name: str, action: Callable[[], None], reads: Any, writes: Any, stream: int) -> None:
    """Work for a stream: done now, or recorded if the stream is capturing.

    Args:
        reads, writes: results of device_view.
        stream: its address.
    """
    touched = [[_Touched(view) for view in views] for views in (reads, writes)]
    streams.issue(name, action, *touched, stream=stream, kind="launch")
