"""Rotary position embedding: see rotary.cu."""

import math
from typing import Any

import numpy as np

from cupytron import backend
from cupytron.kernels import loader

_THREADS = 256


def rotary(x: Any, cos: Any, sin: Any) -> None:
    """As ops.rotary, in place on a view with any strides but for the last dim, which is contiguous."""
    half = x.shape[-1] // 2
    acc = backend.at_least_float32(x.dtype)
    cos, sin = (
        loader.contiguous(name, table.astype(acc, copy=False), (x.shape[1], half), acc)
        for name, table in (("cos", cos), ("sin", sin))
    )
    if not 3 <= x.ndim <= 5 or x.strides[-1] != x.itemsize:
        raise ValueError(
            f"x has shape {x.shape} and strides {x.strides}; this kernel takes (B, S, H), (B, S, n, H) or"
            " (B, S, n, m, H), the last dim contiguous"
        )
    # (batch, position, outer, inner), and how many elements lie between two of each
    shape = (*x.shape[:-1], 1, 1)[:4]
    strides = (*(stride // x.itemsize for stride in x.strides[:-1]), 0, 0)[:4]
    vec = loader.access(half, x, cos, sin)
    if any(stride % vec for stride in strides):
        vec = 1
    threads = math.prod(shape) * (half // vec)
    if not threads:
        return
    loader.function("rotary", "rotary", x.dtype, vec)(
        (loader.split(threads, _THREADS),),
        (_THREADS,),
        (
            *(x, cos, sin, np.uint64(threads)),
            *map(np.uint64, (*shape[1:], half)),
            *map(np.int64, strides),
        ),
    )
