"""Softmax cross-entropy over the vocabulary; its gradient overwrites the logits."""

from typing import Any

from cupytron import backend

IGNORE = -1  # a target that does not count


def cross_entropy(logits: Any, targets: Any, scale: float) -> float:
    """scale * sum over tokens of (logsumexp(logits[t]) - logits[t, targets[t]]).

    Shapes: logits (T, V), overwritten with the loss's gradient; targets (T,), IGNORE where a token does
    not count (its gradient is zero).
    Returns: the loss, summed in float64.
    """
    xp = backend.array_module(logits)
    losses = xp.empty(len(logits), dtype=xp.float64)

    def body(rows: slice) -> None:
        losses[rows] = _rows(xp, logits[rows], targets[rows], scale)

    backend.for_slices(xp, body, len(logits), backend.rows_per_block(logits.shape[1]))
    return float(losses.sum()) * scale


def _rows(xp: Any, z: Any, targets: Any, scale: float) -> Any:
    counts = targets != IGNORE
    index = xp.where(counts, targets, 0)
    row = xp.arange(len(z))
    z -= z.max(axis=1, keepdims=True)
    losses = -z[row, index].astype(xp.float64)
    xp.exp(z, out=z)
    total = xp.einsum("tv->t", z)
    losses += xp.log(total)
    z *= (counts * scale / total)[:, None].astype(z.dtype)
    z[row, index] -= (counts * scale).astype(z.dtype)
    return xp.where(counts, losses, 0.0)
