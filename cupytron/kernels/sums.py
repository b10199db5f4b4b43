"""Sums over rows, and sums of two arrays: see sums.cu."""

from typing import Any

import numpy as np

from cupytron import backend
from cupytron.kernels import loader

_THREADS = 256
_PACKS = 2  # PACKS in sums.cu
_WARPS = 8  # WARPS in sums.cu


def sum_rows(dy: Any) -> Any:
    """As ops.sum_rows; each column's order of summation depends on the shape and the device only."""
    xp, acc = backend.array_module(dy), backend.at_least_float32(dy.dtype)
    rows, width = dy.shape
    dy = loader.contiguous("dy", dy, dy.shape, dy.dtype)
    if not dy.size:
        return xp.zeros(width, acc)
    vec = loader.access(width, dy)
    tiles = loader.split(width, 32 * vec)
    # four blocks a multiprocessor, unless their warps would have less than four rows each
    chunks = max(1, min(4 * loader.multiprocessors() // tiles, rows // (4 * _WARPS)))
    each = loader.split(rows, chunks)
    chunks = loader.split(rows, each)
    partial = xp.empty((chunks, width), acc)
    loader.function("sums", "sum_rows", dy.dtype, vec)(
        (tiles, chunks),
        (32 * _WARPS,),
        (dy, partial, np.int64(rows), np.int64(width), np.int64(each)),
    )
    return sum_partials(partial)


def sum_partials(partial: Any) -> Any:
    """Sum over the rows of a contiguous array (rows, width) of what blocks have summed: the last step."""
    rows, width = partial.shape
    if rows == 1:
        return partial[0]
    total = backend.array_module(partial).empty(width, partial.dtype)
    loader.function("sums", "sum_partials", partial.dtype)(
        (loader.split(width, 32),),
        (32 * _WARPS,),
        (partial, total, np.int64(rows), np.int64(width), np.int64(rows)),
    )
    return total


def add_to(total: Any, x: Any) -> Any:
    """As ops.add_to: total += x, computed in float32 at least and rounded once to total's dtype."""
    found = _adder(total.dtype, x.dtype)
    flat = total.flags.c_contiguous and x.flags.c_contiguous and total.shape == x.shape
    if found is None or not flat:
        xp = backend.array_module(total)
        return xp.add(total, x, out=total, casting="unsafe")
    if not total.size:
        return total
    name, narrow = found
    # 16 bytes of the wider one: a warp's accesses to it would else have gaps
    first, second = (x, total) if total.dtype == narrow else (total, x)
    vec = loader.access(total.size, first, second)
    packs = total.size // vec
    loader.function("sums", name, narrow, vec)(
        (loader.split(packs, _THREADS * _PACKS),), (_THREADS,), (total, x, np.int64(packs))
    )
    return total


def _adder(total: Any, x: Any) -> tuple[str, Any] | None:
    """Kernel for two dtypes, and its T; None: there is none."""
    if total == x:
        return "add_to", total
    if backend.at_least_float32(x) == total:
        return "add_narrow", x
    if backend.at_least_float32(total) == x:
        return "add_wide", total
    return None
