"""What a simulated array is, and how operations on arrays run: now, or recorded by a capture."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from simulated import memory, streams

HALF = ("float16", "bfloat16")


class Core:
    """`_host` is the NumPy view of an array's bytes, `_memory` the allocation that it keeps alive."""

    kind: type["Core"]  # what results are: ndarray

    def __init__(
        self,
        shape: Any,
        dtype: Any = float,
        memptr: memory.MemoryPointer | None = None,
        strides: Any = None,
        order: str = "C",
    ) -> None:
        dtype = np.dtype(dtype)
        shape = (int(shape),) if isinstance(shape, int | np.integer) else tuple(map(int, shape))
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if memptr is None:
            memptr = memory.alloc(size)
        room = (
            memptr.bytes(size) if strides is None else memptr.bytes(_reach(shape, strides, dtype))
        )
        if strides is None:
            self._host = np.ndarray(shape, dtype, buffer=room, order=order)
        else:
            self._host = np.ndarray(shape, dtype, buffer=room, strides=strides)
        self._memory = memptr.mem

    @staticmethod
    def _view(host: np.ndarray, memory_: memory.Memory) -> Any:
        array = Core.kind.__new__(Core.kind)
        array._host, array._memory = host, memory_
        return array

    @property
    def dtype(self) -> Any:
        return self._host.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._host.shape

    @shape.setter
    def shape(self, shape: Any) -> None:
        view = self._host.reshape(shape)
        if not np.shares_memory(view, self._host):
            raise AttributeError("incompatible shape")
        self._host = view

    strides = property(lambda self: self._host.strides)
    size = property(lambda self: self._host.size)
    ndim = property(lambda self: self._host.ndim)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)

    @property
    def flags(self) -> "Flags":
        return Flags(self._host.flags)

    @property
    def data(self) -> memory.MemoryPointer:
        if self._memory.ptr == 0:
            return memory.MemoryPointer(self._memory, 0)
        return memory.MemoryPointer(self._memory, self._host.ctypes.data - self._memory.ptr)

    @property
    def device(self) -> Any:
        return self._memory.device

    def __len__(self) -> int:
        return len(self._host)


class Flags:
    """c_contiguous, f_contiguous and owndata of an array."""

    def __init__(self, flags: Any) -> None:
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.forc = self.c_contiguous or self.f_contiguous
        self.fnc = self.f_contiguous and not self.c_contiguous
        self.owndata = False

    def __getitem__(self, name: str) -> bool:
        return getattr(self, name.lower())


def refuse_host_arrays(value: Any) -> None:
    """Raise CuPy's error if there is a NumPy array anywhere in `value`."""
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, list | tuple):
        for part in value:
            refuse_host_arrays(part)


def strip(value: Any, found: list[Core]) -> Any:
    """`value` with the NumPy views in the place of simulated arrays, which are added to `found`."""
    if isinstance(value, Core):
        found.append(value)
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, list | tuple):
        parts = [strip(part, found) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def run(
    name: str, function: Callable[..., Any], args: Any, kwargs: dict[str, Any] | None = None
) -> Any:
    """function(*args, **kwargs) over the NumPy views of its simulated arrays.

    Results are new simulated arrays, or views if NumPy made a view. With out=, nothing is new.
    """
    kwargs = dict(kwargs or {})
    found: list[Core] = []
    out = kwargs.get("out")
    if out is None:
        kwargs.pop("out", None)
    host_args, host_kwargs = (
        strip(tuple(args), found),
        {k: strip(v, found) for k, v in kwargs.items()},
    )
    if out is not None:
        outs = out if isinstance(out, tuple) else (out,)
        for array in outs:
            if not isinstance(array, Core):
                raise TypeError(f"output must be a cupy.ndarray, not {type(array)}")
        issue_quiet(name, lambda: function(*host_args, **host_kwargs), found, outs)
        return out

    def compute() -> Any:
        with np.errstate(all="ignore"):
            return function(*host_args, **host_kwargs)

    if not streams.capturing():
        return _adopt(name, compute(), compute, found)
    try:
        return _adopt(name, compute(), compute, found)
    except IndexError:  # nothing has run yet: the indices are not there
        with np.errstate(all="ignore"):
            result = function(*map(_any_indices, host_args), **host_kwargs)
        return _adopt(name, result, compute, found)


def issue_quiet(name: str, action: Callable[[], Any], reads: Any, writes: Any) -> None:
    """streams.issue without NumPy's warnings."""

    def quiet() -> None:
        with np.errstate(all="ignore"):
            action()

    streams.issue(name, quiet, reads, writes)


def to_device(name: str, array: Core, host: np.ndarray, stream: Any = None) -> None:
    """Copy from the host, which nothing that captures may do."""
    target = stream or streams.get_current_stream()
    if streams.capturing(target):
        raise RuntimeError(
            f"{name} copies from the host, and the current stream is capturing, so synchronous API "
            "calls are disallowed"
        )
    view = array._host
    streams.issue("h2d", lambda: np.copyto(view, host), [], [array], target, kind="copy")


def _adopt(name: str, result: Any, compute: Callable[[], Any], found: list[Core]) -> Any:
    """The arrays of a result; those that are no views get their numbers now, or whenever a graph runs."""
    new: list[Core] = []
    places = [(array._memory.ptr, array._memory.size) for array in found]
    wrapped = _wrap(result, found, new)
    if new:
        hosts = [array._host for array in new]  # no references: a graph keeps no memory alive
        fresh = None if streams.capturing() else result

        def action() -> None:
            leaves = list(_leaves(compute() if fresh is None else fresh, places))
            for host, leaf in zip(hosts, leaves, strict=True):
                host[...] = leaf

        streams.issue(name, action, found, new)
    return wrapped


def _wrap(result: Any, found: list[Core], new: list[Core]) -> Any:
    if isinstance(result, np.ndarray | np.generic):
        for array in found:
            if _is_view(result, array._memory.ptr, array._memory.size):
                return Core._view(result, array._memory)
        result = np.asarray(result)
        array = Core.kind(result.shape, result.dtype, strides=_dense(result))
        new.append(array)
        return array
    if isinstance(result, list | tuple):
        parts = [_wrap(part, found, new) for part in result]
        if hasattr(result, "_fields"):
            return type(result)(*parts)
        return parts if isinstance(result, list) else tuple(parts)
    return result


def _leaves(result: Any, places: list[tuple[int, int]]) -> Iterable[Any]:
    """The new arrays of a result, in the order of _wrap."""
    if isinstance(result, np.ndarray | np.generic):
        if not any(_is_view(result, *place) for place in places):
            yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _leaves(part, places)


def _is_view(result: Any, ptr: int, size: int) -> bool:
    if not isinstance(result, np.ndarray):
        return False
    return result.size == 0 or ptr <= result.ctypes.data < ptr + size


def _dense(host: np.ndarray) -> Any:
    """Strides of the array that NumPy would make for K order, None for C order."""
    if host.flags.c_contiguous or host.size == 0:
        return None
    order = sorted(range(host.ndim), key=lambda dim: -abs(host.strides[dim]))
    strides, step = [0] * host.ndim, host.itemsize
    for dim in reversed(order):
        strides[dim] = step
        step *= host.shape[dim]
    return strides


def _reach(shape: tuple[int, ...], strides: Any, dtype: Any) -> int:
    if 0 in shape:
        return 0
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.ctypes.data, a.shape, a.strides, a.dtype) == (
        b.ctypes.data,
        b.shape,
        b.strides,
        b.dtype,
    )


def _assign(host: np.ndarray, value: Any) -> None:
    host[...] = value


def _any_indices(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return np.zeros_like(value)
    return value
