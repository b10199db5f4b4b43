"""LayerNorm and RMSNorm, alone and with the sum before them.

What backward needs is `saved`: here the normalised x and the factor `rstd` of each row. A residual stream
adds a branch before each norm, and its gradient after it: `add_...` and `residual` do both in one pass.
"""

from typing import Any

from cupytron import backend

Saved = tuple[Any, ...]


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Saved]:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over each row.

    Shapes: x, y (T, D); weight, bias (D,), bias may be None.
    Returns: y, and what layer_norm_backward needs.
    Reference: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """
    return _norm(x, None, weight, bias, eps, centred=True)[1:]


def add_layer_norm(
    x: Any, delta: Any, weight: Any, bias: Any, eps: float
) -> tuple[Any, Any, Saved]:
    """total = x + delta, written over delta, and its layer_norm.

    Returns: total, y, and what layer_norm_backward needs.
    """
    return _norm(x, delta, weight, bias, eps, centred=True)


def rms_norm(x: Any, weight: Any, eps: float) -> tuple[Any, Saved]:
    """y = x / sqrt(mean(x^2) + eps) * weight, over each row.

    Shapes: x, y (T, D); weight (D,).
    Returns: y, and what rms_norm_backward needs.
    Reference: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    return _norm(x, None, weight, None, eps, centred=False)[1:]


def add_rms_norm(x: Any, delta: Any, weight: Any, eps: float) -> tuple[Any, Any, Saved]:
    """total = x + delta, written over delta, and its rms_norm.

    Returns: total, y, and what rms_norm_backward needs.
    """
    return _norm(x, delta, weight, None, eps, centred=False)


def _norm(
    x: Any, delta: Any, weight: Any, bias: Any, eps: float, centred: bool
) -> tuple[Any, Any, Saved]:
    xp = backend.array_module(x)
    y, xhat, rstd = xp.empty_like(x), xp.empty_like(x), xp.empty((len(x), 1), x.dtype)
    total = x if delta is None else delta
    average = xp.full(x.shape[1], 1 / x.shape[1], x.dtype)

    def body(rows: slice) -> None:
        row = total[rows]
        if delta is not None:
            row += x[rows]
        if centred:
            # a product is several times faster than mean(axis=1)
            xp.subtract(row, (row @ average)[:, None], out=xhat[rows])
            row = xhat[rows]
        _scale_rows(xp, row, xhat[rows], rstd[rows], eps)
        xp.multiply(xhat[rows], weight, out=y[rows])
        if bias is not None:
            y[rows] += bias

    backend.for_slices(xp, body, len(x), _block(x))
    return total, y, (xhat, rstd)


def _block(x: Any) -> int:
    # three arrays of a slice fit a core's L2 cache
    return backend.rows_per_block(x.shape[1])


def _scale_rows(xp: Any, x: Any, xhat: Any, rstd: Any, eps: float) -> None:
    """xhat = x / sqrt(mean(x^2) + eps) for each row, and the factor in rstd."""
    rstd[:, 0] = xp.einsum("td,td->t", x, x)
    rstd /= x.shape[1]
    rstd += eps
    xp.sqrt(rstd, out=rstd)
    xp.reciprocal(rstd, out=rstd)
    xp.multiply(x, rstd, out=xhat)


def layer_norm_backward(
    dy: Any, saved: Saved, weight: Any, residual: Any = None
) -> tuple[Any, Any, Any]:
    """Gradient of layer_norm.

    Shapes: dy, dx (T, D); weight, dweight, dbias (D,).

    Args:
        saved: what forward has returned.
        residual: (T, D), added to dx; None: nothing.

    Returns: dx, dweight, dbias.
    """
    return _norm_backward(dy, saved, weight, residual, centred=True)


def rms_norm_backward(dy: Any, saved: Saved, weight: Any, residual: Any = None) -> tuple[Any, Any]:
    """Gradient of rms_norm. Shapes and arguments: as layer_norm_backward's. Returns: dx, dweight."""
    dx, dweight, _ = _norm_backward(dy, saved, weight, residual, centred=False)
    return dx, dweight


def _norm_backward(
    dy: Any, saved: Saved, weight: Any, residual: Any, centred: bool
) -> tuple[Any, Any, Any]:
    xp = backend.array_module(dy)
    xhat, rstd = saved
    width = dy.shape[1]
    block = _block(dy)
    dx = xp.empty_like(dy)
    # one row of partial sums for each slice
    slices = backend.slice_count(xp, len(dy), block)
    dweights = xp.empty((slices, width), dy.dtype)
    dbiases = xp.zeros((slices, width), dy.dtype)
    average = weight / width  # a product with it is a mean over a row of dxhat

    def body(rows: slice) -> None:
        part = rows.start // block
        ones = xp.ones(rows.stop - rows.start, dy.dtype)
        product = dy[rows] * xhat[rows]
        dweights[part] = ones @ product
        along = (product @ average)[:, None]
        dxhat = xp.multiply(dy[rows], weight, out=dx[rows])
        if centred:
            # the mean depends on every x in the row: this removes the part of dxhat along (1, ..., 1) ...
            dbiases[part] = ones @ dy[rows]
            dxhat -= (dy[rows] @ average)[:, None]
        # ... and so does rstd: this removes the part along xhat
        xp.multiply(xhat[rows], along, out=product)
        dxhat -= product
        dxhat *= rstd[rows]
        if residual is not None:
            dxhat += residual[rows]

    backend.for_slices(xp, body, len(dy), block)
    return dx, dweights.sum(axis=0), dbiases.sum(axis=0)
