"""Clipping, loss scaling and the update of weights, all on the device: the host only reads how it went.

The order of a step, the same on every rank:

    begin(control)
    add_loss(control, loss)                      after each micro-batch
    total = sum of squares(gradient, chunks)     over all buckets and all ranks
    decide(control, total, ...)
    adamw(...)                                   for each bucket; or sgd
    finish(control)

Nothing here waits for the device, so all of it can be captured into a graph.
"""

import enum
from typing import Any

import numpy as np

from cupytron import backend
from cupytron.kernels import loader

_THREADS = 256
_MOST_BLOCKS = 4096  # then a block takes several turns, and pays for Adam's powers once
_PART = 1 << 15  # optimizer.cu's PART


class Control(enum.IntEnum):
    """Slots of the float64 vector that the kernels read and write; optimizer.cu's enum is the same."""

    LR = 0  # the host writes it
    STEP = 1  # updates applied so far; Adam's t is one more
    MULTIPLIER = 2  # of gradients: clips them and takes the loss scale away
    APPLY = 3  # 1, or 0: this step's update is left out
    NORM = 4  # of the gradient, without the loss scale, before clipping
    LOSS_SCALE = 5  # what losses are multiplied by before their gradients are made
    GOOD_STEPS = 6  # finite ones since the loss scale has changed
    SKIPPED = 7  # steps that were not finite, with loss scaling
    FAILED = 8  # STEP + 1 of the first step that no loss scale could have mended; 0: none
    LOSS = 9  # sum of the micro-batches' losses, without the loss scale
    CLIP = 10  # largest norm of a gradient; 0: any


def new_control(loss_scale: float, clip: float) -> Any:
    """The vector of a run that has taken no step.

    Args:
        loss_scale: to start with; 1 without loss scaling.
        clip: largest norm of a gradient; 0: any.

    Returns: float64 array of the device, to be indexed by Control.
    """
    import cupy

    values = np.zeros(len(Control))
    values[[Control.MULTIPLIER, Control.APPLY]] = 1 / loss_scale, 1
    values[[Control.LOSS_SCALE, Control.CLIP]] = loss_scale, clip
    return cupy.asarray(values)


def begin(control: Any) -> None:
    """Start a step: no losses yet."""
    _single("begin", control)


def add_loss(control: Any, loss: Any) -> None:
    """LOSS += loss / LOSS_SCALE; `loss` is a float64 of the device, such as cross_entropy returns."""
    _single("add_loss", control, loss)


def squares(gradient: Any, chunks: int) -> Any:
    """Sums of squares of `chunks` equally long ranges of a flat gradient.

    A range's sum depends on its values only: it has the same bits wherever the range stands in the array.

    Shapes: gradient (chunks n,) float32 or float64; returns (chunks,) float64, new.
    """
    xp = backend.array_module(gradient)
    length, rest = divmod(len(gradient), chunks)
    assert rest == 0, f"{len(gradient)} elements are not {chunks} equal ranges"
    sums = xp.empty(chunks, np.float64)
    parts = max(1, -(-length // _PART))
    partial = xp.empty((chunks, parts), np.float64)
    vec = _vec(gradient) if chunks == 1 or length * gradient.itemsize % 16 == 0 else 1
    kernel = loader.function("optimizer", "sum_parts", gradient.dtype, vec)
    kernel((parts, chunks), (_THREADS,), (gradient, partial, np.int64(length)))
    kernel = loader.function("optimizer", "sum_chunks", gradient.dtype, vec)
    kernel((chunks,), (_THREADS,), (partial, sums, np.int32(parts)))
    return sums


def decide(control: Any, total: Any, *, scaling: bool, growth_interval: int) -> None:
    """Say whether the update is to be applied, and with which multiplier.

    With scaling (float16): a norm that is not finite leaves the update out, halves the loss scale (down
    to 1) and counts in SKIPPED; after growth_interval finite ones it is doubled (up to 2^24). What no
    smaller scale can mend, a LOSS that is not finite or a norm where there is no scaling or the scale is
    1, is noted in FAILED, and from then on no update is applied.

    Args:
        total: one float64 of the device, the sum of squares of the whole gradient as it is, loss scale
            included. It and LOSS have to be the same on all ranks.
    """
    _single("decide", control, total, np.int32(scaling), np.int32(growth_interval))


def finish(control: Any) -> None:
    """Count the update, if it was applied; all launches of adamw before it see the same STEP."""
    _single("finish", control)


def adamw(
    weights: Any,
    copy: Any,
    gradient: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    decayed: int,
    control: Any,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """optim.AdamW on flat arrays; the gradient is multiplied by MULTIPLIER, and becomes zero in any case.

    Shapes: all (n,); weights, gradient and state float32 or float64.

    Args:
        copy: None, or what receives the new weights, rounded to its type.
        decayed: how many elements, the first ones, have weight decay.
    """
    _update(
        "adamw",
        weights,
        copy,
        (gradient, exp_avg, exp_avg_sq),
        (np.int64(decayed), control, *map(np.float64, (beta1, beta2, eps, weight_decay))),
    )


def sgd(
    weights: Any,
    copy: Any,
    gradient: Any,
    momentum: Any,
    decayed: int,
    control: Any,
    momentum_factor: float,
    weight_decay: float,
) -> None:
    """optim.SGD; arguments as adamw's."""
    _update(
        "sgd",
        weights,
        copy,
        (gradient, momentum),
        (np.int64(decayed), control, np.float64(momentum_factor), np.float64(weight_decay)),
    )


def copy_weights(weights: Any, copy: Any) -> None:
    """copy = weights, rounded; flat arrays."""
    length = len(weights)
    assert weights.dtype == backend.at_least_float32(copy.dtype), "a copy of float32 in 16 bits"
    if length:
        kernel = loader.function("optimizer", "copy_weights", copy.dtype, _vec(weights, copy))
        kernel(_grid(weights), (_THREADS,), (weights, copy, np.int64(length)))


def _update(
    name: str, weights: Any, copy: Any, others: tuple[Any, ...], rest: tuple[Any, ...]
) -> None:
    arrays = (weights, *others) if copy is None else (weights, copy, *others)
    length, dtype = len(weights), (weights if copy is None else copy).dtype
    assert all(len(x) == length for x in arrays), "weights, gradient and state of one length"
    assert all(x.dtype == backend.at_least_float32(dtype) for x in (weights, *others)), (
        f"weights, gradient and state of one type, float32 for a copy in {dtype}"
    )
    if length == 0:
        return
    target = np.uint64(0) if copy is None else copy  # a null pointer
    kernel = loader.function("optimizer", name, dtype, _vec(*arrays))
    kernel(_grid(weights), (_THREADS,), (weights, target, *others, np.int64(length), *rest))


def _vec(*arrays: Any) -> int:
    """Elements that fill 16 bytes of the first array, if accesses of so many suit all of them."""
    for x in arrays:
        assert x.ndim == 1 and x.flags.c_contiguous, "flat, contiguous arrays"
    vec = loader.wide(arrays[0].dtype)
    return 1 if any(x.data.ptr % (vec * x.itemsize) for x in arrays) else vec


def _grid(weights: Any) -> tuple[int]:
    packs = -(-len(weights) // loader.wide(weights.dtype))
    return (min(-(-packs // _THREADS), _MOST_BLOCKS),)


def _single(name: str, *arguments: Any) -> None:
    """A kernel of one thread, out of the module that float32 gradients use anyway."""
    loader.function("optimizer", name, np.float32, loader.wide(np.float32))((1,), (1,), arguments)
