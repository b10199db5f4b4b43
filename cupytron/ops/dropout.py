"""Dropout whose mask depends on seed, step, layer and global indices only (see philox.py)."""

from typing import Any

from cupytron import backend
from cupytron.ops import philox


def dropout(x: Any, p: float, key: tuple[int, int], step: int, first_token: int) -> tuple[Any, Any]:
    """y = x * mask / (1 - p), with a mask of its own for each global token and feature.

    Shapes: x, y, mask (T, D); mask is bool. Token t of x is token first_token + t of the step's batch.
    Returns: y, mask.
    Reference: Srivastava et al. 2014, JMLR 15.
    """
    xp = backend.array_module(x)
    y, mask = xp.empty_like(x), xp.empty(x.shape, bool)
    scale = philox.keep_scale(p)

    def body(rows: slice) -> None:
        tokens = xp.arange(first_token + rows.start, first_token + rows.stop, dtype=xp.uint64)
        mask[rows] = philox.keep_mask(xp, mask[rows].shape, (tokens, step, 0), key, p)
        xp.multiply(x[rows], mask[rows], out=y[rows])
        y[rows] *= scale

    backend.for_slices(xp, body, len(x), backend.rows_per_block(x.shape[1]))
    return y, mask


def dropout_backward(dy: Any, mask: Any, p: float) -> Any:
    """dx = dy * mask / (1 - p). Shapes: dy, mask, dx (T, D)."""
    dx = dy * mask
    dx *= philox.keep_scale(p)
    return dx
