"""Attention in blocks against the textbook's: shapes, groups, offsets, dropout, memory."""

import math
import tracemalloc

import numpy as np
import pytest

from cupytron import ops
from cupytron.ops import philox


def textbook(q, k, v, factors=None):
    """o and everything that its gradient needs, with the whole (S, L) matrix in memory."""
    keys = np.repeat(k, q.shape[3], axis=2)  # KV heads for each query head
    values = np.repeat(v, q.shape[3], axis=2)
    queries = q.reshape(*q.shape[:2], -1, q.shape[-1])
    s = np.einsum("bind,bjnd->bnij", queries, keys) / math.sqrt(q.shape[-1])
    rows, columns = s.shape[-2:]
    s = np.where(np.tri(rows, columns, columns - rows, dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    dropped = p if factors is None else p * factors
    return np.einsum("bnij,bjnd->bind", dropped, values).reshape(q.shape), p


def make(rng, batch, seq, kv_heads, group, size, keys=None):
    q = rng.normal(size=(batch, seq, kv_heads, group, size))
    k = rng.normal(size=(batch, keys or seq, kv_heads, size))
    return q, k, rng.normal(size=k.shape)


SHAPES = [(1, 1, 1, 1, 2), (2, 7, 2, 1, 4), (3, 64, 1, 3, 8), (2, 65, 2, 2, 6), (1, 200, 4, 1, 16)]


@pytest.mark.parametrize("scale", [1.0, 100.0])  # scores far above where the shift is left out
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(rng, shape, scale):
    q, k, v = make(rng, *shape)
    q *= scale
    o, lse = ops.attention(q, k, v)
    want, p = textbook(q, k, v)
    np.testing.assert_allclose(o, want, rtol=1e-10, atol=1e-11)
    do = rng.normal(size=o.shape)
    out = tuple(np.full(x.shape, np.nan) for x in (q, k, v))
    ops.attention_backward(do, q, k, v, o, lse, out)
    # the textbook's gradient
    heads = do.reshape(*do.shape[:2], -1, do.shape[-1])
    group = q.shape[3]
    scale = 1 / math.sqrt(q.shape[-1])
    dv = np.einsum("bnij,bind->bjnd", p, heads)
    dp = np.einsum("bind,bjnd->bnij", heads, np.repeat(v, group, axis=2))
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) * scale
    dq = np.einsum("bnij,bjnd->bind", ds, np.repeat(k, group, axis=2)).reshape(q.shape)
    dk = np.einsum("bnij,bind->bjnd", ds, q.reshape(heads.shape))
    grouped = [x.reshape(*k.shape[:3], group, -1).sum(axis=3) for x in (dk, dv)]
    for got, want in zip(out, (dq, *grouped), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize("keys", [5, 70, 130])
def test_queries_are_the_last_of_the_keys(rng, keys):
    q, k, v = make(rng, 2, keys, 2, 2, 4)
    whole, _ = ops.attention(q, k, v)
    for last in (1, 3):
        part, _ = ops.attention(q[:, -last:], k, v)
        np.testing.assert_allclose(part, whole[:, -last:], rtol=1e-12, atol=1e-13)


def test_dropout_masks_probabilities_by_global_index(rng):
    q, k, v = make(rng, 2, 70, 2, 2, 4)
    key = philox.key_of(1, "dropout", "attention")
    dropout = ops.AttentionDropout(0.4, key, step=3, first_token=1000, first_head=0)
    o, lse = ops.attention(q, k, v, dropout)
    # head h, query token t, key j: addressed one by one
    factors = np.empty((2, 4, 70, 70))
    for b in range(2):
        for h in range(4):
            tokens = np.arange(70, dtype=np.uint64) + np.uint64(1000 + b * 70)
            factors[b, h] = philox.keep_mask(np, (70, 70), (tokens, 3, h + 1), key, 0.4)
    factors *= philox.keep_scale(0.4)
    want, _ = textbook(q, k, v, factors)
    np.testing.assert_allclose(o, want, rtol=1e-10, atol=1e-12)
    # a shard with the last two heads, and a later micro-batch, draw their own part of the same masks
    shard = dropout._replace(first_head=2, first_token=1070)
    part, _ = ops.attention(q[1:, :, 1:], k[1:, :, 1:], v[1:, :, 1:], shard)
    np.testing.assert_allclose(part, o[1:, :, 1:], rtol=1e-12)
    assert lse.shape == (2, 2, 2, 70)


def test_memory_does_not_grow_with_the_square_of_the_sequence(rng):
    """Beyond inputs and outputs, four times the sequence needs about four times the memory."""

    def peak(seq):
        q, k, v = (x.astype(np.float32) for x in make(rng, 1, seq, 2, 1, 8))
        tracemalloc.start()
        o, lse = ops.attention(q, k, v)
        out = tuple(np.empty_like(x) for x in (q, k, v))
        ops.attention_backward(o, q, k, v, o, lse, out)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    short, long = peak(1024), peak(4096)
    assert long < 6 * short
    assert long < 4096 * 4096 * 4 / 4  # far from one (S, S) matrix


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("shift", [0.0, -60.0, 60.0, -130.0, 130.0])
def test_softmax_without_a_shift_is_only_taken_where_it_is_safe(rng, scale, shift):
    """Scores from moderate to extreme, all of them high or low: the same result, no overflow."""
    q, k, v = (x.astype(np.float32) for x in make(rng, 1, 70, 1, 1, 4))
    q *= scale
    # a constant in q and k moves all scores of a query by the same amount
    q[..., 0], k[..., 0] = abs(shift), np.sign(shift) * 2
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        o, _ = ops.attention(q, k, v)
    want, _ = textbook(*(x.astype(np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(o, want, rtol=2e-3, atol=2e-4)
