"""Rows of a table by token id, and their gradient: see embedding.cu."""

from typing import Any

import numpy as np

from cupytron import backend
from cupytron.kernels import loader

_THREADS = 256
_WARPS = 8  # WARPS in embedding.cu
_TOKENS = 32  # TOKENS in embedding.cu


def embedding(ids: Any, table: Any, first: int | None = None) -> Any:
    """As ops.embedding; an id that is not in a whole table gives NaN, as nothing on a GPU can raise."""
    xp = backend.array_module(table)
    rows, width = table.shape
    ids = _ids(ids)
    table = loader.contiguous("table", table, table.shape, table.dtype)
    y = xp.empty((len(ids), width), table.dtype)
    if not y.size:
        return y
    vec = loader.access(width, table)
    packs = y.size // vec
    loader.function("embedding", "embedding", table.dtype, vec)(
        (loader.split(packs, _THREADS),),
        (_THREADS,),
        (
            *(ids, table, y, np.int64(first or 0), np.int64(rows), np.bool_(first is not None)),
            *(np.uint64(packs), np.uint64(width // vec)),
        ),
    )
    return y


def embedding_backward(dy: Any, ids: Any, dtable: Any, first: int | None = None) -> None:
    """As ops.embedding_backward; the order of a row's sum depends on the ids only."""
    xp, acc = backend.array_module(dy), backend.at_least_float32(dy.dtype)
    tokens, width = dy.shape
    ids = _ids(ids)
    dy = loader.contiguous("dy", dy, (len(ids), width), dy.dtype)
    rows = len(dtable)
    if dtable.shape != (rows, width) or dtable.dtype != acc or not dtable.flags.c_contiguous:
        raise ValueError(
            f"dtable is {dtable.dtype} {dtable.shape}, contiguous {dtable.flags.c_contiguous}; this kernel"
            f" adds to a contiguous {acc} (rows, {width})"
        )
    if not dy.size or not rows:
        return
    shard = np.int64(first or 0), np.int64(rows)
    count = np.int32(tokens)
    following, last = xp.empty(tokens, xp.int32), xp.full(tokens, -1, xp.int32)
    loader.function("embedding", "link_tokens", dy.dtype)(
        (loader.split(tokens, _TOKENS),),
        (32 * _WARPS,),
        (ids, *shard, count, following, last),
    )
    vec = loader.access(width, dy, dtable)
    grid = loader.split(tokens, _WARPS), loader.split(width, 32 * vec)
    segment, behind = xp.empty((tokens, width), acc), xp.empty(tokens, xp.int32)
    loader.function("embedding", "sum_segments", dy.dtype, vec)(
        grid,
        (32 * _WARPS,),
        (dy, ids, following, last, segment, behind, dtable, *shard, count, np.int64(width)),
    )
    loader.function("embedding", "add_segments", dy.dtype, vec)(
        grid,
        (32 * _WARPS,),
        (ids, last, segment, behind, dtable, *shard, count, np.int64(width)),
    )


def _ids(ids: Any) -> Any:
    xp = backend.array_module(ids)
    return xp.ascontiguousarray(ids.astype(xp.int64, copy=False))
