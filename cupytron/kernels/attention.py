"""Causal attention and its gradient without tensor cores: for every type, with the CPU's dropout masks."""

from typing import Any

import numpy as np

from cupytron import backend
from cupytron.kernels import loader
from cupytron.ops import philox
from cupytron.ops.attention import AttentionDropout

LARGEST_HEAD = 256  # more would not fit a thread's registers
_THREADS = 256


def attention(q: Any, k: Any, v: Any, dropout: AttentionDropout | None = None) -> tuple[Any, Any]:
    """As ops.attention; a tile of queries meets one tile of keys after the other (flash attention).

    Shapes: q, o (B, S, N_kv, G, H), k, v (B, L, N_kv, H) with L >= S: views with any strides but for the
    last dim, which is contiguous; lse (B, N_kv, G, S) float32, float64 for float64.
    """
    xp = backend.array_module(q)
    batch, seq, kv_heads, group, size = q.shape
    o = xp.empty(q.shape, q.dtype)
    lse = xp.empty((batch, kv_heads, group, seq), backend.at_least_float32(q.dtype))
    if not q.size:  # CuPy launches one block at least
        return o, lse
    _function("attention_forward", q, k, v)(
        _grid(q, seq, kv_heads * group),
        (_THREADS,),
        (
            *(q, k, v, o, lse),
            *_ints(seq, k.shape[1], group, size),
            *_strides(q, k, v),
            *_dropout_arguments(xp, dropout),
        ),
    )
    return o, lse


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    out: tuple[Any, Any, Any],
    dropout: AttentionDropout | None = None,
) -> None:
    """As ops.attention_backward: three kernels, for do . o of each query, for dq, and for dk and dv.

    Shapes: as in attention, with L = S; `out` = (dq, dk, dv), views like q, k, v, written.
    """
    xp = backend.array_module(q)
    batch, seq, kv_heads, group, size = q.shape
    assert k.shape[1] == seq, "the gradient of attention over a cache of keys is nobody's"
    heads = kv_heads * group
    dq, dk, dv = out
    if not q.size:
        return
    do = xp.ascontiguousarray(do)
    dots = xp.empty_like(lse)
    rows = batch * seq * heads
    vec = _vec(do, o)
    loader.function("attention", "attention_dots", q.dtype, vec, CHUNKS=_chunks(size, q.dtype))(
        (-(-rows // (_THREADS // 32)),),
        (_THREADS,),
        (do, o, dots, np.int64(rows), *_ints(seq, heads, size)),
    )
    given = (q, k, v, do, lse, dots)
    sizes = _ints(seq, group, size)
    masks = _dropout_arguments(xp, dropout)
    _function("attention_backward_queries", q, k, v, do, dq)(
        _grid(q, seq, heads),
        (_THREADS,),
        (*given, dq, *sizes, *_strides(q, k, v, dq), *masks),
    )
    _function("attention_backward_keys", q, k, v, do, dk, dv)(
        _grid(q, seq, kv_heads),
        (_THREADS,),
        (*given, dk, dv, *sizes, *_strides(q, k, v, dk, dv), *masks),
    )


def _function(name: str, *arrays: Any) -> Any:
    """A kernel for these arrays: their type, their alignment and their head size."""
    dtype, size = arrays[0].dtype, arrays[0].shape[-1]
    return loader.function("attention", name, dtype, _vec(*arrays), CHUNKS=_chunks(size, dtype))


def _tile(dtype: Any) -> int:
    """Queries, keys or features of a tile: attention.cu's TILE."""
    return 32 if dtype == np.float64 else 64


def _chunks(size: int, dtype: Any) -> int:
    """Tiles of features that cover a head: attention.cu's CHUNKS."""
    if size > LARGEST_HEAD:
        raise ValueError(
            f"head size {size}: attention on a GPU takes at most {LARGEST_HEAD}; choose more heads"
        )
    return -(-size // _tile(dtype))


def _vec(*arrays: Any) -> int:
    """Elements of an access that suits every row of the arrays, along the last dim."""
    for x in arrays:
        assert x.shape[-1] == 1 or x.strides[-1] == x.itemsize, "the last dim has to be contiguous"
        steps = [s for s, n in zip(x.strides[:-1], x.shape[:-1], strict=True) if n > 1]
        if any(n % 16 for n in (x.data.ptr, x.shape[-1] * x.itemsize, *steps)):
            return 1
    return loader.wide(arrays[0].dtype)


def _grid(q: Any, seq: int, heads: int) -> tuple[int, int, int]:
    return -(-seq // _tile(q.dtype)), heads, q.shape[0]


def _ints(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)


def _strides(*arrays: Any) -> tuple[np.int64, ...]:
    """In elements, of all dims but the last."""
    return tuple(np.int64(s // x.itemsize) for x in arrays for s in x.strides[:-1])


def _dropout_arguments(xp: Any, dropout: AttentionDropout | None) -> tuple[Any, ...]:
    """The last seven parameters of the kernels."""
    if dropout is None:
        nothing = np.uint64(0)  # a null pointer
        return (
            *(np.uint32(0), np.float64(1), np.uint32(0), np.uint32(0)),
            *(nothing, nothing, np.int32(0)),
        )
    return (
        *(
            np.uint32(philox.threshold(dropout.p)),
            np.float64(philox.keep_scale(dropout.p)),
            np.uint32(dropout.key[0]),
            np.uint32(dropout.key[1]),
        ),
        *(_on_device(xp, dropout.step), _on_device(xp, dropout.first_token)),
        np.int32(dropout.first_head),
    )


def _on_device(xp: Any, value: Any) -> Any:
    """An int as a 0-d int64 array, which a kernel can read anew when a graph is replayed."""
    return value if isinstance(value, xp.ndarray) else xp.full((), value, np.int64)
