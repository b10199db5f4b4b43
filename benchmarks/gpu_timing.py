"""Times on the device by events, and the two ceilings that they are held against.

What is timed is recorded into a CUDA graph of many launches first, so that Python takes no part in it.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gpu_report import Gpu

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROUND = 0.03  # seconds that a round should take at least
MOST = 400  # launches of one graph
COLD = 512 << 20  # bytes that a round should go through: several times an H200's L2 of 60 MB
_DRAWN = 1 << 22  # random numbers; larger arrays repeat them

_SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""


class Timed(NamedTuple):
    """Seconds of one call: the median of the rounds, the lowest and the highest.

    how: "graph", or "eager" if the calls could not be recorded; why: what was said then.
    """

    seconds: float
    lowest: float
    highest: float
    how: str
    why: str = ""


def busy(gpu: Gpu, seconds: float) -> None:
    """Keep the current stream busy for a while: what is enqueued meanwhile runs without gaps."""
    if not gpu.simulated:
        kernel = gpu.cupy.RawKernel(_SPIN, "spin")
        kernel((1,), (1,), (np.int64(round(seconds * 1e9)),))


def random(gpu: Gpu, shape: Any, dtype: Any = BFLOAT16, spread: float = 1.0, seed: int = 0) -> Any:
    """Normal numbers: zeros would be faster than real data."""
    count = int(np.prod(shape))
    part = gpu.cupy.asarray(_drawn(min(count, _DRAWN), np.dtype(dtype), spread, seed))
    x = gpu.cupy.empty(count, dtype)
    for start in range(0, count, len(part)):
        x[start : start + len(part)] = part[: count - start]
    return x.reshape(shape)


@functools.lru_cache(maxsize=32)
def _drawn(count: int, dtype: Any, spread: float, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal(count, np.float32)
    return (drawn * spread).astype(dtype)


def sets_for(nbytes: int) -> int:
    """How many sets of arrays, of so many bytes each, calls have to take in turn to miss the cache."""
    return max(2, min(16, -(-COLD // max(1, nbytes))))


def on_stream(gpu: Gpu) -> Any:
    """A stream of one's own: the null stream cannot be captured."""
    return gpu.cupy.cuda.Stream(non_blocking=True)


class Recorded:
    """Work as a CUDA graph, with the memory that it uses.

    Attributes:
        results: of the work, which the graph writes again each time.
    """

    def __init__(self, gpu: Gpu, work: Callable[[], Any]) -> None:
        cuda = gpu.cupy.cuda
        self.stream = cuda.get_current_stream()
        self.pool = cuda.MemoryPool()
        with cuda.using_allocator(self.pool.malloc):
            self.stream.begin_capture()
            try:
                self.results = work()
            except BaseException:
                with contextlib.suppress(Exception):  # it says that the capture has failed, too
                    self.stream.end_capture()
                self.pool.free_all_blocks()
                raise
            self.graph = self.stream.end_capture()

    def launch(self) -> None:
        self.graph.launch(self.stream)

    def drop(self) -> None:
        """Give the memory back: of a pool that is merely dropped nothing comes back."""
        self.stream.synchronize()
        self.graph = self.results = None
        self.pool.free_all_blocks()


def time_calls(
    gpu: Gpu, calls: Sequence[Callable[[], Any]], rounds: int = 7, graph: bool = True
) -> Timed:
    """How long one of these calls takes, which do the same on different arrays, in turn.

    Args:
        graph: record them; else they are started by Python while the device is kept busy.
    """
    stream = on_stream(gpu)
    gpu.cupy.cuda.Device().synchronize()  # the arrays were made on another stream
    with stream:
        for _ in range(2):  # compiled, planned, and tuned
            for call in calls:
                call()
        stream.synchronize()
        once = _elapsed(gpu, stream, lambda: _sweep(calls, 1))
        sweeps = max(1, min(MOST // len(calls), round(ROUND / max(once, 1e-7))))
        how, why = "graph", ""
        if graph:
            try:
                recorded = Recorded(gpu, lambda: _sweep(calls, sweeps))
            except Exception as error:
                how, why = "eager", f"{type(error).__name__}: {error}"
        if not graph or why:
            how, began = "eager", time.perf_counter()
            _sweep(calls, sweeps)
            host = time.perf_counter() - began
            stream.synchronize()

            def run() -> None:
                _sweep(calls, sweeps)

            times = [_elapsed(gpu, stream, run, ahead=2 * host) for _ in range(rounds)]
        else:
            recorded.launch()
            stream.synchronize()
            times = [_elapsed(gpu, stream, recorded.launch) for _ in range(rounds)]
            recorded.drop()
    each = [seconds / (sweeps * len(calls)) for seconds in times]
    return Timed(statistics.median(each), min(each), max(each), how, why)


def _sweep(calls: Sequence[Callable[[], Any]], times: int) -> Any:
    """Results of a sweep are held until it is over: each call writes to memory of its own."""
    results: list[Any] = []
    for _ in range(times):
        results = [call() for call in calls]
    return results


def _elapsed(gpu: Gpu, stream: Any, run: Callable[[], Any], ahead: float = 0.0) -> float:
    start, stop = gpu.cupy.cuda.Event(), gpu.cupy.cuda.Event()
    if ahead:
        busy(gpu, ahead)
    start.record(stream)
    run()
    stop.record(stream)
    stop.synchronize()
    return float(gpu.cupy.cuda.get_elapsed_time(start, stop)) / 1e3


def copy_bandwidth(gpu: Gpu) -> float:
    """Bytes per second of a large copy on the device, read and written ones counted."""
    count = gpu.size(4 << 30, 1 << 16)
    x = random(gpu, count // 4, np.float32)
    y = gpu.cupy.empty_like(x)
    stream = gpu.cupy.cuda.get_current_stream

    def copy() -> None:
        y.data.copy_from_device_async(x.data, x.nbytes, stream())

    return 2 * x.nbytes / time_calls(gpu, [copy]).seconds


def product_rate(gpu: Gpu) -> float:
    """Floating-point operations per second of a large bfloat16 product of random numbers."""
    from cupytron.kernels import products

    n = gpu.size(8192, 32)
    a, b = random(gpu, (n, n), seed=1), random(gpu, (n, n), seed=2)
    out = gpu.cupy.empty((n, n), BFLOAT16)
    return 2 * n**3 / time_calls(gpu, [lambda: products.matmul(a, b, out=out)]).seconds


class Ceilings(NamedTuple):
    """Bytes per second of a copy, operations per second of a product."""

    bandwidth: float
    rate: float

    def floor(self, nbytes: float, flops: float) -> float:
        """Seconds that no kernel can be much faster than."""
        return max(nbytes / self.bandwidth, flops / self.rate)


def ceilings(gpu: Gpu) -> Ceilings:
    """Both, measured now."""
    return Ceilings(copy_bandwidth(gpu), product_rate(gpu))
