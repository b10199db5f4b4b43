"""Addresses of the simulated GPU, for stand-ins of libraries that are given nothing else."""

from collections.abc import Callable
from typing import Any

import numpy as np
from simulated import bytes_at, find_memory, streams


def device_view(
    pointer: int, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None
) -> np.ndarray:
    """Device memory as NumPy sees it. Strides are in bytes, and not negative.

    Raises:
        CUDARuntimeError: it reaches beyond the allocation, or nobody has allocated it.
    """
    dtype = np.dtype(dtype)
    if strides is None:
        strides = tuple(dtype.itemsize * int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    if 0 in shape:
        return np.empty(shape, dtype)
    reach = dtype.itemsize + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return np.ndarray(shape, dtype, bytes_at(pointer, reach), strides=strides)


def issue(name: str, action: Callable[[], None], reads: Any, writes: Any, stream: int) -> None:
    """Work for a stream: done now, or recorded if the stream is capturing.

    Args:
        reads, writes: results of device_view.
        stream: its address.
    """
    touched = [[_place(view) for view in views if view.size] for views in (reads, writes)]
    streams.issue(name, action, *touched, stream=stream, kind="launch")


def _place(view: np.ndarray) -> tuple[Any, int, int]:
    low, high = np.lib.array_utils.byte_bounds(view)
    return find_memory(low, high - low)
