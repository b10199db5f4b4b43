"""The functions of the simulated cupy: NumPy's, under the names that CuPy has, and with CuPy's manners."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from simulated import creation, products, streams
from simulated.array import ndarray
from simulated.core import HALF, refuse_host_arrays, run

_LISTED = (Path(__file__).parent / "cupy_names.txt").read_text().splitlines()[1:]
NAMES = frozenset(name for name in _LISTED if not name.startswith("ndarray."))
ATTRIBUTES = frozenset(
    name.removeprefix("ndarray.") for name in _LISTED if name.startswith("ndarray.")
)

# what answers on the host, without looking at values
_HOST = frozenset(
    "ndim shape size result_type can_cast promote_types min_scalar_type common_type issubdtype isdtype "
    "iscomplexobj isrealobj isscalar broadcast_shapes may_share_memory shares_memory isfortran "
    "base_repr binary_repr typename mintypecode iterable printoptions set_printoptions "
    "get_printoptions format_float_positional format_float_scientific".split()
)
# what has to know values before it can go on: the host waits, and capture is refused
_WAITING = frozenset(
    "nonzero flatnonzero argwhere unique unique_all unique_counts unique_inverse unique_values "
    "extract compress sort argsort lexsort msort partition argpartition sort_complex bincount "
    "histogram histogram2d histogramdd digitize array2string array_repr array_str save savez savetxt "
    "intersect1d setdiff1d setxor1d union1d in1d isin trim_zeros median nanmedian percentile quantile "
    "tril_indices triu_indices tril_indices_from triu_indices_from mask_indices average interp "
    "piecewise polyfit roots corrcoef cov searchsorted place".split()
)
# small arrays are joined by a kernel that gets their addresses from the host
_JOINING = frozenset("concatenate concat stack hstack vstack dstack column_stack append".split())
_BLAS = frozenset("matmul dot inner vdot tensordot kron".split())
_ACCUMULATING = frozenset("sum prod mean var std cumsum cumprod nansum nanmean".split())
_TO_ARRAY = frozenset("allclose array_equal array_equiv".split())
_IN_PLACE = frozenset("copyto put putmask place fill_diagonal put_along_axis".split())


def lookup(name: str) -> Any:
    """What `cupy.NAME` is; AttributeError for what CuPy does not have."""
    if name in _OWN:
        return _OWN[name]
    if name not in NAMES:
        raise AttributeError(f"module 'cupy' has no attribute {name!r}")
    return _standard(name)


@functools.cache
def _standard(name: str) -> Any:
    host = getattr(np, name, None)
    if host is None:
        return _missing(name)
    if name in _HOST:
        return _on_host(host)
    if isinstance(host, np.ufunc):
        return ufunc(name, host)
    if isinstance(host, type) or not callable(host):
        return host
    return _function(name, host)


def _missing(name: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"the simulated GPU has no cupy.{name}: NumPy {np.__version__} lacks it"
        )

    return function


def _on_host(host: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return host(*(arg._host if isinstance(arg, ndarray) else arg for arg in args), **kwargs)

    return function


def _function(name: str, host: Callable[..., Any]) -> Callable[..., Any]:
    body = _in_float(host) if name in _ACCUMULATING else host
    if name in _TO_ARRAY:
        body = lambda *args, **kwargs: np.bool_(host(*args, **kwargs))  # noqa: E731

    @functools.wraps(host)
    def function(*args: Any, **kwargs: Any) -> Any:
        if name in _WAITING:
            streams.host_waits(f"cupy.{name}")
        if name in _JOINING and streams.capturing():
            raise RuntimeError(
                f"cupy.{name} copies addresses from the host, and the current stream is capturing, so "
                "synchronous API calls are disallowed"
            )
        if name in _IN_PLACE:
            return _in_place(name, host, args, kwargs)
        return run(name, body, args, kwargs)

    return function


def _in_place(name: str, host: Callable[..., Any], args: Any, kwargs: Any) -> None:
    target = args[0]
    if not isinstance(target, ndarray):
        raise TypeError(f"cupy.{name} writes into a cupy.ndarray, not {type(target)}")
    run(name, lambda *a, out, **k: host(*a, **k), args, {**kwargs, "out": target})


def _in_float(host: Callable[..., Any]) -> Callable[..., Any]:
    """A sum of 16-bit numbers, added as float32 and rounded once, as CuPy does it."""

    def function(array: Any, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        dtype = getattr(array, "dtype", None)
        more = {} if out is None else {"out": out}
        if dtype is None or dtype.name not in HALF or kwargs.get("dtype") not in (None, dtype):
            return host(array, *args, **more, **kwargs)
        kwargs.pop("dtype", None)
        result = np.asarray(host(array.astype(np.float32), *args, **kwargs)).astype(dtype)
        if out is not None:
            out[...] = result
        return result

    return function


class ufunc:
    """As cupy.ufunc: elementwise, and reductions where CuPy has them."""

    def __init__(self, name: str, host: np.ufunc) -> None:
        self.name = self.__name__ = name
        self._host = host
        self.nin, self.nout, self.nargs = host.nin, host.nout, host.nargs

    def __repr__(self) -> str:
        return f"<ufunc 'cupy_{self.name}'>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if isinstance(arg, list | tuple):
                raise TypeError(f"Unsupported type {type(arg)}")
        refuse_host_arrays(args)
        if len(args) > self.nin:
            kwargs["out"] = args[self.nin] if len(args) == self.nin + 1 else args[self.nin :]
            args = args[: self.nin]
        return run(self.name, self._host, args, kwargs)

    def reduce(
        self, array: Any, axis: Any = 0, dtype: Any = None, out: Any = None, **kwargs: Any
    ) -> Any:
        body = _in_float(self._host.reduce)
        return run(
            f"{self.name}.reduce", body, (array, axis), {"dtype": dtype, "out": out, **kwargs}
        )

    def accumulate(self, array: Any, axis: int = 0, dtype: Any = None, out: Any = None) -> Any:
        options = {"axis": axis, "dtype": dtype, "out": out}
        return run(f"{self.name}.accumulate", self._host.accumulate, (array,), options)

    def outer(self, a: Any, b: Any, **kwargs: Any) -> Any:
        return run(f"{self.name}.outer", self._host.outer, (a, b), kwargs)

    def at(self, a: ndarray, indices: Any, b: Any = None) -> None:
        if a.dtype.name == "bfloat16":
            raise TypeError(f"cupy.{self.name}.at is not supported for bfloat16 (CuPy 14.2)")
        args = (a, indices) if b is None else (a, indices, b)
        run(f"{self.name}.at", lambda *x, out: self._host.at(*x), args, {"out": a})


def where(condition: Any, x: Any = None, y: Any = None) -> Any:
    if x is None and y is None:
        return lookup("nonzero")(condition)
    if not isinstance(condition, ndarray):
        raise TypeError(f"Unsupported type {type(condition)}")
    return run("where", np.where, (condition, x, y))


def round_(a: ndarray, decimals: int = 0, out: Any = None) -> ndarray:
    return run("round", np.round, (a, decimals), {"out": out})


def get_array_module(*args: Any) -> Any:
    import sys

    return sys.modules["cupy"] if any(isinstance(arg, ndarray) for arg in args) else np


def astype(x: ndarray, dtype: Any, copy: bool = True) -> ndarray:
    return x.astype(dtype, copy=copy)


_OWN: dict[str, Any] = {
    name: getattr(creation, name)
    for name in (
        "empty zeros full ones empty_like zeros_like ones_like full_like arange array asarray "
        "ascontiguousarray asnumpy".split()
    )
}
_OWN |= {name: products.product(name, getattr(np, name)) for name in _BLAS}
_OWN |= {
    "round": round_,
    "around": round_,
    "asanyarray": creation.asarray,
    "ndarray": ndarray,
    "ufunc": ufunc,
}
_OWN |= {"from_dlpack": _missing("from_dlpack"), "fuse": _missing("fuse")}
_OWN |= {"is_available": lambda: True, "einsum": products.einsum, "where": where, "astype": astype}
_OWN |= {"get_array_module": get_array_module}
