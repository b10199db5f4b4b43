"""New arrays: empty, zeros, array, asarray and their like."""

from typing import Any

import numpy as np

from simulated import streams
from simulated.array import ndarray
from simulated.core import refuse_host_arrays, run, to_device


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    array = ndarray(shape, dtype, order=order)
    host = array._host
    streams.issue("zeros", lambda: host.fill(0), [], [array])
    return array


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    refuse_host_arrays(fill_value)
    if dtype is None:
        dtype = fill_value.dtype if isinstance(fill_value, ndarray) else np.array(fill_value).dtype
    array = ndarray(shape, dtype, order=order)
    array.fill(fill_value)
    return array


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, dtype, order)


def empty_like(
    prototype: ndarray, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    refuse_host_arrays(prototype)
    dtype = prototype.dtype if dtype is None else np.dtype(dtype)
    if shape is not None:
        return ndarray(shape, dtype, order="C" if order in "KA" else order)
    like = np.empty_like(prototype._host, dtype=dtype, order=order, subok=False)  # for its strides
    return ndarray(prototype.shape, dtype, strides=like.strides if like.size else None)


def zeros_like(
    a: ndarray, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    return full_like(a, 0, dtype, order, subok, shape)


def ones_like(
    a: ndarray, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    return full_like(a, 1, dtype, order, subok, shape)


def full_like(
    a: ndarray,
    fill_value: Any,
    dtype: Any = None,
    order: str = "K",
    subok: Any = None,
    shape: Any = None,
) -> ndarray:
    array = empty_like(a, dtype, order, subok, shape)
    array.fill(fill_value)
    return array


def arange(*args: Any, dtype: Any = None) -> ndarray:
    args = tuple(arg.item() if isinstance(arg, ndarray) else arg for arg in args)
    return run("arange", lambda: np.arange(*args, dtype=dtype), ())


def array(
    obj: Any,
    dtype: Any = None,
    copy: bool = True,
    order: str = "K",
    subok: bool = False,
    ndmin: int = 0,
    *,
    blocking: bool = False,
) -> ndarray:
    """A new array on the device, or the one given if it need not be copied."""
    if isinstance(obj, ndarray):
        same = dtype is None or np.dtype(dtype) == obj.dtype
        if not copy and same and _ordered(obj, order):
            result = obj
        else:
            result = obj.astype(obj.dtype if dtype is None else dtype, order=order)
    elif isinstance(obj, list | tuple) and obj and isinstance(obj[0], ndarray):
        result = run("stack", np.stack, (list(obj),))
        result = result if dtype is None else result.astype(dtype, copy=False)
    else:
        host = np.array(obj, dtype=dtype, order="C" if order in "KA" else order)
        if host.dtype == object:
            raise ValueError(f"Unsupported dtype {host.dtype}")
        result = ndarray(host.shape, host.dtype, order="F" if order == "F" else "C")
        to_device("array", result, host)
        if blocking:
            streams.host_waits("array(blocking=True)")
    while result.ndim < ndmin:
        result = result[None]
    return result


def _ordered(array: ndarray, order: str) -> bool:
    flags = array.flags
    return (
        order in "KA"
        or (order == "C" and flags.c_contiguous)
        or (order == "F" and flags.f_contiguous)
    )


def asarray(
    a: Any, dtype: Any = None, order: str | None = None, *, blocking: bool = False
) -> ndarray:
    return array(a, dtype, copy=False, order=order or "K", blocking=blocking)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    result = array(a, dtype, copy=False, order="C")
    return result.reshape(1) if result.ndim == 0 else result


def asnumpy(
    a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True
) -> np.ndarray:
    if isinstance(a, ndarray):
        return a.get(stream, order, out, blocking)
    result = np.asarray(a, order=order)
    if out is not None:
        out[...] = result
        return out
    return result
