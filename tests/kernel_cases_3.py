"""Products and cuDNN's attention against float64; kernel_cases.py says what a case is."""

import math
from typing import Any

import numpy as np
from kernel_cases import Refused, Sizes, relative_error

from cupytron.kernels import cudnn_attention, products
from cupytron.ops import AttentionDropout


def _random(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _laid_out(cupy: Any, host: np.ndarray, layout: str) -> Any:
    """The same matrix on the device, lying in memory as `layout` says."""
    if layout == "rows":
        return cupy.asarray(host)
    if layout == "columns":
        return cupy.asarray(np.ascontiguousarray(host.swapaxes(-1, -2))).swapaxes(-1, -2)
    wide = np.zeros((*host.shape[:-2], host.shape[-2], 2 * host.shape[-1] + 3), host.dtype)
    step = {"slice": 1, "gaps": 2}[layout]
    place = (..., slice(1, 1 + step * host.shape[-1], step))
    wide[place] = host
    return cupy.asarray(wide)[place]


def _wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [x.astype(np.float64) for x in arrays]


def matmul_layouts(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """Operands and result by rows, by columns, as slices of wider arrays (unaligned), and with gaps."""
    m, k, n = sizes.tokens, sizes.width, sizes.rows
    host_a, host_b = _random((m, k), dtype, 1), _random((k, n), dtype, 2)
    wanted = np.matmul(*_wide(host_a, host_b))
    errors = {}
    layouts = ("rows", "columns", "slice", "gaps")
    for a in layouts:
        for b in layouts:
            found = products.matmul(_laid_out(cupy, host_a, a), _laid_out(cupy, host_b, b))
            errors[f"{a} @ {b}"] = relative_error(found, wanted)
    for name, one in (("row", host_a[:1]), ("column", host_a[:, :1])):
        same = cupy.broadcast_to(cupy.asarray(one), host_a.shape)
        wanted_same = np.matmul(*_wide(np.broadcast_to(one, host_a.shape), host_b))
        found = products.matmul(same, cupy.asarray(host_b))
        errors[f"the same {name}"] = relative_error(found, wanted_same)
    for layout in layouts:
        out = _laid_out(cupy, np.zeros((m, n), dtype), layout)
        returned = products.matmul(cupy.asarray(host_a), cupy.asarray(host_b), out=out)
        errors[f"out {layout}"] = relative_error(out, wanted) if returned is out else math.inf
    return errors


def matmul_sizes(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """Odd sizes, vectors, nothing at all."""
    shapes = [
        (1, 1, 1),
        (1, 7, 5),
        (5, 7, 1),
        (5, 1, 7),
        (3, 5, 7),
        (0, 4, 5),
        (4, 0, 5),
        (4, 5, 0),
    ]
    shapes += [(sizes.tokens, sizes.rows, sizes.width + 1)]
    errors = {}
    for m, k, n in shapes:
        a, b = _random((m, k), dtype, 3), _random((k, n), dtype, 4)
        found = products.matmul(cupy.asarray(a), cupy.asarray(b))
        errors[f"{m}x{k}x{n}"] = relative_error(found, np.matmul(*_wide(a, b)))
        found = products.matmul(cupy.asarray(b).T, cupy.asarray(a).T)
        errors[f"{m}x{k}x{n} transposed"] = relative_error(found, np.matmul(*_wide(a, b)).T)
    return errors


def batched(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """Matrices apart by any stride, by none (the same one each time), and heads of a packed array."""
    shape_a, shape_b = (3, sizes.length, sizes.width), (3, sizes.width, sizes.length)
    a, b = _random(shape_a, dtype, 5), _random(shape_b, dtype, 6)
    errors = {}
    for first in ("rows", "columns", "slice", "gaps"):
        for second in ("rows", "columns"):
            left, right = _laid_out(cupy, a, first), _laid_out(cupy, b, second)
            found = products.batched_matmul(left, right)
            errors[f"{first} @ {second}"] = relative_error(found, np.matmul(*_wide(a, b)))
    found = products.batched_matmul(cupy.asarray(a)[::-1], cupy.asarray(b))
    errors["backwards"] = relative_error(found, np.matmul(*_wide(a[::-1], b)))
    same = cupy.broadcast_to(cupy.asarray(b[0]), b.shape)
    found = products.batched_matmul(cupy.asarray(a), same)
    errors["broadcast"] = relative_error(found, np.matmul(*_wide(a, b[:1])))
    heads = _random((sizes.length, 3, sizes.head_size), dtype, 7)
    by_head = cupy.asarray(heads).swapaxes(0, 1)
    found = products.batched_matmul(by_head, by_head.swapaxes(1, 2))
    errors["heads"] = relative_error(found, np.einsum("snh,tnh->nst", *_wide(heads, heads)))
    found = products.batched_matmul(cupy.asarray(a[:1]), cupy.asarray(b[:1]))
    errors["one"] = relative_error(found, np.matmul(*_wide(a[:1], b[:1])))
    return errors


def linear(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """With a bias, without, with one that is not aligned or dense, for no tokens or features."""
    errors = {}
    for outputs in (sizes.width, sizes.rows):
        x = _random((sizes.tokens, sizes.width), dtype, 8)
        weight = _random((sizes.width, outputs), dtype, 9)
        bias = _random((2 * outputs,), dtype, 10)
        on_device = [cupy.asarray(array) for array in (x, weight, bias)]
        product = np.matmul(*_wide(x, weight))
        wide_bias = bias.astype(np.float64)
        parts = {"aligned": slice(0, outputs), "unaligned": slice(1, outputs + 1)}
        for name, part in {**parts, "strided": slice(0, 2 * outputs, 2)}.items():
            y = products.linear(*on_device[:2], on_device[2][part])
            errors[f"{outputs} {name}"] = relative_error(y, product + wide_bias[part])
        errors[f"{outputs} no bias"] = relative_error(products.linear(*on_device[:2]), product)
        none = products.linear(on_device[0][:0], on_device[1], on_device[2][:outputs])
        errors[f"{outputs} no tokens"] = relative_error(none, np.zeros((0, outputs)))
        x, weight, bias = on_device[0][:, :0], on_device[1][:0], on_device[2][:outputs]
        wanted = np.broadcast_to(wide_bias[:outputs], (sizes.tokens, outputs))
        errors[f"{outputs} no features"] = relative_error(products.linear(x, weight, bias), wanted)
    return errors


def add_product(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """Twice into the same gradient; for half precision into float32 and into its own type."""
    x = _random((sizes.tokens, sizes.width), dtype, 11)
    dy = _random((sizes.tokens, sizes.rows), dtype, 12)
    start = _random((sizes.width, sizes.rows), dtype, 13)
    errors = {}
    for total_dtype in {np.dtype(dtype), np.dtype("float32" if dtype.itemsize == 2 else dtype)}:
        for layout in ("rows", "columns", "slice", "gaps"):
            total = _laid_out(cupy, start.astype(total_dtype), layout)
            on_device = cupy.asarray(x), cupy.asarray(dy)
            products.add_product(total, *on_device)
            products.add_product(total, *on_device)
            products.add_product(total, on_device[0][:0], on_device[1][:0])
            wanted = start.astype(np.float64) + 2 * np.matmul(x.astype(np.float64).T, *_wide(dy))
            errors[f"{total_dtype.name} {layout}"] = relative_error(total, wanted)
    return errors


def half_sums(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """Sums of half-precision products are float32's: into a float32 gradient nothing is rounded to half."""
    if dtype.itemsize != 2:
        raise Refused(f"this is for 16 bits, and {dtype.name} has more")
    x, dy = _random((sizes.tokens, sizes.width), dtype, 14), _random((sizes.tokens, 24), dtype, 15)
    total = cupy.zeros((sizes.width, 24), "float32")
    products.add_product(total, cupy.asarray(x), cupy.asarray(dy))
    error = relative_error(total, np.matmul(x.astype(np.float64).T, *_wide(dy)))
    return {
        "float32 total": error * 100
    }  # so that half precision's tolerance asks for float32's digits


def _attention_cases(
    cupy: Any, dtype: Any, sizes: Sizes, kv_heads: int, group: int, packed: bool
) -> Any:
    batch, length, size = sizes.batch, sizes.length, sizes.head_size
    shape = (batch, length, kv_heads, group + 2, size)
    host, do = _random(shape, dtype, 16), _random((batch, length, kv_heads, group, size), dtype, 17)
    qkv, dqkv = cupy.asarray(host), cupy.zeros(shape, dtype)
    q, k, v = _parts(qkv, group)
    if not packed:
        q, k, v = (cupy.array(x, order="C") for x in (q, k, v))
    if (reason := cudnn_attention.supports(q, k, v)) is not None:
        raise Refused(reason)
    o, lse = cudnn_attention.attention(q, k, v)
    gradients = _parts(dqkv, group)
    if not packed:
        gradients = tuple(cupy.zeros(x.shape, dtype) for x in gradients)
    cudnn_attention.attention_backward(cupy.asarray(do), q, k, v, o, lse, gradients)
    wanted = _attention(*_wide(*_parts(host, group), do))
    names = ("o", "lse", "dq", "dk", "dv")
    found = (o, lse, *gradients)
    return {
        name: relative_error(cupy.array(x, order="C"), y)
        for name, x, y in zip(names, found, wanted, strict=True)
    }


def _parts(qkv: Any, group: int) -> tuple[Any, Any, Any]:
    return qkv[..., :group, :], qkv[..., group, :], qkv[..., group + 1, :]


def _attention(q: Any, k: Any, v: Any, do: Any) -> list[np.ndarray]:
    """o, lse, dq, dk, dv of causal attention, by definition."""
    scale = 1 / math.sqrt(q.shape[-1])
    s = scale * np.einsum("bsngh,btnh->bngst", q, k)
    s = np.where(np.tri(s.shape[-1], dtype=bool), s, -np.inf)
    lse = np.log(np.exp(s).sum(axis=-1))
    p = np.exp(s - lse[..., None])
    o = np.einsum("bngst,btnh->bsngh", p, v)
    dp = np.einsum("bsngh,btnh->bngst", do, v)
    ds = scale * p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    dq, dk = np.einsum("bngst,btnh->bsngh", ds, k), np.einsum("bngst,bsngh->btnh", ds, q)
    return [o, lse, dq, dk, np.einsum("bngst,bsngh->btnh", p, do)]


def cudnn_packed(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """One query head for each KV head: everything is read and written in the packed array."""
    return _attention_cases(cupy, dtype, sizes, sizes.kv_heads * sizes.groups, 1, packed=True)


def cudnn_grouped(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """Several query heads share a KV head; queries are copied."""
    return _attention_cases(cupy, dtype, sizes, sizes.kv_heads, sizes.groups, packed=True)


def cudnn_one_kv_head(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """All query heads share one KV head: their heads lie evenly."""
    return _attention_cases(cupy, dtype, sizes, 1, sizes.groups, packed=True)


def cudnn_separate(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """q, k and v are arrays of their own."""
    return _attention_cases(cupy, dtype, sizes, sizes.kv_heads, sizes.groups, packed=False)


def cudnn_deterministic(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """The other algorithm for gradients."""
    cudnn_attention.deterministic(True)
    try:
        return cudnn_grouped(cupy, dtype, sizes)
    finally:
        cudnn_attention.deterministic(False)


def cudnn_dropout(cupy: Any, dtype: Any, sizes: Sizes) -> dict[str, float]:
    """Its mask is not known: o is linear in v and dv its adjoint, for one mask; and the mean stays."""
    batch, length, size = sizes.batch, sizes.length, sizes.head_size
    shape = (batch, length, sizes.kv_heads, 3, size)
    qkv, dqkv = cupy.asarray(_random(shape, dtype, 18)), cupy.zeros(shape, dtype)
    (q, k, v), gradients = _parts(qkv, 1), _parts(dqkv, 1)
    do = _random((batch, length, sizes.kv_heads, 1, size), dtype, 19)
    dropout = AttentionDropout(0.2, (3, 4), 5, 6, 7)
    if (reason := cudnn_attention.supports(q, k, v, dropout)) is not None:
        raise Refused(reason)
    o, lse = cudnn_attention.attention(q, k, v, dropout)
    again, _ = cudnn_attention.attention(q, k, v, dropout)
    other, _ = cudnn_attention.attention(q, k, v, dropout._replace(step=6))
    cudnn_attention.attention_backward(cupy.asarray(do), q, k, v, o, lse, gradients, dropout)
    wide_o, wide_v, wide_dv = _wide(*(cupy.asnumpy(x) for x in (o, v, gradients[2])))
    (wide_do,) = _wide(do)
    scale = np.linalg.norm(wide_do) * np.linalg.norm(wide_o)
    ones = cupy.ones_like(v)
    (wide_mean,) = _wide(cupy.asnumpy(cudnn_attention.attention(q, k, ones, dropout)[0]))
    mean = float(wide_mean.mean())
    return {
        "adjoint": abs((wide_do * wide_o).sum() - (wide_dv * wide_v).sum()) / scale,
        "the same address, the same mask": float((cupy.asnumpy(o) != cupy.asnumpy(again)).any()),
        "another step, another mask": float((cupy.asnumpy(o) == cupy.asnumpy(other)).all()),
        # a query with t keys spreads by about 0.5 / sqrt(t), the more its probabilities differ the more
        "mean": max(
            0.0,
            abs(mean - 1)
            - 4 * math.sqrt((1 + math.log(length)) / (batch * sizes.kv_heads)) / length,
        ),
    }


CASES = {
    function.__name__: function
    for function in (
        *(matmul_layouts, matmul_sizes, batched, linear, add_product, half_sums),
        *(cudnn_packed, cudnn_grouped, cudnn_one_kv_head, cudnn_separate, cudnn_deterministic),
        cudnn_dropout,
    )
}
# cuDNN adds the parts of a query's gradient in any order unless it is asked not to
ANY_ORDER = {
    "cudnn_packed",
    "cudnn_grouped",
    "cudnn_one_kv_head",
    "cudnn_separate",
    "cudnn_dropout",
}
