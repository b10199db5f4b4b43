"""Causal attention by cuDNN, on half-precision arrays: the signatures of cupytron/ops/attention.py.

cuDNN sees heads: tensors (B, N, S, H) with any strides. In the packed (B, S, N_kv, G + 2, H) of a layer
the heads of k and v lie (G + 2) H elements apart, so they are read, and their gradients written, where they
are; with G = 1 queries as well. With G > 1 the heads of q lie unevenly, G of them side by side and then a
gap: forward copies q, backward copies q and dq, (T, N H) elements each. cuDNN itself shares a KV head among
its G queries.

Dropout is cuDNN's own: its mask has the right address (dropout.address), but is not the one of ops and of
our own kernels. `verify` computes in float64 and float32, which cuDNN does not, so it never sees this mask.

The first call for a shape takes about a second: cuDNN is asked for kernels, forward and backward. So it
cannot be part of a captured graph.
"""

import functools
import math
from typing import Any

from cupytron.errors import CupytronError
from cupytron.kernels import cudnn_graphs
from cupytron.kernels.cudnn_graphs import Shape, library
from cupytron.kernels.dropout import address

__all__ = ["attention", "attention_backward", "deterministic", "forget", "library", "supports"]

_BYTES = 16  # what cuDNN's kernels move at once
_use_deterministic = False
_answers: dict[tuple[Any, ...], str | None] = {}


def deterministic(on: bool) -> None:
    """Whether gradients have the same bits each time; without it dq is summed in any order, and faster."""
    global _use_deterministic
    _use_deterministic = on


def supports(q: Any, k: Any, v: Any, dropout: Any = None) -> str | None:
    """None if cuDNN can compute this attention and its gradient, else why not, in words."""
    how = (
        *((x.shape, x.strides, x.dtype, x.data.ptr % _BYTES) for x in (q, k, v)),
        dropout and dropout.p,
        _use_deterministic,
        _device(),
    )
    if how not in _answers:
        _answers[how] = _refusal(q, k, v, dropout)
    return _answers[how]


def _refusal(q: Any, k: Any, v: Any, dropout: Any) -> str | None:
    tokens, head_size = q.shape[1], q.shape[-1]
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"cuDNN's attention takes bfloat16 and float16, and this is {q.dtype.name}"
    if k.shape[1] != tokens:
        return f"{tokens} queries have {k.shape[1]} keys; training has as many of each"
    if tokens < 2:
        return f"cuDNN's attention has no gradient for sequences of {tokens} tokens"
    capability = _capability(_device())
    if capability < 80:
        return f"cuDNN's attention needs compute capability 8.0, and this GPU has {capability / 10}"
    largest = 256 if 90 <= capability < 100 else 128  # of gradients
    if head_size % 8 or head_size > largest:
        return (
            f"cuDNN's attention takes head sizes that are multiples of 8, up to {largest} on this GPU, "
            f"and this is {head_size}"
        )
    try:
        library()
        if q.size:
            strides = [_strides(x) or _dense_strides(x) for x in (q, k, v)]
            o = _dense_strides(q)
            cudnn_graphs.forward(_shape(q, [*strides, o], dropout))
            both = [*strides, o, o, *strides]
            cudnn_graphs.backward(_shape(q, both, dropout, _use_deterministic))
    except CupytronError as error:
        return str(error)
    return None


def attention(q: Any, k: Any, v: Any, dropout: Any = None) -> tuple[Any, Any]:
    """o = softmax(q k^T / sqrt(H)) v; a query sees the keys up to its own position.

    Shapes: q, o (B, S, N_kv, G, H), k, v (B, S, N_kv, H); lse (B, N_kv, G, S) float32, the logarithm of
    the softmax's denominator: natural, as cuDNN's statistics are (largest score + log of the sum).
    Raises:
        CupytronError: `supports` says why.
    """
    import cupy

    _check(q, k, v, dropout)
    batch, tokens, kv_heads, group, _ = q.shape
    o = cupy.empty(q.shape, q.dtype)
    lse = cupy.empty((batch, kv_heads, group, tokens), "float32")
    if q.size:
        arrays = _even(q), _even(k), _even(v), o
        shape = _shape(q, [_strides(x) or () for x in arrays], dropout)
        cudnn_graphs.forward(shape).run(*arrays, lse, *_address(dropout))
    return o, lse


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    out: tuple[Any, Any, Any],
    dropout: Any = None,
) -> None:
    """Gradient of attention, written to out = (dq, dk, dv), arrays or views shaped like q, k, v.

    Shapes: do as o; the others as in attention.
    Raises:
        CupytronError: `supports` says why.
    """
    import cupy

    _check(q, k, v, dropout)
    if not q.size:
        return
    inputs = [_even(x) for x in (q, k, v, o, do)]
    gradients = [x if _strides(x) else cupy.empty(x.shape, x.dtype) for x in out]
    strides = [_strides(x) or () for x in (*inputs, *gradients)]
    shape = _shape(q, strides, dropout, _use_deterministic)
    lse = cupy.ascontiguousarray(lse)
    cudnn_graphs.backward(shape).run(*inputs, lse, *gradients, *_address(dropout))
    for target, gradient in zip(out, gradients, strict=True):
        if gradient is not target:
            target[...] = gradient


def _check(q: Any, k: Any, v: Any, dropout: Any) -> None:
    if (reason := supports(q, k, v, dropout)) is not None:
        raise CupytronError(f"{reason}; use cupytron's own attention for it")


def _strides(x: Any) -> tuple[int, ...] | None:
    """Strides of (B, S, N_kv[, G], H) seen as (B, N, S, H), in elements.

    Returns: None if heads lie unevenly, or anything where it cannot be read in units of 16 bytes.
    """
    item = x.itemsize
    batch, token, head = x.strides[:3]
    if x.ndim == 5 and x.shape[3] > 1:
        if x.shape[2] > 1 and head != x.shape[3] * x.strides[3]:
            return None
        head = x.strides[3]
    if x.strides[-1] != item or any(n % _BYTES for n in (x.data.ptr, batch, head, token)):
        return None
    return batch // item, head // item, token // item, 1


def _dense_strides(x: Any) -> tuple[int, ...]:
    """What _strides gives for a contiguous copy."""
    _, tokens, *heads, size = x.shape
    width = math.prod(heads) * size
    return tokens * width, size, width, 1


def _even(x: Any) -> Any:
    """x itself if cuDNN can read it, else a contiguous copy."""
    import cupy

    return x if _strides(x) else cupy.array(x, order="C")


def _address(dropout: Any) -> tuple[Any, ...]:
    return address(dropout) if dropout else ()


def _shape(
    q: Any, strides: list[tuple[int, ...]], dropout: Any, deterministic: bool = False
) -> Shape:
    batch, tokens, kv_heads, group, head_size = q.shape
    sizes = (batch, kv_heads * group, kv_heads, tokens, head_size)
    p = dropout.p if dropout else 0.0
    return Shape(q.dtype.name, *sizes, tuple(strides), deterministic, p, _device())


def _device() -> int:
    import cupy

    return cupy.cuda.runtime.getDevice()


@functools.cache
def _capability(device: int) -> int:
    """90 is 9.0."""
    import cupy

    return int(cupy.cuda.Device(device).compute_capability)


def forget() -> None:
    """Let go of all that was prepared: the library is about to be exchanged, or the device reset."""
    _answers.clear()
    _capability.cache_clear()
    cudnn_graphs.forget()
