"""Matrix products by cuBLASLt: the names and signatures of cupytron/ops/linear.py, on CuPy arrays.

Half precision is multiplied on tensor cores, summed in float32 and rounded once, the bias included. float32
is float32, unless `allow_tf32(True)` gives up digits for speed.

An array may be a transposed view, or a slice of rows or columns: how it lies in memory is read off its
strides. Only what has gaps in both directions is copied first.

cublaslt.py has the calls, product_plans.py the choice among the library's algorithms.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from cupytron.errors import CupytronError
from cupytron.kernels import cublaslt, product_plans
from cupytron.kernels.product_plans import choices, set_choices, set_timing

__all__ = [
    "Candidates",
    "add_product",
    "allow_tf32",
    "batched_matmul",
    "candidates",
    "choices",
    "forget",
    "library_version",
    "linear",
    "matmul",
    "set_choices",
    "set_timing",
]

_HALF = ("float16", "bfloat16")
_DTYPES = (*_HALF, "float32", "float64")
_EPILOGUE = (*_HALF, "float32")  # of which a bias may be added on the way out


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    """a @ b.

    Shapes: a (M, K), b (K, N), either may be a transposed view; returns (M, N), in `out` if given.
    Dtypes: a and b the same; out the same, or float32 if they are half precision.
    """
    if a.ndim != 2 or b.ndim != 2:
        raise CupytronError(f"matmul takes two matrices, and these are {a.shape} and {b.shape}")
    return _product(a, b, out)


def batched_matmul(a: Any, b: Any, out: Any = None) -> Any:
    """a[i] @ b[i] for each i.

    Shapes: a (B, M, K), b (B, K, N), with any strides between matrices; returns (B, M, N), in `out` if
    given.
    Dtypes: as in matmul.
    """
    if a.ndim != 3 or b.ndim != 3 or len(a) != len(b):
        raise CupytronError(
            f"batched_matmul takes two stacks of as many matrices, and these are {a.shape} and {b.shape}"
        )
    return _product(a, b, out)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """y = x @ weight + bias.

    Shapes: x (T, D_in), weight (D_in, D_out), bias (D_out,); y (T, D_out), new.
    """
    import cupy

    y = cupy.empty((x.shape[0], weight.shape[1]), x.dtype)
    if bias is not None and _fits_epilogue(x, bias) and _run(x, weight, y, bias):
        return y
    _product(x, weight, y)
    if bias is not None:
        y += bias
    return y


def add_product(total: Any, x: Any, dy: Any) -> None:
    """total += x.T @ dy: how a matrix gets its gradient, in one pass over it.

    Shapes: total (D_in, D_out), x (T, D_in), dy (T, D_out).
    Dtypes: x and dy the same; total the same, or float32 if they are half precision.
    """
    _product(x.T, dy, total, add=True)


_tf32 = False


def allow_tf32(on: bool) -> None:
    """Whether float32 matrices may be rounded to 10 bits of fraction, for tensor cores to multiply them."""
    global _tf32
    _tf32 = on


class Candidates(NamedTuple):
    """The algorithms for one product: what an autotuner times."""

    key: str  # under which set_choices takes the index of one
    runs: list[Callable[[], None]]  # each computes the product


def candidates(a: Any, b: Any, out: Any, bias: Any = None, add: bool = False) -> Candidates:
    """The algorithms for out = a @ b + bias, or with `add` out += a @ b; nothing is run or chosen yet.

    The arrays have to be such as cuBLASLt can use in place, and to live until the last run.
    """
    _check(a, b, out)
    if (call := _call(a, b, out, bias)) is None:
        raise CupytronError("cuBLASLt cannot use these arrays in place: make them contiguous")
    pointers = _pointers(call, a, b, out, bias)
    runs: list[Callable[[], None]] = [
        lambda i=i: call.plan.run(*pointers, add=add, algorithm=i)  # type: ignore[misc]
        for i in range(call.plan.count)
    ]
    return Candidates(call.plan.problem.key, runs)


def library_version() -> int:
    """cuBLASLt's: choices hold for one version and one kind of GPU."""
    return cublaslt.library().get_version()


def forget() -> None:
    """Let go of all that was prepared: the library is about to be exchanged, or the device reset."""
    _calls.clear()
    product_plans.forget()
    cublaslt.forget()


class _Call(NamedTuple):
    """What is done for arrays that lie in a certain way."""

    plan: cublaslt.Plan
    swapped: bool  # out.T = b.T @ a.T is computed


_calls: dict[tuple[Any, ...], _Call] = {}


def _product(a: Any, b: Any, out: Any = None, add: bool = False) -> Any:
    """a @ b, written to `out`, or with `add` added to it."""
    import cupy

    if out is None:
        out = cupy.empty((*a.shape[:-1], b.shape[-1]), a.dtype)
    if not _run(a, b, out, add=add):
        target = _contiguous(out)
        if not _run(_contiguous(a), _contiguous(b), target, add=add):
            raise CupytronError(f"cuBLASLt has no algorithm for {a.shape} @ {b.shape} of {a.dtype}")
        if target is not out:
            out[...] = target
    return out


def _contiguous(x: Any) -> Any:
    """x itself if cuBLASLt can use it in place, else a copy that it can."""
    import cupy

    return x if _reading(x) else cupy.array(x, order="C")


def _run(a: Any, b: Any, out: Any, bias: Any = None, add: bool = False) -> bool:
    """The product on the arrays as they are; False if cuBLASLt cannot."""
    import cupy

    how = (
        *((x.shape, x.strides, x.dtype, x.data.ptr % cublaslt.ALIGNMENT) for x in (a, b, out)),
        bias is not None,
        _tf32,
        cupy.cuda.runtime.getDevice(),
    )
    if (call := _calls.get(how)) is None:
        _check(a, b, out)
        if not out.size or not a.shape[-1]:
            if not add:  # sums of nothing
                out[...] = 0 if bias is None else bias
            return True
        if (call := _call(a, b, out, bias)) is None:
            return False
        _calls[how] = call
    pointers = _pointers(call, a, b, out, bias)
    if not call.plan.decided:
        # what is added to must not be added to again and again
        product_plans.choose(call.plan, *pointers, scratch=_reach(out) if add else 0)
    call.plan.run(*pointers, add)
    return True


def _reach(x: Any) -> int:
    """Bytes from the first of an array to the last."""
    steps = zip(x.shape, x.strides, strict=True)
    return sum((n - 1) * step for n, step in steps) + x.itemsize


def _check(a: Any, b: Any, out: Any) -> None:
    name = a.dtype.name
    if a.dtype != b.dtype or name not in _DTYPES:
        raise CupytronError(
            f"a matrix product takes two arrays of the same type, one of {', '.join(_DTYPES)}, "
            f"and these are {a.dtype} and {b.dtype}"
        )
    if out.dtype != a.dtype and not (name in _HALF and out.dtype.name == "float32"):
        raise CupytronError(f"a matrix product of {name} cannot be written to {out.dtype}")
    if a.shape[-1] != b.shape[-2] or out.shape != (*a.shape[:-1], b.shape[-1]):
        raise CupytronError(f"{a.shape} @ {b.shape} cannot be written to {out.shape}")


def _fits_epilogue(x: Any, bias: Any) -> bool:
    dense = bias.strides == (bias.itemsize,) and bias.data.ptr % cublaslt.ALIGNMENT == 0
    return dense and bias.dtype == x.dtype and x.dtype.name in _EPILOGUE


class _Reading(NamedTuple):
    """How an array (rows, columns) lies in memory."""

    by_rows: bool  # rows are contiguous; else columns are
    ld: int  # elements from the start of one to that of the next


def _reading(x: Any) -> _Reading | None:
    """None if neither rows nor columns are contiguous, or rows overlap."""
    item = x.itemsize
    rows, columns = x.shape[-2:]
    down, along = x.strides[-2:]
    if x.ndim == 3 and (x.strides[0] < 0 or x.strides[0] % item):
        return None
    # a step that is never made may have any length
    if along == item or columns == 1:
        if rows == 1:
            return _Reading(True, columns)
        if down % item == 0 and down >= columns * item:
            return _Reading(True, down // item)
    if (down == item or rows == 1) and along % item == 0 and along >= rows * item:
        return _Reading(False, along // item)
    return None


def _call(a: Any, b: Any, out: Any, bias: Any) -> _Call | None:
    """None if cuBLASLt cannot use the arrays in place, or has no algorithm."""
    read = _reading(out)
    swapped = read is not None and not read.by_rows
    if swapped:
        if bias is not None:
            return None
        a, b, out = _transposed(a, b, out)
    read_a, read_b, read_out = _reading(a), _reading(b), _reading(out)
    if read_a is None or read_b is None or read_out is None:
        return None
    batch = len(out) if out.ndim == 3 else 1
    steps = [x.strides[0] // x.itemsize if batch > 1 else 0 for x in (b, a, out)]
    aligned = [_alignment(x.data.ptr) for x in (b, a, out)]
    problem = cublaslt.Problem(
        dtype=a.dtype.name,
        out_dtype=out.dtype.name,
        m=out.shape[-1],
        n=out.shape[-2],
        k=a.shape[-1],
        transpose=(not read_b.by_rows, not read_a.by_rows),
        ld=(read_b.ld, read_a.ld, read_out.ld),
        batch=batch,
        batch_strides=(steps[0], steps[1], steps[2]),
        alignments=(aligned[0], aligned[1], aligned[2]),
        bias=bias is not None,
        tf32=_tf32 and a.dtype.name == "float32",
    )
    plan = product_plans.plan(problem)
    return _Call(plan, swapped) if plan.count else None


def _alignment(pointer: int) -> int:
    """The largest power of two that divides it, up to ALIGNMENT."""
    return min(pointer & -pointer, cublaslt.ALIGNMENT)


def _transposed(a: Any, b: Any, out: Any) -> tuple[Any, Any, Any]:
    """The operands of out.T = b.T @ a.T."""
    return b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2)


def _pointers(call: _Call, a: Any, b: Any, out: Any, bias: Any) -> tuple[int, int, int, int]:
    """Of cuBLASLt's A, B and D, and of the bias.

    It reads columns, and so sees the transposes of arrays that lie by rows: out.T = b.T @ a.T once more.
    """
    first, second = (a, b) if call.swapped else (b, a)
    return first.data.ptr, second.data.ptr, out.data.ptr, 0 if bias is None else bias.data.ptr
