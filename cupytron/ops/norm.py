"""LayerNorm and RMSNorm. Both save the normalised rows `xhat` and the factor `rstd` of each row."""

from typing import Any

from cupytron import backend


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Any, Any]:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over each row.

    Shapes: x, y, xhat (T, D); rstd (T, 1); weight, bias (D,), bias may be None.
    Returns: y, xhat, rstd.
    Reference: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """
    xp = backend.array_module(x)
    y, xhat, rstd = xp.empty_like(x), xp.empty_like(x), xp.empty((len(x), 1), x.dtype)
    average = _average(xp, x)  # a product with it is several times faster than mean(axis=1)

    def body(rows: slice) -> None:
        mean = x[rows] @ average
        xp.subtract(x[rows], mean[:, None], out=xhat[rows])
        _scale_rows(xp, xhat[rows], xhat[rows], rstd[rows], eps)
        xp.multiply(xhat[rows], weight, out=y[rows])
        if bias is not None:
            y[rows] += bias

    backend.for_slices(xp, body, len(x), _block(x))
    return y, xhat, rstd


def rms_norm(x: Any, weight: Any, eps: float) -> tuple[Any, Any, Any]:
    """y = x / sqrt(mean(x^2) + eps) * weight, over each row.

    Shapes: x, y, xhat (T, D); rstd (T, 1); weight (D,).
    Returns: y, xhat, rstd.
    Reference: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    xp = backend.array_module(x)
    y, xhat, rstd = xp.empty_like(x), xp.empty_like(x), xp.empty((len(x), 1), x.dtype)

    def body(rows: slice) -> None:
        _scale_rows(xp, x[rows], xhat[rows], rstd[rows], eps)
        xp.multiply(xhat[rows], weight, out=y[rows])

    backend.for_slices(xp, body, len(x), _block(x))
    return y, xhat, rstd


def _block(x: Any) -> int:
    # three arrays of a slice fit a core's L2 cache
    return backend.rows_per_block(x.shape[1])


def _average(xp: Any, x: Any) -> Any:
    return xp.full(x.shape[1], 1 / x.shape[1], x.dtype)


def _scale_rows(xp: Any, x: Any, xhat: Any, rstd: Any, eps: float) -> None:
    """xhat = x / sqrt(mean(x^2) + eps) for each row, and the factor in rstd."""
    rstd[:, 0] = xp.einsum("td,td->t", x, x)
    rstd /= x.shape[1]
    rstd += eps
    xp.sqrt(rstd, out=rstd)
    xp.reciprocal(rstd, out=rstd)
    xp.multiply(x, rstd, out=xhat)


def layer_norm_backward(dy: Any, xhat: Any, rstd: Any, weight: Any) -> tuple[Any, Any, Any]:
    """Gradient of layer_norm.

    Shapes: dy, xhat, dx (T, D); rstd (T, 1); weight, dweight, dbias (D,).
    Returns: dx, dweight, dbias.
    """
    return _norm_backward(dy, xhat, rstd, weight, centred=True)


def rms_norm_backward(dy: Any, xhat: Any, rstd: Any, weight: Any) -> tuple[Any, Any]:
    """Gradient of rms_norm.

    Shapes: dy, xhat, dx (T, D); rstd (T, 1); weight, dweight (D,).
    Returns: dx, dweight.
    """
    dx, dweight, _ = _norm_backward(dy, xhat, rstd, weight, centred=False)
    return dx, dweight


def _norm_backward(
    dy: Any, xhat: Any, rstd: Any, weight: Any, centred: bool
) -> tuple[Any, Any, Any]:
    xp = backend.array_module(dy)
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

    backend.for_slices(xp, body, len(dy), block)
    return dx, dweights.sum(axis=0), dbiases.sum(axis=0)
