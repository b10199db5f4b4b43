"""Try a function on copies of a running computation's arrays: are its results right, how long does it take?

Nothing that the computation holds is written: every try works on copies that lie in memory as the originals
do, packed q, k and v side by side as well.
"""

import contextlib
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cupytron import backend

# the largest error relative to the largest value, by the coarsest dtype among the arguments
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "tf32": 5e-3, "float16": 2e-2, "bfloat16": 2e-2}
FLUSH = 256 << 20  # bytes, several times a GPU's L2 cache
AHEAD = 4  # times that they are written, 0.3 ms: longer than Python takes to enqueue an operation
HOPELESS = 20  # times the fastest one's seconds
_SLICE = 1 << 22  # elements that are compared at once, in float64


def leaves(value: Any) -> Iterator[Any]:
    """What stands in nested tuples and lists, in order, without None."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)
    elif value is not None:
        yield value


def arrays(value: Any) -> list[Any]:
    """The arrays among the leaves."""
    return [x for x in leaves(value) if _is_array(x)]


def array_module(arguments: Any) -> Any:
    """CuPy if any array among the arguments is on a GPU, else NumPy."""
    return next((xp for x in arrays(arguments) if (xp := backend.array_module(x)) is not np), np)


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) or backend.array_module(x) is not np


def layout(x: Any) -> str:
    """How an array lies in memory: "" by rows, "T" by columns, "rows" with gaps between rows, "strided"."""
    if x.flags.c_contiguous:
        return ""
    if x.flags.f_contiguous:
        return "T"
    return "rows" if x.strides[-1] == x.itemsize else "strided"


def copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with copies of all arrays.

    A copy has its original's strides, and arrays that lie among each other, such as q, k and v in one
    packed array, do so in the copies.
    """
    copies: dict[int, Any] = {}
    for group in _overlapping(arrays(arguments)):
        copies.update(_copied_group(group))

    def replaced(x: Any) -> Any:
        if isinstance(x, tuple | list):
            parts = [replaced(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
        return copies.get(id(x), x)

    return replaced(arguments)


def _span(x: Any) -> tuple[int, int]:
    """Addresses of an array's first byte and of the one after its last."""
    host = isinstance(x, np.ndarray)
    first = x.__array_interface__["data"][0] if host else x.data.ptr
    reach = [(n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True)]
    low, high = (sum(r for r in reach if (r > 0) == up) for up in (False, True))
    return first + low, first + high + x.itemsize


def _overlapping(found: list[Any]) -> Iterator[list[Any]]:
    """Arrays in groups that share memory, or lie among each other."""
    group: list[Any] = []
    end = -1
    for x in sorted((x for x in found if x.size), key=_span):
        low, high = _span(x)
        if group and low >= end:
            yield group
            group, end = [], -1
        group.append(x)
        end = max(end, high)
    if group:
        yield group


def _copied_group(group: list[Any]) -> dict[int, Any]:
    """Copies by id of the original."""
    xp = backend.array_module(group[0])
    low, high = min(_span(x)[0] for x in group), max(_span(x)[1] for x in group)
    offsets = {id(x): _span(x)[0] - low for x in group}
    descending = any(stride < 0 for x in group for stride in x.strides)
    misaligned = any(offsets[id(x)] % x.itemsize for x in group)
    alone = len(offsets) == 1 and not layout(group[0])
    if alone or descending or misaligned:
        return {id(x): x.copy() for x in group}
    room = xp.empty(high - low, np.uint8)
    copies = {}
    for x in group:
        copies[id(x)] = _view(xp, room, offsets[id(x)], x)
        copies[id(x)][...] = x
    return copies


def _view(xp: Any, room: Any, offset: int, like: Any) -> Any:
    """An array in bytes of another one."""
    if xp is np:
        return np.ndarray(like.shape, like.dtype, room, offset, like.strides)
    return xp.ndarray(like.shape, like.dtype, room.data + offset, like.strides)


def tolerance(arguments: Any, tf32: bool = False) -> float:
    """What results computed from these arguments may differ by, relative to the largest.

    Args:
        tf32: whether float32 is multiplied as TF32, with 10 bits of fraction.
    """
    dtypes = [x.dtype.name for x in arrays(arguments)]
    if tf32 and "float32" in dtypes:
        dtypes.append("tf32")
    return max((TOLERANCE.get(name, 0.0) for name in dtypes), default=0.0)


def disagreement(found: Any, wanted: Any, allowed: float) -> str | None:
    """None if results are equal but for rounding, else how they differ.

    Args:
        found, wanted: arrays and numbers, nested in tuples or not.
        allowed: max|found - wanted| / max|wanted|, of each array.
    """
    xp = array_module((found, wanted))
    mine, theirs = list(leaves(found)), list(leaves(wanted))
    if len(mine) != len(theirs):
        return f"it returns {len(mine)} results, the reference {len(theirs)}"
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        which = f"result {number}" if len(theirs) > 1 else "its result"
        if np.shape(a) != np.shape(b):
            return f"{which} has shape {np.shape(a)}, the reference's {np.shape(b)}"
        # a loss may be a number here and a 0-d array there
        if np.shape(b) and a.dtype != b.dtype:
            return f"{which} is {a.dtype}, the reference's {b.dtype}"
        worst, largest = _difference(xp, a, b)
        if not worst <= allowed * largest:
            error = worst / largest if largest else math.inf
            return (
                f"{which} differs from the reference's by {error:.1e} of its largest value, "
                f"and {allowed:.0e} is allowed"
            )
    return None


def _difference(xp: Any, a: Any, b: Any) -> tuple[float, float]:
    """max|a - b| and max|b|; equal infinities, and NaNs at equal places, do not differ."""
    a, b = xp.asarray(a).reshape(-1), xp.asarray(b).reshape(-1)
    worst = largest = 0.0
    for start in range(0, b.size, _SLICE):
        x, y = (c[start : start + _SLICE].astype(np.float64) for c in (a, b))
        with np.errstate(invalid="ignore"):
            same = (x == y) | (xp.isnan(x) & xp.isnan(y))
            away = xp.where(same, 0.0, xp.abs(x - y))
        away = xp.where(xp.isnan(away), math.inf, away)
        worst = max(worst, float(away.max()))
        largest = max(largest, float(xp.where(xp.isfinite(y), xp.abs(y), 0.0).max()))
    return worst, largest


def reason(error: Exception) -> str:
    """An error in one line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def apart(xp: Any) -> Iterator[None]:
    """On a GPU: memory from a pool of its own, given back at the end; the current one may be a graph's."""
    if xp is np:
        yield
        return
    pool = xp.cuda.MemoryPool()
    try:
        with xp.cuda.using_allocator(pool.malloc):
            yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold what has been allocated
        raise
    finally:
        pool.free_all_blocks()  # of a pool that is dropped nothing would come back


def not_captured(xp: Any, call: Callable[[], Any]) -> str | None:
    """None if a call can be recorded in a CUDA graph, else why not. Nothing is computed."""
    # libraries keep workspaces for each stream: no other one is made for this
    stream = xp.cuda.get_current_stream()
    why = None
    stream.begin_capture()
    try:
        call()
    except Exception as error:
        if backend.is_shortage(error):
            with contextlib.suppress(Exception):
                stream.end_capture()
            raise
        why = reason(error)
    try:
        stream.end_capture()
    except Exception as error:
        why = why or reason(error)
    return why and f"it cannot be captured into a graph: {why}"


def hopeless(calls: dict[str, Callable[[], Any]], xp: Any) -> dict[str, str]:
    """Calls that are so slow that it is not worth to measure them, and why; each has run before.

    The reference's attention is thousands of launches.
    """
    stream = xp.cuda.get_current_stream()

    def once(call: Callable[[], Any]) -> float:
        stream.synchronize()
        began = time.perf_counter()
        call()
        stream.synchronize()
        return time.perf_counter() - began

    took: dict[str, float] = {}
    for name, call in calls.items():
        with contextlib.suppress(Exception):  # `seconds` will say it
            took[name] = once(call)
    limit = HOPELESS * min(took.values(), default=0.0)
    suspects = [name for name, seconds in took.items() if seconds > limit]
    found = {}
    for name in suspects:
        with contextlib.suppress(Exception):
            seconds = min(took[name], once(calls[name]))  # it may have been disturbed
            if seconds > limit:
                found[name] = f"it takes {seconds:.1e} s, the fastest {limit / HOPELESS:.1e} s"
    return found


def seconds(
    calls: dict[str, Callable[[], Any]], warmup: int, rounds: int, xp: Any
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of calls, measured in turn, so that a change of the clock concerns all of them.

    Returns: the times, and for calls that raised why.
    """
    clock = _host_seconds if xp is np else _device_clock(xp)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                took = clock(call)
            except Exception as error:
                if backend.is_shortage(error):
                    raise
                failed[name] = reason(error)
                continue
            if number >= warmup:
                taken[name].append(took)
    return {n: statistics.median(t) for n, t in taken.items() if n not in failed}, failed


def _host_seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _device_clock(xp: Any) -> Callable[[Callable[[], Any]], float]:
    start, stop = xp.cuda.Event(), xp.cuda.Event()
    # in a step an operation finds little of its input in the cache; and while the device writes this,
    # Python has the time to enqueue the call, whose launches are then not part of the measurement
    other = xp.empty(FLUSH, np.uint8)

    def clock(call: Callable[[], Any]) -> float:
        for _ in range(AHEAD):
            other.fill(0)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(xp.cuda.get_elapsed_time(start, stop)) / 1e3

    return clock
