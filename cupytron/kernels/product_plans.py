"""Which of cuBLASLt's algorithms runs which product: timed once, or taken over from another process.

A choice decides about the last bits of a result. Processes that have to agree on them take over one's
`choices()`, or do without timing.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from cupytron import backend
from cupytron.kernels.cublaslt import Plan, Problem, current_stream

_ROUNDS, _REPEATS = 3, 4
_COVER = 256 << 20  # bytes
_TIE = 1.02  # timings closer than this are noise, and the library's order decides

_plans: dict[tuple[int, Problem], Plan] = {}  # by device
_choices: dict[str, int] = {}
_timing = True
_lock = threading.RLock()  # ranks may be threads


def set_timing(on: bool) -> None:
    """Whether the algorithms of undecided problems are timed; meanwhile the library's favourite is used.

    Nothing is timed while a graph is captured: run a step before that.
    """
    global _timing
    _timing = on


def choices() -> dict[str, int]:
    """The algorithms that were chosen by timing or by set_choices: key of a problem -> index."""
    return dict(_choices)


def set_choices(chosen: dict[str, int]) -> None:
    """Use these algorithms from now on; for an index that the library does not offer, its favourite."""
    with _lock:
        _choices.update(chosen)
        for plan in _plans.values():
            _take_choice(plan)


def plan(problem: Problem) -> Plan:
    """The problem's plan on the current device, the same one each time."""
    import cupy

    place = (cupy.cuda.runtime.getDevice(), problem)
    with _lock:
        if place not in _plans:
            _plans[place] = Plan(problem)
            _take_choice(_plans[place])
        return _plans[place]


def choose(plan: Plan, a: int, b: int, d: int, bias: int, scratch: int = 0) -> None:
    """Time the algorithms of a plan, if nobody has, and take the fastest.

    Args:
        a, b, d, bias: addresses, as for Plan.run; D is written to.
        scratch: if not 0, so many bytes are used in D's place; if there is no room, nothing is timed.
    """
    import cupy

    with _lock:
        if plan.decided or not _timing or current_stream().is_capturing():
            return
        try:
            spare = cupy.zeros(scratch, "uint8")
            target = spare.data.ptr if scratch else d
            with _cover() as cover:
                _choices[plan.problem.key] = _fastest(plan, (a, b, target, bias), cover)
        except Exception as error:
            if not backend.is_shortage(error):
                raise
            plan.decided = True
            return
        _take_choice(plan)


def _take_choice(plan: Plan) -> None:
    index = _choices.get(plan.problem.key, 0)
    plan.algorithm = index if 0 <= index < plan.count else 0
    plan.decided = plan.problem.key in _choices


@contextlib.contextmanager
def _cover() -> Iterator[Callable[[], None]]:
    """A function that keeps the device busy while Python enqueues work, if there is memory for it."""
    import cupy

    pool = cupy.cuda.MemoryPool()  # not the current one: that may be a graph's
    try:
        room = pool.malloc(_COVER)
    except cupy.cuda.memory.OutOfMemoryError:  # short products are then timed at Python's pace
        room = None
    try:
        yield lambda: room and room.memset_async(0, _COVER, current_stream())
    finally:
        room = None
        pool.free_all_blocks()  # of a pool that is dropped nothing would come back


def _fastest(plan: Plan, pointers: tuple[int, int, int, int], cover: Callable[[], None]) -> int:
    """Index of the algorithm that takes the least time on the current stream; waits for it.

    Args:
        cover: called before each measurement.
    """
    import cupy

    stream: Any = current_stream()
    fit = []
    for index in range(plan.count):
        try:
            plan.run(*pointers, algorithm=index)  # the first launch loads the kernel
        except Exception as error:
            if backend.is_shortage(error):
                raise
            continue  # heuristics may offer what the library then refuses
        fit.append(index)
    times = [float("inf")] * plan.count
    for _ in range(_ROUNDS):
        for index in fit:
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            cover()
            start.record(stream)
            for _ in range(_REPEATS):
                plan.run(*pointers, algorithm=index)
            stop.record(stream)
            stop.synchronize()
            times[index] = min(times[index], cupy.cuda.get_elapsed_time(start, stop))
    limit = _TIE * min(times)
    return next(index for index, time in enumerate(times) if time <= limit)  # 0 if none is fit


def forget() -> None:
    """Let go of plans and choices."""
    _plans.clear()
    _choices.clear()
