"""Softmax cross-entropy over the vocabulary; its gradient overwrites the logits.

Where the vocabulary is cut over ranks, each makes its exponentials; what they tell each other of these
gives loss and gradient.
"""

import math
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

    backend.for_slices(xp, body, len(logits), _block(logits))
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


def shard_exponentials(logits: Any, targets: Any, first: int) -> Any:
    """exp(logits - peak) over a shard of the vocabulary, in place, and what the other shards need of it.

    Shapes: logits (T, rows) of the ids first ... first + rows - 1; targets (T,) ids of the whole
    vocabulary.
    Returns: (3, T) float64: each token's largest logit here, the sum of its exponentials relative to that,
        and the target's logit (-inf where the target is not here or does not count).
    """
    xp = backend.array_module(logits)
    own = xp.zeros((3, len(logits)), xp.float64)
    token, column = _here(targets, first, logits.shape[1])
    own[2] = -math.inf  # in no shard: an infinite loss, and not one that looks right
    own[2, token] = logits[token, column]

    def body(rows: slice) -> None:
        z = logits[rows]
        peak = z.max(axis=1, keepdims=True, initial=-math.inf)  # a shard may have no row at all
        z -= peak
        xp.exp(z, out=z)
        own[0, rows] = peak[:, 0]
        own[1, rows] = xp.einsum("tv->t", z)

    backend.for_slices(xp, body, len(logits), _block(logits))
    return own


def shard_cross_entropy(
    exponentials: Any, targets: Any, own: Any, everyone: Any, scale: float, first: int
) -> float:
    """cross_entropy of all shards of the vocabulary.

    Shapes: exponentials (T, rows), overwritten with the loss's gradient; targets (T,).

    Args:
        exponentials, own: as shard_exponentials has left and returned them.
        everyone: (shards, 3, T), what it has returned for each shard.
        first: id of this shard's first row.

    Returns: the loss, the same for every shard.
    """
    xp = backend.array_module(exponentials)
    peaks, sums, at_target = everyone.transpose(1, 0, 2)
    peak = peaks.max(axis=0)
    total = (sums * xp.exp(peaks - peak)).sum(axis=0)
    counts = targets != IGNORE
    losses = xp.where(counts, xp.log(total) + peak - at_target.max(axis=0), 0.0)
    factor = (counts * scale * xp.exp(own[0] - peak) / total).astype(exponentials.dtype)

    def body(rows: slice) -> None:
        exponentials[rows] *= factor[rows, None]

    backend.for_slices(xp, body, len(exponentials), _block(exponentials))
    token, column = _here(targets, first, exponentials.shape[1])
    exponentials[token, column] -= exponentials.dtype.type(scale)
    return float(losses.sum()) * scale


def _here(targets: Any, first: int, rows: int) -> tuple[Any, Any]:
    """Tokens whose target is one of the shard's, and its column there."""
    mine = (targets != IGNORE) & (targets >= first) & (targets < first + rows)
    return backend.array_module(targets).flatnonzero(mine), targets[mine] - first


def _block(logits: Any) -> int:
    return backend.rows_per_block(max(1, logits.shape[1]))
