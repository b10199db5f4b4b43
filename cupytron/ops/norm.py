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

    def body(rows: slice) -> None:
        mean = xp.einsum("td->t", x[rows]) / x.shape[1]
        xhat[rows] = x[rows] - mean[:, None]
        _scale_rows(xp, xhat[rows], rstd[rows], eps)
        xp.multiply(xhat[rows], weight, out=y[rows])
        if bias is not None:
            y[rows] += bias

    backend.for_slices(xp, body, len(x), backend.rows_per_block(x.shape[1]))
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
        xhat[rows] = x[rows]
        _scale_rows(xp, xhat[rows], rstd[rows], eps)
        xp.multiply(xhat[rows], weight, out=y[rows])

    backend.for_slices(xp, body, len(x), backend.rows_per_block(x.shape[1]))
    return y, xhat, rstd


def _scale_rows(xp: Any, centred: Any, rstd: Any, eps: float) -> None:
    """Divide each row by its root mean square, in place, and write the factor to `rstd`."""
    rstd[:, 0] = xp.einsum("td,td->t", centred, centred)
    rstd /= centred.shape[1]
    rstd += eps
    xp.sqrt(rstd, out=rstd)
    xp.reciprocal(rstd, out=rstd)
    centred *= rstd


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
    block = backend.rows_per_block(width)
    dx = xp.empty_like(dy)
    # one row of partial sums for each slice, added in order: the same bits for any number of threads
    slices = backend.slice_count(xp, len(dy), block)
    dweights = xp.empty((slices, width), dy.dtype)
    dbiases = xp.zeros((slices, width), dy.dtype)

    def body(rows: slice) -> None:
        part = rows.start // block
        dweights[part] = xp.einsum("td,td->d", dy[rows], xhat[rows])
        dxhat = xp.multiply(dy[rows], weight, out=dx[rows])
        # rstd depends on every x in the row: this removes the part of dxhat along xhat ...
        along = xp.einsum("td,td->t", dxhat, xhat[rows])[:, None] / width
        if centred:
            # ... and so does the mean
            dbiases[part] = xp.einsum("td->d", dy[rows])
            dxhat -= xp.einsum("td->t", dxhat)[:, None] / width
        dxhat -= xhat[rows] * along
        dxhat *= rstd[rows]

    backend.for_slices(xp, body, len(dy), block)
    return dx, dweights.sum(axis=0), dbiases.sum(axis=0)
