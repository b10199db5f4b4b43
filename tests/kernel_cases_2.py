"""Cases, as in kernel_cases.py, of attention, the loss and the update."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from kernel_cases import Sizes, inequality, relative_error

from cupytron import backend, ops, optim
from cupytron.config import OptimConfig
from cupytron.kernels import attention as attention_kernels
from cupytron.kernels import cross_entropy as loss_kernels
from cupytron.kernels import optimizer

Errors = dict[str, float]


def draw(rng: np.random.Generator, shape: Any, dtype: Any, spread: float = 1.0) -> np.ndarray:
    """Normal numbers, rounded to dtype."""
    return (rng.normal(size=shape) * spread).astype(dtype)


def poisoned(cupy: Any, shape: Any, dtype: Any) -> Any:
    """NaN wherever a kernel forgets to write."""
    return cupy.asarray(np.full(shape, np.nan, dtype))


def exact(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


# attention


def heads_of(packed: Any) -> tuple[Any, Any, Any]:
    """Views q, k, v of (B, S, N_kv, G + 2, H)."""
    return packed[..., :-2, :], packed[..., -2, :], packed[..., -1, :]


def attention_both_ways(
    cupy: Any, dtype: Any, sizes: Sizes, dropout: Any = None, spread: float = 1.0
) -> Errors:
    """Forward and backward on packed arrays, twice."""
    rng = np.random.default_rng(1)
    packed = (sizes.batch, sizes.length, sizes.kv_heads, sizes.groups + 2, sizes.head_size)
    qkv = draw(rng, packed, dtype)
    qkv[..., :-2, :] *= np.asarray(spread, dtype)
    q, k, v = heads_of(exact(qkv))
    o, lse = ops.REFERENCE["attention"](q, k, v, dropout)
    d_out = draw(rng, o.shape, dtype)
    gradient = np.empty(packed)
    backward = ops.REFERENCE["attention_backward"]
    backward(exact(d_out), q, k, v, o, lse, heads_of(gradient), dropout)

    def run() -> tuple[Any, Any, Any]:
        views = heads_of(cupy.asarray(qkv))
        found, found_lse = attention_kernels.attention(*views, dropout)
        into = poisoned(cupy, packed, dtype)
        attention_kernels.attention_backward(
            cupy.asarray(d_out), *views, found, found_lse, heads_of(into), dropout
        )
        return found, found_lse, into

    first, second = run(), run()
    assert first[1].dtype == backend.at_least_float32(dtype)
    errors = {
        name: relative_error(a, b)
        for name, a, b in zip(("o", "lse"), first[:2], (o, lse), strict=True)
    }
    parts = zip(("dq", "dk", "dv"), heads_of(first[2]), heads_of(gradient), strict=True)
    errors |= {name: relative_error(a, b) for name, a, b in parts}
    return errors | {f"repeated {i}": inequality(first[i], second[i]) for i in range(3)}


def attention(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    return attention_both_ways(cupy, dtype, sizes)


def attention_of_large_scores(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """Scores whose exponentials have no float32."""
    errors = attention_both_ways(cupy, dtype, sizes, spread=30.0)
    # a gradient through probabilities of nearly 0 and 1 is left over from differences of rounded numbers
    kept = ("o", "lse", "repeated 0", "repeated 1", "repeated 2")
    return {name: errors[name] for name in kept}


def attention_dropout(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """The CPU's masks: one wrong bit is an error of the size of a probability."""
    dropout = ops.AttentionDropout(0.3, (0xDEADBEEF, 0x12345678), 5, 1000, 3)
    return attention_both_ways(cupy, dtype, sizes, dropout)


def attention_dropout_from_device(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """Step and first token may stand in the device's memory."""
    rng = np.random.default_rng(2)
    shape = (sizes.batch, sizes.length, sizes.kv_heads, sizes.groups + 2, sizes.head_size)
    views = heads_of(cupy.asarray(draw(rng, shape, dtype)))
    host = ops.AttentionDropout(0.5, (1, 2), 7, 40, 0)
    device = host._replace(step=cupy.full((), 7, np.int64), first_token=cupy.full((), 40, np.int64))
    other = host._replace(step=8)
    a, b, c = (attention_kernels.attention(*views, x)[0] for x in (host, device, other))
    changed = 0.0 if inequality(a, c) else math.inf
    return {"o": inequality(a, b), "another step": changed}


def attention_of_separate_arrays(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """Every array has strides of its own, of whole accesses or not."""
    errors = separate_arrays(cupy, dtype, sizes, 0)
    return errors | {f"{k}, off": e for k, e in separate_arrays(cupy, dtype, sizes, 3).items()}


def separate_arrays(cupy: Any, dtype: Any, sizes: Sizes, odd: int) -> Errors:
    """Arrays with their dims in another order, and gaps between their rows.

    Args:
        odd: elements by which the rows of some of them miss the alignment of an access.
    """
    rng = np.random.default_rng(9)
    batch, seq, kv_heads, size = sizes.batch, sizes.length, sizes.kv_heads, sizes.head_size
    of_queries, of_keys = (batch, seq, kv_heads, sizes.groups), (batch, seq, kv_heads)

    def memory(order: tuple[int, ...], gap: int, shape: tuple[int, ...]) -> np.ndarray:
        row = -(-size // 8) * 8 + gap  # aligned rows, also of heads that no access divides
        return draw(rng, (*(shape[i] for i in order), row), dtype)

    def view(x: Any, order: tuple[int, ...]) -> Any:
        back = (*(order.index(i) for i in range(len(order))), len(order))
        return x.transpose(back)[..., :size]

    orders = ((2, 0, 1, 3), (0, 2, 1), (1, 2, 0), (3, 1, 0, 2), (2, 1, 0), (0, 1, 2))
    shapes = (of_queries, of_keys, of_keys) * 2
    held = [
        memory(*each) for each in zip(orders, (8, odd, 16, 24 + odd, 8, odd), shapes, strict=True)
    ]
    q, k, v = (exact(view(x, order)) for x, order in zip(held, orders[:3], strict=False))
    d_out = draw(rng, (*of_queries, size + 8), dtype)[..., :size]
    o, lse = ops.REFERENCE["attention"](q, k, v)
    wanted = tuple(np.empty(x.shape) for x in (q, k, v))
    ops.REFERENCE["attention_backward"](exact(d_out), q, k, v, o, lse, wanted)

    for x in held[3:]:
        x[...] = np.nan
    there = [view(cupy.asarray(x), order) for x, order in zip(held, orders, strict=True)]
    found, found_lse = attention_kernels.attention(*there[:3])
    attention_kernels.attention_backward(
        cupy.asarray(d_out.base)[..., :size], *there[:3], found, found_lse, tuple(there[3:])
    )
    names = ("o", "dq", "dk", "dv")
    pairs = zip(names, (found, *there[3:]), (o, *wanted), strict=True)
    return {name: relative_error(a, b) for name, a, b in pairs}


def attention_over_cache(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """Queries at the end of more keys, which are a part of a longer array; one query, too."""
    rng = np.random.default_rng(3)
    errors = {}
    keys = sizes.length
    for seq in (1, max(1, keys // 3), max(1, keys - 5)):
        q = draw(rng, (sizes.batch, seq, sizes.kv_heads, sizes.groups, sizes.head_size), dtype)
        k, v = draw(rng, (2, sizes.batch, keys + 5, sizes.kv_heads, sizes.head_size), dtype)
        k[:, keys:] = v[:, keys:] = np.nan
        o, lse = ops.REFERENCE["attention"](exact(q), exact(k)[:, :keys], exact(v)[:, :keys])
        cached = (cupy.asarray(x)[:, :keys] for x in (k, v))
        found, found_lse = attention_kernels.attention(cupy.asarray(q), *cached)
        errors[f"o of {seq}"] = relative_error(found, o)
        errors[f"lse of {seq}"] = relative_error(found_lse, lse)
    return errors


# loss


def some_targets(rng: np.random.Generator, tokens: int, rows: int) -> np.ndarray:
    """Ids, some of them IGNORE, and always the first and the last one."""
    targets = rng.integers(0, rows, tokens)
    targets[::5] = ops.IGNORE
    targets[1::7] = rows - 1
    targets[2::7] = 0
    return targets


def cross_entropy(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    rng = np.random.default_rng(4)
    logits = draw(rng, (sizes.tokens, sizes.rows), dtype, 3.0)
    logits[3] *= np.asarray(100, dtype)  # a sure one
    if sizes.rows > 1:
        logits[4:6, : sizes.rows // 2] = -np.inf  # whole accesses without a number above it
    targets = some_targets(rng, sizes.tokens, sizes.rows)
    targets[3:6] = sizes.rows - 1
    wanted = exact(logits)
    loss = ops.REFERENCE["cross_entropy"](wanted, targets, 0.25)

    def run(scale: Any) -> tuple[Any, Any]:
        found = cupy.asarray(logits)
        return loss_kernels.cross_entropy(found, cupy.asarray(targets), scale), found

    found, gradient = run(0.25)
    again, repeated = run(cupy.full((), 0.25, np.float64))
    assert found.shape == () and found.dtype == np.float64
    return {
        "loss": relative_error(found, np.float64(loss)),
        "gradient": relative_error(gradient, wanted),
        "ignored": float(np.abs(exact(gradient.get()[targets == ops.IGNORE])).max()),
        "repeated loss": inequality(found, again),
        "repeated gradient": inequality(gradient, repeated),
    }


def cross_entropy_of_shards(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """A vocabulary in four shards, of which one has no row; some targets and peaks in each."""
    rng = np.random.default_rng(5)
    tokens, rows = sizes.tokens, sizes.rows
    logits = draw(rng, (tokens, rows), dtype, 3.0)
    targets = some_targets(rng, tokens, rows)
    wanted, scale = exact(logits), 0.5
    loss = ops.REFERENCE["cross_entropy"](wanted, targets, scale)
    cuts = [0, rows // 3, rows // 3, rows // 3 + 1, rows]
    places = [slice(a, b) for a, b in itertools.pairwise(cuts)]

    shards = [cupy.asarray(np.ascontiguousarray(logits[:, place])) for place in places]
    ids = cupy.asarray(targets)
    own = [
        loss_kernels.shard_exponentials(shard, ids, place.start)
        for shard, place in zip(shards, places, strict=True)
    ]
    errors: Errors = {}
    for n, place in enumerate(places):
        part = exact(logits)[:, place]
        expected = ops.REFERENCE["shard_exponentials"](part, targets, place.start)
        if place.start < place.stop:  # -infinity where the target is elsewhere
            found, here = own[n].get(), np.isfinite(expected)
            errors[f"where own {n} is finite"] = float((np.isfinite(found) != here).any())
            found = cupy.asarray(np.where(here, found, 0.0))
            errors[f"own {n}"] = relative_error(found, np.where(here, expected, 0.0))
        else:
            errors[f"own {n}"] = inequality(own[n], expected)
        errors[f"exponentials {n}"] = relative_error(shards[n], part)
    everyone = cupy.asarray(np.stack([x.get() for x in own]))
    losses = [
        loss_kernels.shard_cross_entropy(shard, ids, mine, everyone, scale, place.start)
        for shard, mine, place in zip(shards, own, places, strict=True)
    ]
    whole = np.concatenate([x.get() for x in shards], axis=1)
    errors["loss"] = relative_error(losses[0], np.float64(loss))
    errors |= {f"loss of {n}": inequality(losses[0], x) for n, x in enumerate(losses)}
    errors["gradient"] = relative_error(cupy.asarray(whole), wanted)
    errors["ignored"] = float(np.abs(exact(whole[targets == ops.IGNORE])).max())
    return errors


# update


def control_of(cupy: Any, **values: float) -> Any:
    """A control vector with some slots set."""
    control = optimizer.new_control(1.0, 0.0)
    for name, value in values.items():
        control[optimizer.Control[name]] = value
    return control


def update_case(cupy: Any, dtype: Any, sizes: Sizes, name: str, states: int) -> Errors:
    """Two steps of an optimizer against optim's; the copy is the rounded weights, bit by bit."""
    rng = np.random.default_rng(6)
    wide = backend.at_least_float32(dtype)
    settings = OptimConfig(name=name, weight_decay=0.1, eps=1e-6, momentum=0.8)
    length, decayed = sizes.tokens * sizes.width + 3, sizes.tokens * sizes.width // 2 + 1
    start = [draw(rng, length, wide) for _ in range(1 + states)]
    start[-1] = np.abs(start[-1])  # a mean of squares is none below zero
    gradients = [draw(rng, length, wide) for _ in range(2)]
    lr, multiplier, steps = 0.01, 0.125, 6

    wanted = [exact(x) for x in start]
    for n, gradient in enumerate(gradients):
        for part, decay in ((slice(0, decayed), 0.1), (slice(decayed, None), 0.0)):
            parts = [x[part] for x in wanted]
            optim.OPTIMIZERS[name](settings).update(
                parts[0], exact(gradient)[part] * multiplier, tuple(parts[1:]), lr, steps + n, decay
            )

    found = [cupy.asarray(x) for x in start]
    copy = poisoned(cupy, length, dtype) if backend.is_half(np.dtype(dtype)) else None
    control = control_of(cupy, LR=lr, STEP=steps, MULTIPLIER=multiplier)
    for gradient in gradients:
        g = cupy.asarray(gradient)
        if name == "adamw":
            optimizer.adamw(
                *(found[0], copy, g, *found[1:], decayed, control),
                *(settings.beta1, settings.beta2, settings.eps, settings.weight_decay),
            )
        else:
            optimizer.sgd(
                *(found[0], copy, g, *found[1:], decayed, control),
                *(settings.momentum, settings.weight_decay),
            )
        optimizer.finish(control)
    names = ("weights", *optim.OPTIMIZERS[name].STATE)
    errors = {n: relative_error(a, b) for n, a, b in zip(names, found, wanted, strict=True)}
    errors["gradient"] = inequality(g, np.zeros(length, wide))
    if copy is not None:
        errors["copy"] = inequality(copy, found[0].get().astype(dtype))
    return errors


def adamw(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    return update_case(cupy, dtype, sizes, "adamw", 2)


def sgd(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    return update_case(cupy, dtype, sizes, "sgd", 1)


def copy_weights(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """Also ties, numbers that overflow, and a part that does not begin at 16 bytes."""
    rng = np.random.default_rng(7)
    wide = backend.at_least_float32(np.dtype(dtype))
    weights = draw(rng, sizes.tokens * sizes.width + 3, wide)
    weights[:8] = 1 + 2.0**-9, 1 + 3 * 2.0**-9, 1e38, -1e38, 1e-6, -0.0, np.inf, -np.inf
    errors = {}
    for first in (0, 1):
        copy = poisoned(cupy, len(weights), dtype)
        optimizer.copy_weights(cupy.asarray(weights)[first:], copy[first:])
        with np.errstate(over="ignore"):
            errors[f"from {first}"] = inequality(copy[first:], weights[first:].astype(dtype))
    return errors


def squares(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """A range's sum is the same wherever it stands, by itself or among others, aligned or not."""
    rng = np.random.default_rng(8)
    chunks, length = 3, sizes.tokens * sizes.width + 3
    gradient = draw(rng, chunks * length, backend.at_least_float32(np.dtype(dtype)))
    found = optimizer.squares(cupy.asarray(gradient), chunks)
    parts = gradient.reshape(chunks, length)
    errors = {"sums": relative_error(found, (exact(parts) ** 2).sum(axis=1))}
    for n, part in enumerate(parts):
        alone = optimizer.squares(cupy.asarray(part.copy()), 1)
        errors[f"alone {n}"] = inequality(alone, found[n : n + 1])
    return errors


CASES: dict[str, Callable[[Any, Any, Sizes], Errors]] = {
    case.__name__: case
    for case in (
        attention,
        attention_of_large_scores,
        attention_dropout,
        attention_dropout_from_device,
        attention_of_separate_arrays,
        attention_over_cache,
        cross_entropy,
        cross_entropy_of_shards,
        adamw,
        sgd,
        copy_weights,
        squares,
    )
}
