"""Each kernel against its definition in float64, on any CuPy: a GPU's, or the simulated one of the tests.

A case is a function check(cupy, dtype, sizes) -> errors, and CASES has all of this module by name:

    CASES: dict[str, Callable[[module, np.dtype, Sizes], dict[str, float]]]

    cupy    the module, real or simulated; arrays come from cupy.asarray(numpy_array) and go back by .get()
    dtype   of activations: float64, float32, bfloat16 or float16
    sizes   Sizes below; a case reads what it needs, and ignores the rest
    errors  name of an output -> max|a - b| / max(max|b|, 1e-12) with b in float64 (`relative_error`);
            for what has to be equal bit by bit, 0.0 or inf (`inequality`)

A case whose problem a library does not do raises `Refused`.

Inputs are rounded to `dtype` before the reference sees them, so that an error is the kernel's own.
`tolerance` says which errors may be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cupytron import ops
from cupytron.kernels import activation, dropout, embedding, norm, rotary, sums

Errors = dict[str, float]

# the largest error that rounding explains, by the dtype of activations
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Outputs that are float32 also where activations have 16 bits, and have to be as exact as that
SUMS = ("dweight", "dbias", "dtable", "sum")
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """What cases take their shapes from: T tokens of width D, a table of `rows`, sequences and heads."""

    tokens: int = 33
    width: int = 64
    rows: int = 65  # of an embedding's table, or a vocabulary
    batch: int = 2
    length: int = 17
    kv_heads: int = 2
    groups: int = 3  # query heads of a KV head
    head_size: int = 16
    shift: int = 0  # elements by which inputs of these cases miss the alignment of a 16-byte access


class Refused(Exception):
    """A library does not do a case's problem here, so there is nothing to compare; the text says why."""


def tolerance(dtype: Any, output: str) -> float:
    """The largest error that an output of a case may have."""
    name = np.dtype(dtype).name
    wide = name != "float64" and output.startswith(SUMS)
    return TOLERANCE["float32" if wide else name]


def relative_error(found: Any, wanted: np.ndarray, least: float = 1e-12) -> float:
    """max|found - wanted| / max|wanted|; inf for another shape, or where `found` is not finite.

    Args:
        found: an array of the device.
        wanted: the same in float64.
        least: what max|wanted| counts as if it is smaller.
    """
    host = found.get().astype(np.float64)
    if host.shape != wanted.shape:
        return np.inf
    if wanted.size == 0:
        return 0.0
    error = np.abs(host - wanted).max() / max(np.abs(wanted).max(), least)
    return float(error) if np.isfinite(error) else np.inf


def inequality(found: Any, wanted: Any) -> float:
    """0.0 if two arrays, each of the device or not, have the same shape, dtype and bits, else inf."""
    a, b = (x.get() if hasattr(x, "get") else x for x in (found, wanted))
    same = a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return 0.0 if same else np.inf


class Inputs:
    """Random arrays, each as the device has it and in float64."""

    def __init__(self, cupy: Any, dtype: Any, sizes: Sizes) -> None:
        self.cupy, self.dtype, self.shift = cupy, dtype, sizes.shift
        self.rng = np.random.default_rng(11)

    def normal(self, *shape: int, mean: float = 0.0) -> tuple[Any, np.ndarray]:
        values = (self.rng.normal(size=shape) + mean).astype(self.dtype)
        return self.put(values), values.astype(np.float64)

    def put(self, values: np.ndarray) -> Any:
        """On the device, `shift` elements behind what a 16-byte access may reach."""
        room = np.zeros(values.size + self.shift, values.dtype)
        room[self.shift :] = values.reshape(-1)
        return self.cupy.asarray(room)[self.shift :].reshape(values.shape)


def reference(name: str, *arguments: Any) -> Any:
    return ops.REFERENCE[name](*arguments)


# norms

NORM_OUTPUTS = ("dx", "dweight", "dbias")


def _norm(name: str, bias: bool, add: bool) -> Callable[[Any, Any, Sizes], Errors]:
    """Forward, and backward with and without a residual, on rows far off zero."""

    def check(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
        inputs = Inputs(cupy, dtype, sizes)
        shape = sizes.tokens, sizes.width
        x, exact_x = inputs.normal(*shape, mean=3.0)
        delta, exact_delta = inputs.normal(*shape)
        # the sum is rounded first, as the residual stream is
        acc = np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
        added = (exact_x.astype(acc) + exact_delta.astype(acc)).astype(dtype)
        exact_total = added.astype(np.float64) if add else exact_x
        weight, exact_weight = inputs.normal(sizes.width, mean=1.0)
        shift, exact_shift = inputs.normal(sizes.width)
        parameters, exact_parameters = [weight], [exact_weight]
        if name == "layer_norm":
            parameters.append(shift if bias else None)
            exact_parameters.append(exact_shift if bias else None)
        y, saved = reference(name, exact_total, *exact_parameters, EPS)
        errors = {}
        if add:
            function = getattr(norm, f"add_{name}")
            total, found, found_saved = function(x, delta, *parameters, EPS)
            errors["total"] = inequality(total, exact_total.astype(dtype))
        else:
            found, found_saved = getattr(norm, name)(x, *parameters, EPS)
        errors["x kept"] = inequality(x, exact_x.astype(dtype))
        errors["y"] = relative_error(found, y)

        dy, exact_dy = inputs.normal(*shape)
        residual, exact_residual = inputs.normal(*shape)
        backward = getattr(norm, f"{name}_backward")
        # dx is what three terms leave, of this size; of rows of one element it is next to nothing
        term = 0.1 * np.abs(exact_dy * exact_weight * saved[1]).max(initial=0.0)
        for ending, pair in (("", (None, None)), (" + residual", (residual, exact_residual))):
            wanted = reference(f"{name}_backward", exact_dy, saved, exact_weight, pair[1])
            results, again = (backward(dy, found_saved, weight, pair[0]) for _ in range(2))
            for output, a, b, c in zip(NORM_OUTPUTS, results, again, wanted, strict=False):
                errors[f"{output}{ending}"] = relative_error(
                    a, c, term if output == "dx" else 1e-12
                )
                errors[f"{output}{ending}, again"] = inequality(a, b)
        errors["dy kept"] = inequality(dy, exact_dy.astype(dtype))
        return errors

    return check


# activation functions


def _activation(name: str) -> Callable[[Any, Any, Sizes], Errors]:
    def check(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
        inputs = Inputs(cupy, dtype, sizes)
        values = inputs.rng.normal(size=(sizes.tokens, sizes.width)) * 3
        # where x^3 or exp(x) overflow, and where tanh is 1
        extreme = np.asarray((6e4, -6e4, 30, -30, 0), dtype)
        if values.size >= len(extreme):
            values.reshape(-1)[: len(extreme)] = extreme
        values = values.astype(dtype)
        x, exact_x = inputs.put(values), values.astype(np.float64)
        dy, exact_dy = inputs.normal(*x.shape)
        y, saved = reference(name, exact_x.copy())
        found, found_saved = getattr(activation, name)(x)
        # errors beside values near 1, not beside the extreme ones
        ordinary = np.abs(exact_x) < 20
        errors = {"x kept": inequality(x, values), "y": _where(found, y, ordinary)}
        found_dx = getattr(activation, f"{name}_backward")(dy, found_saved)
        dx = reference(f"{name}_backward", exact_dy.copy(), saved)
        errors |= {"dx": relative_error(found_dx, dx), "y, extreme": relative_error(found, y)}
        if dtype.itemsize >= 4 and x.size:  # what float32 can hold, and 16 bits cannot
            huge = inputs.put(np.asarray((1e30, -1e30), dtype))
            found, found_saved = getattr(activation, name)(huge)
            errors["y, huge"] = relative_error(found, np.asarray((1e30, 0.0)))
            ones = inputs.put(np.ones(2, dtype))
            slope = getattr(activation, f"{name}_backward")(ones, found_saved)
            errors["dx, huge"] = relative_error(slope, np.asarray((1.0, 0.0)))
        return errors

    return check


def _where(found: Any, wanted: np.ndarray, mask: np.ndarray) -> float:
    host = found.get().astype(np.float64)
    if host.shape != wanted.shape or not np.isfinite(host).all():
        return np.inf
    if not mask.any():
        return 0.0
    return float(np.abs(host - wanted)[mask].max() / max(np.abs(wanted[mask]).max(), 1e-12))


def swiglu(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """Two arrays of their own, the two halves of one, and of one whose rows are longer still."""
    inputs = Inputs(cupy, dtype, sizes)
    wide, exact = inputs.normal(sizes.tokens, 2 * sizes.width + 1)
    both = cupy.ascontiguousarray(wide[:, :-1])
    dy, exact_dy = inputs.normal(sizes.tokens, sizes.width)
    halves, parts = (
        (x[:, : sizes.width], x[:, sizes.width : 2 * sizes.width]) for x in (both, wide)
    )
    exact_halves = exact[:, : sizes.width].copy(), exact[:, sizes.width : -1].copy()
    own = [inputs.put(half.astype(dtype)) for half in exact_halves]
    y = reference("swiglu", *exact_halves)
    dgate, dup = reference("swiglu_backward", exact_dy, *exact_halves)
    errors = {}
    for name, (gate, up) in (("", own), (", halves", halves), (", parts", parts)):
        errors[f"y{name}"] = relative_error(activation.swiglu(gate, up), y)
        found = activation.swiglu_backward(dy, gate, up)
        errors[f"dgate{name}"] = relative_error(found[0], dgate)
        errors[f"dup{name}"] = relative_error(found[1], dup)
    errors["dy kept"] = inequality(dy, exact_dy.astype(dtype))
    return errors


# positions and tables


def rotate(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """Queries and keys within packed qkv, there and back; values stay."""
    inputs = Inputs(cupy, dtype, sizes)
    packed = sizes.kv_heads, sizes.groups + 2, sizes.head_size
    qkv, exact = inputs.normal(sizes.batch, sizes.length, *packed)
    before = exact.copy()
    acc = np.promote_types(dtype, np.float32) if dtype.itemsize > 2 else np.dtype(np.float32)
    tables = reference("rotary_table", np.arange(sizes.length), sizes.head_size, 10000.0, acc)
    cos, sin = (inputs.put(table) for table in tables)
    exact_cos, exact_sin = (table.astype(np.float64) for table in tables)
    if not sizes.length:
        rotary.rotary(qkv, cos, sin)
        return {"x": relative_error(qkv, exact)}
    reference("rotary", exact[..., : sizes.groups + 1, :], exact_cos, exact_sin)
    rotary.rotary(qkv[..., : sizes.groups + 1, :], cos, sin)
    errors = {"x": relative_error(qkv, exact)}
    values = before[..., sizes.groups + 1, :].astype(dtype)
    errors["values kept"] = inequality(
        cupy.ascontiguousarray(qkv[..., sizes.groups + 1, :]), values
    )
    rotary.rotary(qkv[..., : sizes.groups + 1, :], cos, -sin)
    errors["back"] = relative_error(qkv, before) / 2  # rounded twice

    # other numbers of dims: (B, S, n, H) and (B, S, H)
    plain, exact = inputs.normal(sizes.batch, sizes.length, 3, sizes.head_size)
    reference("rotary", exact, exact_cos, exact_sin)
    rotary.rotary(plain, cos, sin)
    errors["x, one dim of heads"] = relative_error(plain, exact)
    padded, exact = inputs.normal(sizes.batch, sizes.length, 2, sizes.head_size + 1)
    reference("rotary", exact[..., :-1], exact_cos, exact_sin)
    rotary.rotary(padded[..., :-1], cos, sin)
    errors["x, odd strides"] = relative_error(padded, exact)
    single, exact = inputs.normal(sizes.batch, sizes.length, sizes.head_size)
    reference("rotary", exact, exact_cos, exact_sin)
    rotary.rotary(single, cos, sin)
    errors["x, one head"] = relative_error(single, exact)
    return errors


def lookup(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """A whole table and a shard of it."""
    inputs = Inputs(cupy, dtype, sizes)
    table, exact = inputs.normal(sizes.rows, sizes.width)
    ids = inputs.rng.integers(0, sizes.rows, sizes.tokens)
    found = embedding.embedding(cupy.asarray(ids), table)
    errors = {"y": inequality(found, exact[ids].astype(dtype))}
    first = sizes.rows // 3
    found = embedding.embedding(cupy.asarray(ids), table[: sizes.rows // 2], first)
    wanted = np.zeros(found.shape)
    mine = (ids >= first) & (ids < first + sizes.rows // 2)
    wanted[mine] = exact[ids[mine] - first]
    errors["y of a shard"] = inequality(found, wanted.astype(dtype))
    if sizes.tokens:
        ids[-1] = sizes.rows
        found = embedding.embedding(cupy.asarray(ids), table)
        errors["outside"] = 0.0 if np.isnan(found.get()[-1].astype(np.float64)).all() else np.inf
    return errors


def table_gradient(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """Ids that are all over the table, few, one only; a shard, most of whose tokens are elsewhere."""
    inputs = Inputs(cupy, dtype, sizes)
    dy, exact_dy = inputs.normal(sizes.tokens, sizes.width)
    acc = np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
    start = inputs.rng.normal(size=(sizes.rows, sizes.width)).astype(acc)
    draws = {
        "": (inputs.rng.integers(0, sizes.rows, sizes.tokens), None),
        ", few": (inputs.rng.integers(0, min(3, sizes.rows), sizes.tokens), None),
        ", one": (np.full(sizes.tokens, sizes.rows - 1), None),
        ", shard": (inputs.rng.integers(0, 3 * sizes.rows, sizes.tokens), sizes.rows),
    }
    errors = {}
    for name, (ids, first) in draws.items():
        wanted = start.astype(np.float64)
        local = ids - (first or 0)
        mine = (local >= 0) & (local < sizes.rows)
        np.add.at(wanted, local[mine], exact_dy[mine])
        results = []
        for _ in range(2):
            dtable = inputs.put(start)
            embedding.embedding_backward(dy, cupy.asarray(ids), dtable, first)
            results.append(dtable)
        errors[f"dtable{name}"] = relative_error(results[0], wanted)
        errors[f"dtable{name} again"] = inequality(*results)
    return errors


# dropout and sums


def drop(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """Masks bit by bit; step and first token as numbers and in the device's memory."""
    inputs = Inputs(cupy, dtype, sizes)
    x, exact_x = inputs.normal(sizes.tokens, sizes.width)
    dy, exact_dy = inputs.normal(sizes.tokens, sizes.width)
    errors = {}
    for p in (0.1, 0.5):
        key, step, first = (123456789, 4000000000), 7, 1000
        y, mask = reference("dropout", exact_x, p, key, step, first)
        found, found_mask = dropout.dropout(x, p, key, step, first)
        errors |= {f"mask {p}": inequality(found_mask, mask), f"y {p}": relative_error(found, y)}
        there = cupy.asarray(np.int64(step)), cupy.asarray(np.int64(first))
        again, mask_again = dropout.dropout(x, p, key, *there)
        errors[f"y {p} again"] = inequality(again, found)
        errors[f"mask {p} again"] = inequality(mask_again, mask)
        dx = dropout.dropout_backward(dy, found_mask, p)
        errors[f"dx {p}"] = relative_error(dx, reference("dropout_backward", exact_dy, mask, p))
    return errors


def sum_rows(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    inputs = Inputs(cupy, dtype, sizes)
    dy, exact_dy = inputs.normal(sizes.tokens, sizes.width, mean=0.5)
    found = sums.sum_rows(dy)
    return {
        "sum": relative_error(found, exact_dy.sum(axis=0)),
        "sum again": inequality(sums.sum_rows(dy), found),
    }


def add_to(cupy: Any, dtype: Any, sizes: Sizes) -> Errors:
    """Activations, sums and both: total += x."""
    inputs = Inputs(cupy, dtype, sizes)
    acc = np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
    errors = {}
    for one in (dtype, acc):
        for other in (dtype, acc, np.dtype(np.float64)):
            a, b = (
                inputs.rng.normal(size=(sizes.tokens, sizes.width)).astype(d) for d in (one, other)
            )
            total = inputs.put(a)
            found = sums.add_to(total, inputs.put(b))
            wanted = a.astype(np.float64) + b.astype(np.float64)
            name = f"{one.name} += {other.name}"
            errors[name if one == dtype else f"sum, {name}"] = relative_error(found, wanted)
            errors[f"{name}, in place"] = inequality(total, found)
    return errors


CASES: dict[str, Callable[[Any, Any, Sizes], Errors]] = {
    "layer_norm": _norm("layer_norm", bias=True, add=False),
    "layer_norm without bias": _norm("layer_norm", bias=False, add=False),
    "add_layer_norm": _norm("layer_norm", bias=True, add=True),
    "rms_norm": _norm("rms_norm", bias=False, add=False),
    "add_rms_norm": _norm("rms_norm", bias=False, add=True),
    "gelu": _activation("gelu"),
    "gelu_exact": _activation("gelu_exact"),
    "relu": _activation("relu"),
    "swiglu": swiglu,
    "rotary": rotate,
    "embedding": lookup,
    "embedding_backward": table_gradient,
    "dropout": drop,
    "sum_rows": sum_rows,
    "add_to": add_to,
}
