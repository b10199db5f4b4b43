"""Dropout: see dropout.cu. Step and token are read from the device, so that a graph can be run again."""

from typing import Any

import numpy as np

from cupytron import backend
from cupytron.kernels import loader
from cupytron.ops import philox

_THREADS = 256
_GROUP = 8  # GROUP in dropout.cu
_PACKS = 2  # PACKS in dropout.cu
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that no two heads share a seed


def dropout(x: Any, p: float, key: tuple[int, int], step: int, first_token: int) -> tuple[Any, Any]:
    """As ops.dropout, with the same masks; step and first_token may be 0-d device arrays of int64."""
    xp = backend.array_module(x)
    rows, width = x.shape
    x = loader.contiguous("x", x, x.shape, x.dtype)
    y, mask = xp.empty(x.shape, x.dtype), xp.empty(x.shape, bool)
    if not x.size:
        return y, mask
    # masks are written eight at once
    vec = loader.access(width, x) if width % _GROUP == 0 else 1
    acc = backend.at_least_float32(x.dtype)
    step = loader.on_device("step", step, xp.int64)
    first_token = loader.on_device("first_token", first_token, xp.int64)
    scale, threshold = philox.keep_scale(p), philox.threshold(p)
    groups = rows * loader.split(width, _GROUP)
    loader.function("dropout", "dropout", x.dtype, vec)(
        (loader.split(groups, _THREADS),),
        (_THREADS,),
        (
            *(x, y, mask, step, first_token),
            *map(np.uint32, (*key, threshold)),
            *(acc.type(scale), np.int64(rows), np.int64(width)),
        ),
    )
    return y, mask


def dropout_backward(dy: Any, mask: Any, p: float) -> Any:
    """As ops.dropout_backward."""
    dy = loader.contiguous("dy", dy, dy.shape, dy.dtype)
    mask = loader.contiguous("mask", mask, dy.shape, bool)
    dx = backend.array_module(dy).empty(dy.shape, dy.dtype)
    if not dy.size:
        return dx
    vec = loader.access(dy.size, dy, mask)
    packs = dy.size // vec
    acc = backend.at_least_float32(dy.dtype)
    loader.function("dropout", "dropout_backward", dy.dtype, vec)(
        (loader.split(packs, _THREADS * _PACKS),),
        (_THREADS,),
        (dy, mask, dx, acc.type(philox.keep_scale(p)), np.int64(packs)),
    )
    return dx


def address(dropout: Any) -> tuple[Any, Any]:
    """Seed and offset of a library's own dropout, for an ops.AttentionDropout.

    The mask depends on the run's seed, the layer, the first head, the step and the micro-batch's place, and
    so it does not change with the number of replicas or stages. Within the micro-batch it is the library's.

    Shapes: both (1,) int64.
    """
    xp = backend.array_module(dropout.step)
    if xp is np:
        import cupy as xp  # type: ignore[no-redef]
    low, high = dropout.key
    seed = (low + (high << 32) + dropout.first_head * _GOLDEN) % (1 << 64)
    step = loader.on_device("step", dropout.step, xp.int64)
    first_token = loader.on_device("first_token", dropout.first_token, xp.int64)
    found = xp.empty(4, xp.int64)  # two of them at multiples of 16 bytes
    loader.function("dropout", "dropout_address", np.float32)(
        (1,), (1,), (step, first_token, np.uint64(seed), found)
    )
    return found[0:1], found[2:3]
