"""Causal attention in blocks of queries: no (S, S) matrix outlives its block.

Forward keeps the output and, for each query, the logarithm of its softmax's denominator; backward makes
the probabilities again from these.

Reference: Dao et al. 2022, "FlashAttention", arXiv:2205.14135 (sections 3.1 and B).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from cupytron import backend
from cupytron.ops import philox

QUERY_BLOCK = 64


class AttentionDropout(NamedTuple):
    """Where the dropout mask of the probabilities comes from (philox.keep_mask)."""

    p: float
    key: tuple[int, int]
    step: int
    first_token: int  # the global index of token 0 of this micro-batch
    first_head: int  # the global index of head 0 of this shard


class _Task(NamedTuple):
    """A part of the batch and of the KV heads: what one thread works on at a time."""

    batch: slice
    heads: slice


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
    tasks = _tasks(q, k)

    def body(i: int) -> None:
        b, n = tasks[i]
        for queries, keys in _query_blocks(seq, k.shape[1]):
            s, peak = _scores(xp, q, k, tasks[i], queries, keys)
            s -= peak
            xp.exp(s, out=s)
            # normalising the small output, not the probabilities, saves a pass over s
            total = xp.einsum("...j->...", s)[..., None]
            if dropout:
                s *= _mask(xp, dropout, tasks[i], queries, seq, s)
            out = _heads_first(o, b, queries, n)
            xp.matmul(s, _values(v, b, keys, n), out=out)
            out /= total
            lse[b, n, :, queries] = (peak + xp.log(total))[..., 0]

    backend.for_tasks(xp, body, len(tasks))
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
    """Gradient of attention, written to out = (dq, dk, dv), arrays or views shaped like q, k, v.

    Shapes: do as o; the others as in attention, with L = S.
    """
    xp = backend.array_module(q)
    seq = q.shape[1]
    scale = 1 / math.sqrt(q.shape[-1])
    dq, dk, dv = out
    tasks = _tasks(q, k)

    def body(i: int) -> None:
        b, n = tasks[i]
        # the last block of queries sees every key: it writes, the others add
        for queries, keys in reversed(list(_query_blocks(seq, seq))):
            p, _ = _scores(xp, q, k, tasks[i], queries, keys, need_peak=False)
            p -= lse[b, n, :, queries, None]
            xp.exp(p, out=p)
            d_out = _heads_first(do, b, queries, n)
            # sum_j p_j dp_j of each query is what the softmax's Jacobian takes away
            along = xp.einsum("...h,...h->...", d_out, _heads_first(o, b, queries, n))[..., None]
            dp = xp.matmul(d_out, _values(v, b, keys, n).swapaxes(-1, -2))
            if dropout:
                mask = _mask(xp, dropout, tasks[i], queries, seq, p)
                dp *= mask
                mask *= p
                _add_to(xp, dv, mask, d_out, b, keys, n, last=queries.stop == seq)
            else:
                _add_to(xp, dv, p, d_out, b, keys, n, last=queries.stop == seq)
            dp -= along
            dp *= p  # now the gradient of the scaled scores
            query_part = _heads_first(q, b, queries, n) * scale
            _add_to(xp, dk, dp, query_part, b, keys, n, last=queries.stop == seq)
            dq_part = _heads_first(dq, b, queries, n)
            xp.matmul(dp, _values(k, b, keys, n), out=dq_part)
            dq_part *= scale

    backend.for_tasks(xp, body, len(tasks))


def _tasks(q: Any, k: Any) -> list[_Task]:
    """Cut batch and KV heads so that a task's block of scores is about BLOCK elements."""
    batch, seq, kv_heads, group, _ = q.shape
    one_head = group * min(seq, QUERY_BLOCK) * k.shape[1]
    heads_at_once = min(kv_heads, max(1, 2 * backend.BLOCK // one_head))
    head_parts = -(-kv_heads // heads_at_once)
    batch_at_once = max(1, 2 * backend.BLOCK // (one_head * kv_heads)) if head_parts == 1 else 1
    batch_parts = -(-batch // batch_at_once)
    if head_parts == 1 and batch >= 2:
        batch_parts += batch_parts % 2  # an even number: two threads end together
    return [
        _Task(slice(*_cut(batch, batch_parts, i)), slice(*_cut(kv_heads, head_parts, j)))
        for i in range(batch_parts)
        for j in range(head_parts)
    ]


def _cut(length: int, parts: int, i: int) -> tuple[int, int]:
    return length * i // parts, length * (i + 1) // parts


def _query_blocks(seq: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that its last query sees."""
    for start in range(0, seq, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, seq)
        yield slice(start, stop), slice(0, keys - seq + stop)


def _heads_first(x: Any, b: slice, queries: slice, n: slice) -> Any:
    """(B, S, N_kv, G, H) -> a view of a part as (B, N_kv, G, S, H)."""
    return x[b, queries, n].transpose(0, 2, 3, 1, 4)


def _values(x: Any, b: slice, keys: slice, n: slice) -> Any:
    """(B, L, N_kv, H) -> a view of a part as (B, N_kv, 1, L, H)."""
    return x[b, keys, n].transpose(0, 2, 1, 3)[:, :, None]


def _scores(
    xp: Any, q: Any, k: Any, task: _Task, queries: slice, keys: slice, need_peak: bool = True
) -> tuple[Any, Any]:
    """q k^T / sqrt(H), -inf above the diagonal, and each query's largest score."""
    b, n = task
    # scaling the queries is cheaper than scaling the scores
    scaled = _heads_first(q, b, queries, n) * (1 / math.sqrt(q.shape[-1]))
    s = xp.matmul(scaled, _values(k, b, keys, n).swapaxes(-1, -2))
    rows = queries.stop - queries.start
    if rows > 1:
        # only the last `rows` keys reach above the diagonal
        s[..., -rows:] += xp.triu(xp.full((rows, rows), -math.inf, dtype=s.dtype), 1)
    return s, s.max(axis=-1, keepdims=True) if need_peak else None


def _add_to(
    xp: Any, dx: Any, p: Any, d_out: Any, b: slice, keys: slice, n: slice, last: bool
) -> None:
    """dx[keys] += sum over the group's query heads of p^T d_out; the first write sets."""
    target = dx[b, keys, n].transpose(0, 2, 1, 3)
    if p.shape[2] == 1:
        left, right = p[:, :, 0].swapaxes(-1, -2), d_out[:, :, 0]
    else:
        # (.., G, S, L) -> (.., G S, L): one product sums over the group as well
        left = p.reshape(*p.shape[:2], -1, p.shape[-1]).swapaxes(-1, -2)
        right = d_out.reshape(*d_out.shape[:2], -1, d_out.shape[-1])
    if last:
        xp.matmul(left, right, out=target)
    else:
        target += xp.matmul(left, right)


def _mask(
    xp: Any, dropout: AttentionDropout, task: _Task, queries: slice, seq: int, like: Any
) -> Any:
    """Dropout factors, 0 or 1/(1 - p), by global head, query token and key position."""
    b, n = task
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
