"""Matrix products, split over the process's threads by rows of the result."""

from typing import Any

import numpy as np

from cupytron import backend

# Below this many multiply-adds waking a worker costs more than it brings.
_SPLIT_FROM = 1 << 20


def _for_row_parts(body: Any, rows: int, work: int) -> None:
    parts = backend.threads() if work >= _SPLIT_FROM else 1
    # parts begin at multiples of 16 rows, the height of the widest BLAS kernels
    block = -(-rows // parts // 16) * 16
    backend.for_slices(np, body, rows, block)


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    """a @ b.

    Shapes: a (M, K), b (K, N), either may be a transposed view; returns (M, N), in `out` if given.
    """
    xp = backend.array_module(a)
    if xp is not np:
        return xp.matmul(a, b, out=out)
    if out is None:
        out = np.empty((a.shape[0], b.shape[1]), dtype=np.result_type(a, b))
    work = a.shape[0] * a.shape[1] * b.shape[1]
    _for_row_parts(lambda s: np.matmul(a[s], b, out=out[s]), a.shape[0], work)
    return out


def add_product(total: Any, x: Any, dy: Any) -> None:
    """total += x.T @ dy: how a matrix gets its gradient.

    Shapes: total (D_in, D_out), x (T, D_in), dy (T, D_out).
    """
    xp = backend.array_module(x)
    if xp is not np:
        total += xp.matmul(x.T, dy)
        return

    def body(rows: slice) -> None:
        total[rows] += x.T[rows] @ dy

    _for_row_parts(body, total.shape[0], total.size * x.shape[0])


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """y = x @ weight + bias.

    Shapes: x (T, D_in), weight (D_in, D_out), bias (D_out,); y (T, D_out), new.
    """
    y = matmul(x, weight)
    if bias is not None:
        y += bias
    return y


def sum_rows(dy: Any) -> Any:
    """Sum over tokens, the gradient of a bias: (T, D) -> (D,)."""
    xp = backend.array_module(dy)
    # a product with ones is several times faster than .sum(axis=0), and sums in BLAS's order
    return xp.ones(dy.shape[0], dtype=dy.dtype) @ dy
