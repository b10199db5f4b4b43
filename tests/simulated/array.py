"""ndarray: as strict about NumPy as CuPy's is."""

from typing import Any

import numpy as np

from simulated import streams
from simulated.core import (
    Core,
    _assign,
    _same_bytes,
    issue_quiet,
    refuse_host_arrays,
    run,
    strip,
    to_device,
)


class ndarray(Core):
    """As cupy.ndarray."""

    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    T = property(lambda self: ndarray._view(self._host.T, self._memory))
    mT = property(lambda self: ndarray._view(self._host.mT, self._memory))
    real = property(lambda self: run("real", np.real, (self,)))
    imag = property(lambda self: run("imag", np.imag, (self,)))
    flat = property(lambda self: self.ravel())

    def __iter__(self) -> Any:
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    # ---- to the host --------------------------------------------------------------------------------

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> np.ndarray:
        target = stream or streams.get_current_stream()
        if target.is_capturing():
            streams.host_waits("ndarray.get", target)
        if out is not None:
            if not isinstance(out, np.ndarray) or isinstance(out, ndarray):
                raise TypeError(
                    f"Only numpy.ndarray can be obtained from cupy.ndarray, not {type(out)}"
                )
            if out.dtype != self.dtype:
                raise TypeError(f"{self.dtype} array cannot be obtained from {out.dtype} array")
            if out.shape != self.shape:
                raise ValueError(
                    f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}"
                )
            if not (out.flags.c_contiguous or out.flags.f_contiguous):
                raise RuntimeError("`out` must be contiguous")
        else:
            out = np.empty(self.shape, self.dtype, order="F" if order == "F" else "C")
        host = self._host
        streams.issue("d2h", lambda: np.copyto(out, host), [self], stream=target, kind="copy")
        if blocking:
            streams.host_waits("ndarray.get", target)
        return out

    def set(self, arr: Any, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not (self._host.flags.c_contiguous or self._host.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        to_device("ndarray.set", self, arr, stream)

    def item(self, *index: Any) -> Any:
        return self._scalar("item").item(*index)

    def tolist(self) -> Any:
        return self._scalar("tolist").tolist()

    def tobytes(self, order: str = "C") -> bytes:
        return self._scalar("tobytes").tobytes(order)

    def _scalar(self, what: str) -> np.ndarray:
        """The values, on the host, which waits for them."""
        stream = streams.get_current_stream()
        if not stream.is_capturing():
            streams.issue("d2h", lambda: None, [self], kind="copy")
        streams.host_waits(f"ndarray.{what}", stream)
        return self._host

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError("The truth value of an array with more than one element is ambiguous.")
        return bool(self._scalar("__bool__"))

    def __int__(self) -> int:
        return int(self._scalar("__int__").item())

    def __float__(self) -> float:
        return float(self._scalar("__float__").item())

    def __complex__(self) -> complex:
        return complex(self._scalar("__complex__").item())

    def __repr__(self) -> str:
        return repr(self._scalar("__repr__"))

    def __str__(self) -> str:
        return str(self._scalar("__str__"))

    def __format__(self, spec: str) -> str:
        return format(self._scalar("__format__")[()] if self.ndim == 0 else self._host, spec)

    def __reduce__(self) -> Any:
        return _from_host, (self._scalar("__reduce__").copy(),)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a "
            "NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        from simulated import functions

        if method != "__call__":
            return NotImplemented
        out = kwargs.get("out")
        if isinstance(out, tuple) and len(out) == 1:
            kwargs["out"] = out[0]
        return functions.lookup(ufunc.__name__)(*inputs, **kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from simulated import functions

        name = function.__name__
        if function is not getattr(np, name, None):
            return NotImplemented
        return functions.lookup(name)(*args, **kwargs)

    # ---- views and copies ---------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> "ndarray":
        index = index if isinstance(index, tuple) else (index,)
        if all(_is_basic(part) for part in index):
            if not any(part is Ellipsis for part in index):
                index = (*index, Ellipsis)  # a view, also of one element
            return self._view(self._host[index], self._memory)
        parts = [_index_part(part) for part in index]
        if any(isinstance(part, ndarray) and part.dtype == bool for part in parts):
            streams.host_waits("indexing with a boolean mask")
        return run("getitem", lambda host, *p: host[p], (self, *parts))

    def __setitem__(self, index: Any, value: Any) -> None:
        index = index if isinstance(index, tuple) else (index,)
        refuse_host_arrays(value)
        if isinstance(value, list | tuple):
            raise TypeError(f"Unsupported type {type(value)}")
        source = value._host if isinstance(value, ndarray) else value
        reads = [value] if isinstance(value, ndarray) else []
        if all(_is_basic(part) for part in index):
            target = self[index]
            host = target._host
            if isinstance(value, ndarray) and _same_bytes(host, source):
                return  # x[i] += y has written there already
            if isinstance(source, np.ndarray):
                np.broadcast_to(source, host.shape)  # raises ValueError if it does not fit
            issue_quiet("setitem", lambda: _assign(host, source), reads, [target])
            return
        parts = [_index_part(part) for part in index]
        masked = any(isinstance(part, ndarray) and part.dtype == bool for part in parts)
        if masked and isinstance(value, ndarray) and value.ndim > 0:
            streams.host_waits("setting values behind a boolean mask")
        host = self._host
        reads += [part for part in parts if isinstance(part, ndarray)]
        plain = tuple(part._host if isinstance(part, ndarray) else part for part in parts)
        issue_quiet("setitem", lambda: host.__setitem__(plain, source), reads, [self])

    def astype(
        self,
        dtype: Any,
        order: str = "K",
        casting: Any = None,
        subok: Any = None,
        copy: bool = True,
    ) -> "ndarray":
        if not copy and self.dtype == np.dtype(dtype):
            return self
        return run("astype", lambda host: host.astype(dtype, order=order), (self,))

    def copy(self, order: str = "C") -> "ndarray":
        return run("copy", lambda host: host.copy(order), (self,))

    __copy__ = copy

    def __deepcopy__(self, memo: Any) -> "ndarray":
        return self.copy()

    def view(self, dtype: Any = None, *args: Any, **kwargs: Any) -> "ndarray":
        if dtype is None:
            return self._view(self._host.view(), self._memory)
        return self._view(self._host.view(dtype), self._memory)

    def reshape(self, *shape: Any, order: str = "C") -> "ndarray":
        if len(shape) == 1 and not isinstance(shape[0], int | np.integer):
            shape = tuple(shape[0])
        return run("reshape", lambda host: host.reshape(shape, order=order), (self,))

    def transpose(self, *axes: Any) -> "ndarray":
        return self._view(self._host.transpose(*axes), self._memory)

    def ravel(self, order: str = "C") -> "ndarray":
        return run("ravel", lambda host: host.ravel(order), (self,))

    def flatten(self, order: str = "C") -> "ndarray":
        return run("flatten", lambda host: host.flatten(order), (self,))

    def reduced_view(self, dtype: Any = None) -> "ndarray":
        return self.ravel() if self._host.flags.c_contiguous else self

    def compress(self, condition: Any, axis: int | None = None, out: Any = None) -> "ndarray":
        from simulated import functions

        return functions.lookup("compress")(condition, self, axis, out)

    # ---- in place -----------------------------------------------------------------------------------

    def fill(self, value: Any) -> None:
        self[...] = value

    def sort(self, axis: int = -1, kind: Any = None) -> None:
        streams.host_waits("sort")
        host = self._host
        issue_quiet("sort", lambda: host.sort(axis), [], [self])

    def partition(self, kth: Any, axis: int = -1) -> None:
        streams.host_waits("partition")
        host = self._host
        issue_quiet("partition", lambda: host.partition(kth, axis), [], [self])

    def put(self, indices: Any, values: Any, mode: str = "wrap") -> None:
        refuse_host_arrays([indices, values])
        host, (where, what) = self._host, (strip(indices, []), strip(values, []))
        issue_quiet("put", lambda: np.put(host, where, what, mode), [], [self])

    def scatter_add(self, slices: Any, value: Any) -> None:
        if self.dtype.name == "bfloat16":
            raise TypeError("scatter_add is not supported for bfloat16 (CuPy 14.2)")
        reads: list[ndarray] = []
        host, where, what = self._host, strip(slices, reads), strip(value, reads)
        issue_quiet("scatter_add", lambda: np.add.at(host, where, what), reads, [self])


Core.kind = ndarray


def _from_host(host: np.ndarray) -> ndarray:
    array = ndarray(host.shape, host.dtype)
    to_device("array", array, host)
    return array


def _is_basic(part: Any) -> bool:
    if isinstance(part, bool):
        return False
    return part is None or part is Ellipsis or isinstance(part, int | np.integer | slice)


def _index_part(part: Any) -> Any:
    """An index on the device; what comes from the host is copied, as CuPy does it."""
    if isinstance(part, list | np.ndarray):
        return _from_host(np.asarray(part))
    return part


# ---- methods that NumPy's arrays have, too ------------------------------------------------------

_METHODS = (
    "all any argmax argmin argpartition argsort choose clip conj conjugate cumprod cumsum "
    "diagonal dot max mean min nonzero prod ptp repeat round searchsorted squeeze std sum swapaxes take "
    "trace var"
).split()
_OPERATORS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "power",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "lshift": "left_shift",
    "rshift": "right_shift",
    "matmul": "matmul",
    "divmod": "divmod",
}
_COMPARISONS = {
    "eq": "equal",
    "ne": "not_equal",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
_UNARY = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}


def _call(name: str, swapped: bool = False, in_place: bool = False) -> Any:
    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        from simulated import functions

        function = functions.lookup(name)
        if swapped:
            return function(args[0], self)
        if in_place:
            return function(self, *args, out=self)
        return function(self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in _METHODS:
    setattr(ndarray, _name, _call(_name))
for _operator, _name in _OPERATORS.items():
    setattr(ndarray, f"__{_operator}__", _call(_name))
    setattr(ndarray, f"__r{_operator}__", _call(_name, swapped=True))
    if _operator not in ("matmul", "divmod"):
        setattr(ndarray, f"__i{_operator}__", _call(_name, in_place=True))
for _operator, _name in {**_COMPARISONS, **_UNARY}.items():
    setattr(ndarray, f"__{_operator}__", _call(_name))
