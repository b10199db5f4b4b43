"""Matrix products: cuBLAS, which CuPy does not let into a capture; it knows no stacks of bfloat16."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from simulated import streams
from simulated.array import ndarray
from simulated.core import HALF, run


def product(name: str, host: Callable[..., Any]) -> Callable[..., Any]:
    def body(a: Any, b: Any, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        dtype = np.result_type(a, b)
        if dtype.name in HALF:
            a, b = np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32)
        result = np.asarray(host(a, b, *args, **kwargs)).astype(dtype, copy=False)
        if out is None:
            return result
        if not np.can_cast(dtype, out.dtype, "same_kind"):
            raise TypeError(f"output (dtype: {dtype}) cannot be cast to {out.dtype} by same_kind")
        if out.shape != result.shape:
            raise ValueError(f"Output array has shape {out.shape}, the result {result.shape}")
        out[...] = result
        return out

    @functools.wraps(host)
    def function(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        for operand in (a, b):
            if not isinstance(operand, ndarray):
                raise TypeError(f"Unsupported type {type(operand)}")
        _check_blas(name, a, b)
        return run(name, body, (a, b, *args), kwargs)

    return function


def _check_blas(name: str, *operands: ndarray) -> None:
    dtype = np.result_type(*(operand.dtype for operand in operands))
    if dtype.name == "bfloat16" and max(operand.ndim for operand in operands) >= 3:
        raise TypeError(
            f"cupy.{name} of bfloat16 arrays with 3 dimensions or more fails in CuPy 14.2"
        )
    if streams.capturing() and (dtype.kind in "fc" or dtype.name == "bfloat16"):
        raise NotImplementedError(
            f"calling cuBLAS API (cupy.{name}) during stream capture is currently unsupported"
        )


def einsum(subscripts: str, *operands: Any, **kwargs: Any) -> Any:
    for operand in operands:
        if not isinstance(operand, ndarray):
            raise TypeError(f"Unsupported type {type(operand)}")
    inputs, _, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if any(label not in output for label in inputs if sum(label in term for term in terms) > 1):
        _check_blas("einsum", *operands)
    dtype = np.result_type(*(operand.dtype for operand in operands))

    def body(*hosts: Any, **options: Any) -> Any:
        if dtype.name in HALF:
            hosts = tuple(host.astype(np.float32) for host in hosts)
        return np.asarray(np.einsum(subscripts, *hosts, **options)).astype(dtype, copy=False)

    return run("einsum", body, operands, kwargs)
