"""LayerNorm and RMSNorm: see norm.cu. Saved are x, as it is, and mean and rstd of its rows, (T, 2)."""

from typing import Any

import numpy as np

from cupytron import backend
from cupytron.kernels import loader, sums

Saved = tuple[Any, ...]

# Threads of a row, fewest first. Backward also keeps sums for dweight and dbias: more registers an element
# of a row, and so fewer elements and threads.
_FORWARD, _BACKWARD = (32, 128, 256, 512, 1024), (32, 128, 256, 512)
_FORWARD_BYTES, _BACKWARD_BYTES = 128, 96  # of a row that a thread keeps, as float32 or float64


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Saved]:
    """As ops.layer_norm; saved is x and (T, 2): mean and 1/sqrt(var + eps) of each row."""
    return _forward("layer_norm", x, None, weight, bias, eps)[1:]


def add_layer_norm(
    x: Any, delta: Any, weight: Any, bias: Any, eps: float
) -> tuple[Any, Any, Saved]:
    """As ops.add_layer_norm; saved as layer_norm's for x + delta, which must stay as it is."""
    return _forward("add_layer_norm", x, delta, weight, bias, eps)


def rms_norm(x: Any, weight: Any, eps: float) -> tuple[Any, Saved]:
    """As ops.rms_norm; saved as layer_norm's, with means of 0."""
    return _forward("rms_norm", x, None, weight, None, eps)[1:]


def add_rms_norm(x: Any, delta: Any, weight: Any, eps: float) -> tuple[Any, Any, Saved]:
    """As ops.add_rms_norm; saved as rms_norm's for x + delta, which must stay as it is."""
    return _forward("add_rms_norm", x, delta, weight, None, eps)


def layer_norm_backward(
    dy: Any, saved: Saved, weight: Any, residual: Any = None
) -> tuple[Any, Any, Any]:
    """As ops.layer_norm_backward."""
    return _backward("layer_norm_backward", dy, saved, weight, residual)


def rms_norm_backward(dy: Any, saved: Saved, weight: Any, residual: Any = None) -> tuple[Any, Any]:
    """As ops.rms_norm_backward."""
    return _backward("rms_norm_backward", dy, saved, weight, residual)[:2]


def _forward(
    name: str, x: Any, delta: Any, weight: Any, bias: Any, eps: float
) -> tuple[Any, Any, Saved]:
    xp, acc = backend.array_module(x), backend.at_least_float32(x.dtype)
    rows, width = x.shape
    x = loader.contiguous("x", x, x.shape, x.dtype)
    weight = loader.contiguous("weight", weight, (width,), x.dtype)
    if bias is not None:
        bias = loader.contiguous("bias", bias, (width,), x.dtype)
    if delta is not None:
        delta = loader.contiguous("delta", delta, x.shape, x.dtype)
    total = x if delta is None else delta  # the sum is written over delta
    y, stats = xp.empty(x.shape, x.dtype), xp.empty((rows, 2), acc)
    if y.size:
        vec = loader.access(width, x, weight, bias, delta)
        team, packs = _team(width, vec, acc, _FORWARD, _FORWARD_BYTES)
        threads = 256 if team == 32 else team  # THREADS in norm.cu
        arrays = [loader.NULL if a is None else a for a in (x, delta, delta, weight, bias)]
        loader.function("norm", name, x.dtype, vec, TEAM=team, PACKS=packs)(
            (loader.split(rows, threads // team),),
            (threads,),
            (*arrays, y, stats, acc.type(eps), np.int64(rows), np.int32(width)),
        )
    return total, y, (total, stats)


def _backward(name: str, dy: Any, saved: Saved, weight: Any, residual: Any) -> tuple[Any, Any, Any]:
    x, stats = saved
    xp, acc = backend.array_module(dy), stats.dtype
    rows, width = x.shape
    dy = loader.contiguous("dy", dy, x.shape, x.dtype)
    weight = loader.contiguous("weight", weight, (width,), x.dtype)
    if residual is not None:
        residual = loader.contiguous("residual", residual, x.shape, x.dtype)
    dx = xp.empty(x.shape, x.dtype)
    if not dx.size:
        return dx, xp.zeros(width, acc), xp.zeros(width, acc)
    vec = loader.access(width, x, dy, weight, residual)
    team, packs = _team(width, vec, acc, _BACKWARD, _BACKWARD_BYTES)
    threads = 256 if team == 32 else team
    # 512 threads a multiprocessor, which have its registers to themselves, go over all rows
    most = loader.multiprocessors() * max(1, 512 // threads)
    blocks = min(loader.split(rows, threads // team), most)
    partial = xp.empty((blocks, 2 * width), acc)  # of dweight and dbias
    after = loader.NULL if residual is None else residual
    loader.function("norm", name, x.dtype, vec, TEAM=team, PACKS=packs)(
        (blocks,),
        (threads,),
        (dy, x, stats, weight, after, dx, partial, np.int64(rows), np.int32(width)),
    )
    dweight, dbias = sums.sum_partials(partial).reshape(2, width)
    return dx, dweight, dbias


def _team(
    width: int, vec: int, acc: Any, teams: tuple[int, ...], most_bytes: int
) -> tuple[int, int]:
    """TEAM and PACKS: the smallest team that can keep a row; PACKS = 0 if none can."""
    packs = width // vec
    for team in teams:
        each = loader.split(packs, team)
        if each * vec * acc.itemsize <= most_bytes:
            return team, each
    return 1024, 0
