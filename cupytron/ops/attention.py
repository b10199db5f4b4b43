"""Causal attention in blocks of queries: no (S, S) matrix outlives its block.

Forward keeps the output and, for each query, the logarithm of its softmax's denominator; backward makes
the probabilities again from these.

Reference: Dao et al. 2022, "FlashAttention", arXiv:2205.14135 (sections 3.1 and B).
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cupytron import backend
from cupytron.ops import philox

QUERY_BLOCK = 64
_SAFE = 40.0  # exp(40) and sums of many of it are far from float32's largest number
_SMALLEST_SUM = math.exp(-_SAFE)


class AttentionDropout(NamedTuple):
    """Where the dropout mask of the probabilities comes from (philox.keep_mask)."""

    p: float
    key: tuple[int, int]
    step: int
    first_token: int  # the global index of token 0 of this micro-batch
    first_head: int  # the global index of head 0 of this shard


@backend.one_blas_thread()
def attention(q: Any, k: Any, v: Any, dropout: AttentionDropout | None = None) -> tuple[Any, Any]:
    """o = softmax(q k^T / sqrt(H)) v; a query sees the keys up to its own position.

    Shapes: q, o (B, S, N_kv, G, H): G query heads share a KV head; k, v (B, L, N_kv, H) with L >= S: the
    queries are the last S of L positions; lse (B, N_kv, G, S).
    Returns: o (new, contiguous) and lse, both needed by attention_backward.
    """
    xp = backend.array_module(q)
    batch, seq, kv_heads, group, _ = q.shape
    o = xp.empty(q.shape, dtype=q.dtype)
    lse = xp.empty((batch, kv_heads, group, seq), dtype=q.dtype)

    for b, n in _tasks(q, k):
        for queries, keys in _query_blocks(seq, k.shape[1]):
            s = _scores(xp, q[b, queries, n], k[b, keys, n])
            s, peak, total = _exponentials(xp, s)
            if dropout:
                s *= _mask(xp, dropout, b, n, queries, seq, s)
            # normalising the small output, not the probabilities, saves a pass over s
            out = _by_head(o[b, queries, n])
            xp.matmul(s, _by_kv_head(v[b, keys, n]), out=out)
            out /= total
            lse[b, n, :, queries] = (peak + xp.log(total))[..., 0]
    return o, lse


def cached_attention(q: Any, k: Any, v: Any) -> Any:
    """The o of attention, for a few new queries over a cache of keys and values: without a backward.

    Shapes: as attention's.
    """
    return attention(q, k, v)[0]


@backend.one_blas_thread()
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
    """Gradient of attention, written to out = (dq, dk, dv), arrays or views shaped like q, k, v.

    Shapes: do as o; the others as in attention, with L = S.
    """
    xp = backend.array_module(q)
    seq = q.shape[1]
    scale = 1 / math.sqrt(q.shape[-1])
    dq, dk, dv = out

    for b, n in _tasks(q, k):
        dk_sum: Any = None  # sums over the blocks of queries, (B, N_kv, S, H)
        dv_sum: Any = None
        for queries, keys in reversed(list(_query_blocks(seq, seq))):
            q_part, d_out = _by_head(q[b, queries, n]), _by_head(do[b, queries, n])
            k_part, v_part = _by_kv_head(k[b, keys, n]), _by_kv_head(v[b, keys, n])
            p = _scores(xp, q[b, queries, n], k[b, keys, n])
            p -= lse[b, n, :, queries, None]
            xp.exp(p, out=p)
            # sum_j p_j dp_j of each query is what the softmax's Jacobian takes away
            along = xp.einsum("...h,...h->...", d_out, _by_head(o[b, queries, n]))[..., None]
            dp = xp.matmul(d_out, v_part.swapaxes(-1, -2))
            dropped = p
            if dropout:
                dropped = _mask(xp, dropout, b, n, queries, seq, p)
                dp *= dropped
                dropped *= p
            dv_part = _over_queries(xp, dropped, d_out)
            dp -= along
            dp *= p  # now the gradient of the scaled scores
            dp *= scale
            dk_part = _over_queries(xp, dp, q_part)
            xp.matmul(dp, k_part, out=_by_head(dq[b, queries, n]))
            if dk_sum is None:  # the last block of queries comes first: it sees every key
                dk_sum, dv_sum = dk_part, dv_part
            else:
                dk_sum[:, :, keys] += dk_part
                dv_sum[:, :, keys] += dv_part
        dk[b, :, n] = dk_sum.transpose(0, 2, 1, 3)
        dv[b, :, n] = dv_sum.transpose(0, 2, 1, 3)


def _tasks(q: Any, k: Any) -> list[tuple[slice, slice]]:
    """Parts of the batch and of the KV heads whose block of scores fits the cache (4 BLOCK elements)."""
    batch, seq, kv_heads, group, _ = q.shape
    one_head = group * min(seq, QUERY_BLOCK) * k.shape[1]
    heads_at_once = min(kv_heads, max(1, 4 * backend.BLOCK // one_head))
    head_parts = -(-kv_heads // heads_at_once)
    batch_at_once = max(1, 4 * backend.BLOCK // (one_head * kv_heads)) if head_parts == 1 else 1
    batch_parts = -(-batch // batch_at_once)
    return [
        (_part(batch, batch_parts, i), _part(kv_heads, head_parts, j))
        for i in range(batch_parts)
        for j in range(head_parts)
    ]


def _part(length: int, parts: int, i: int) -> slice:
    return slice(length * i // parts, length * (i + 1) // parts)


def _query_blocks(seq: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that its last query sees."""
    for start in range(0, seq, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, seq)
        yield slice(start, stop), slice(0, keys - seq + stop)


def _by_head(x: Any) -> Any:
    """(B, S, N_kv, G, H) -> a view (B, N_kv, G, S, H)."""
    return x.transpose(0, 2, 3, 1, 4)


def _by_kv_head(x: Any) -> Any:
    """(B, L, N_kv, H) -> a view (B, N_kv, 1, L, H)."""
    return x.transpose(0, 2, 1, 3)[:, :, None]


def _scores(xp: Any, q: Any, k: Any) -> Any:
    """q k^T / sqrt(H), -inf above the diagonal; the queries are the last of the keys' positions.

    Shapes: q (B, queries, N_kv, G, H), k (B, keys, N_kv, H); returns (B, N_kv, G, queries, keys).
    """
    s = xp.matmul(_by_head(q), _by_kv_head(k).swapaxes(-1, -2))
    s *= 1 / math.sqrt(q.shape[-1])
    rows = q.shape[1]
    if rows > 1:
        # only the last `rows` keys reach above the diagonal
        s[..., -rows:] += _above_diagonal(xp, rows, s.dtype)
    return s


@functools.cache
def _above_diagonal(xp: Any, rows: int, dtype: Any) -> Any:
    return xp.triu(xp.full((rows, rows), -math.inf, dtype=dtype), 1)


def _exponentials(xp: Any, s: Any) -> tuple[Any, Any, Any]:
    """exp(s - peak), peak, and each query's sum of exp(s - peak), for a softmax; s is overwritten.

    Subtracting each query's largest score guards against overflow, and costs as much as the
    exponentials. Moderate scores do without: where no score is above _SAFE and no sum below
    exp(-_SAFE), nothing has overflowed or been lost, and the quotients are as accurate.
    """
    if xp is np and s.max() < _SAFE:  # a GPU would have to wait for the answer
        e = xp.exp(s)
        total = xp.einsum("...j->...", e)[..., None]
        if total.min() > _SMALLEST_SUM:
            return e, 0.0, total
    peak = s.max(axis=-1, keepdims=True)
    s -= peak
    xp.exp(s, out=s)
    return s, peak, xp.einsum("...j->...", s)[..., None]


def _over_queries(xp: Any, p: Any, x: Any) -> Any:
    """Sum over queries and over the group's heads of p x: (B, N_kv, keys, H).

    Shapes: p (B, N_kv, G, queries, keys), x (B, N_kv, G, queries, H).
    """
    if p.shape[2] == 1:
        return xp.matmul(p[:, :, 0].swapaxes(-1, -2), x[:, :, 0])
    # (.., G, queries, ..) -> (.., G queries, ..): one product sums over the group as well
    p, x = (a.reshape(*a.shape[:2], -1, a.shape[-1]) for a in (p, x))
    return xp.matmul(p.swapaxes(-1, -2), x)


def _mask(
    xp: Any, dropout: AttentionDropout, b: slice, n: slice, queries: slice, seq: int, like: Any
) -> Any:
    """Dropout factors, 0 or 1/(1 - p), by global head, query token and key position."""
    group = like.shape[2]
    heads = xp.arange(n.start * group, n.stop * group, dtype=xp.uint64) + dropout.first_head + 1
    sequences = xp.arange(b.start, b.stop, dtype=xp.uint64)[:, None, None, None]
    tokens = sequences * seq + xp.arange(queries.start, queries.stop, dtype=xp.uint64)
    address = (
        tokens + dropout.first_token,
        dropout.step,
        heads.reshape(1, -1, group, 1),
    )
    mask = philox.keep_mask(xp, like.shape, address, dropout.key, dropout.p)
    return mask * like.dtype.type(philox.keep_scale(dropout.p))
