"""Softmax cross-entropy, of a whole vocabulary or of shards; its gradient overwrites the logits."""

from typing import Any

import numpy as np

from cupytron import backend
from cupytron.kernels import loader


def cross_entropy(logits: Any, targets: Any, scale: Any) -> Any:
    """As ops.cross_entropy; each row is read twice and written once.

    Shapes: logits (T, V), contiguous; targets (T,) int64.

    Args:
        scale: a number, or a 0-d float64 array of the device, read when the kernel runs.

    Returns: the loss, a 0-d float64 array of the device.
    """
    xp = backend.array_module(logits)
    tokens, width = logits.shape
    scale = _on_device(xp, scale)
    losses = xp.empty(tokens, np.float64)
    _over_rows("cross_entropy", logits, targets, scale, losses, np.int32(width))
    return _sum(logits, losses, scale)


def shard_exponentials(logits: Any, targets: Any, first: int) -> Any:
    """As ops.shard_exponentials.

    16-bit exponentials lose nothing that matters: they are in (0, 1], rounded once more than the gradient
    that they become, which has 16 bits itself.
    """
    xp = backend.array_module(logits)
    tokens, width = logits.shape
    own = xp.empty((3, tokens), np.float64)
    _over_rows("shard_exponentials", logits, targets, own, np.int64(first), np.int32(width))
    return own


def shard_cross_entropy(
    exponentials: Any, targets: Any, own: Any, everyone: Any, scale: Any, first: int
) -> Any:
    """As ops.shard_cross_entropy; `scale` and the loss as in cross_entropy."""
    xp = backend.array_module(exponentials)
    tokens, width = exponentials.shape
    scale = _on_device(xp, scale)
    losses, factors = xp.empty(tokens, np.float64), xp.empty((2, tokens), np.float64)
    loader.function("cross_entropy", "shard_losses", exponentials.dtype, _vec(exponentials))(
        (max(1, -(-tokens // 256)),),
        (256,),
        (
            *(targets, own, xp.ascontiguousarray(everyone), scale, losses, factors),
            *(np.int32(len(everyone)), np.int64(tokens)),
        ),
    )
    _over_rows("shard_gradient", exponentials, targets, factors, np.int64(first), np.int32(width))
    return _sum(exponentials, losses, scale)


def _over_rows(name: str, rows: Any, *arguments: Any) -> None:
    """Launch a kernel with a block for each row."""
    assert rows.flags.c_contiguous, "logits have to be contiguous"
    if not len(rows):  # CuPy launches one block at least
        return
    vec = _vec(rows)
    accesses = -(-rows.shape[1] // vec)
    rounds = max(1, -(-accesses // 1024))
    warps = max(1, -(-accesses // (32 * rounds)))  # so that all have about as much to do
    loader.function("cross_entropy", name, rows.dtype, vec)(
        (len(rows),), (32 * warps,), (rows, *arguments)
    )


def _vec(rows: Any) -> int:
    """Elements of an access that suits every row."""
    wide = loader.wide(rows.dtype)
    return wide if rows.shape[1] % wide == 0 and rows.data.ptr % 16 == 0 else 1


def _sum(rows: Any, losses: Any, scale: Any) -> Any:
    """The loss, by a kernel that is compiled together with those for the rows."""
    loss = backend.array_module(losses).empty((), np.float64)
    loader.function("cross_entropy", "sum_losses", rows.dtype, _vec(rows))(
        (1,), (1024,), (losses, scale, loss, np.int32(len(losses)))
    )
    return loss


def _on_device(xp: Any, scale: Any) -> Any:
    return scale if isinstance(scale, xp.ndarray) else xp.full((), scale, np.float64)
