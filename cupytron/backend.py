"""Where arrays are and which library they belong to; loops over slices that fit the cache."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

# Elements of a slice: a few float32 arrays of this size fit a core's L2 cache.
BLOCK = 1 << 15


def array_module(array: Any) -> ModuleType:
    """NumPy or CuPy, whichever `array` belongs to; CuPy is never imported here."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    return np


_NOTHING = contextlib.nullcontext()


class Device:
    """Where a rank computes: here the CPU; gpu.GPU is the other one.

    Attributes:
        xp: NumPy or CuPy. gpu: whether it is a GPU. name: for messages.
        transport: how its arrays reach other ranks, in words. places: all ranks' devices.
    """

    xp: Any = np
    gpu = False
    name = "cpu"
    transport = ""
    places: tuple[str, ...] | list[str] = ()

    def put(self, x: Any) -> Any:
        """A host array, here; itself if this is the host."""
        return x

    def versions(self) -> dict[str, str]:
        """Of what results on it may depend on, for a run's record."""
        return {}

    def refusals(self) -> list[str]:
        """Why a faster library has not been used in this process, for a run's record."""
        return []

    def range(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Name what the host starts while this lasts, for a profiler of the device; a CPU has none."""
        return _NOTHING


CPU = Device()


def to_host(x: Any) -> np.ndarray:
    """An array as NumPy's; waits for a GPU."""
    return np.asarray(x) if array_module(x) is np else x.get()


def named_dtype(name: str) -> np.dtype:
    """The dtype of a name, bfloat16 among them."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def is_half(dtype: Any) -> bool:
    """Whether a dtype is a 16-bit float: float16 or bfloat16."""
    return dtype.itemsize == 2 and dtype.kind not in "iu"


def at_least_float32(dtype: Any) -> Any:
    """The dtype of sums, statistics and parameters' gradients where activations have this one."""
    return np.dtype(np.float32) if is_half(dtype) else dtype


def for_slices(xp: ModuleType, body: Callable[[slice], None], length: int, block: int) -> None:
    """Call `body` on slices of `block` that cover 0 ... length; on a GPU on one slice.

    A chain of NumPy operations over a large array reads and writes memory at each of them; over one
    slice after the other it stays in the cache.
    """
    step = length if xp is not np else max(1, block)
    for start in range(0, length, max(1, step)):
        body(slice(start, min(start + step, length)))


@functools.cache
def _blas() -> Any:
    """BLAS libraries in this process, as threadpoolctl knows them."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas").lib_controllers


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS with one thread, for many small products.

    Sharing out a product of 50 microseconds brings little, and costs a lot if the other thread has to
    wait for its core.
    """
    _one_thread.enter()
    try:
        yield
    finally:
        _one_thread.leave()


class _OneThread:
    """Several threads may ask for one BLAS thread at once; in the end the number is what it was.

    OpenBLAS keeps the number for the process and for each thread that has set it, so each sets it for
    itself, to what it was before the first of them came.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[int] = []

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = [library.get_num_threads() for library in _blas()]
            self._users += 1
            if max(self._before, default=1) > 1:  # a rank with one core has nothing to do here
                for library in _blas():
                    library.set_num_threads(1)

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if max(self._before, default=1) > 1:
                for library, count in zip(_blas(), self._before, strict=True):
                    library.set_num_threads(count)


_one_thread = _OneThread()


def slice_count(xp: ModuleType, length: int, block: int) -> int:
    """How many slices for_slices makes."""
    return min(1, length) if xp is not np else -(-length // max(1, block))


def rows_per_block(width: int) -> int:
    """Rows of `width` elements in a slice of about BLOCK elements."""
    return max(1, BLOCK // max(1, width))


# what CuPy's pools, the runtime, the driver and libraries say of it
_SHORTAGE = (
    "Out of memory allocating",
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "ALLOC_FAILED",
    # cuBLAS and cuDNN say these if a kernel cannot have its workspace or its stack
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_EXECUTION_FAILED",
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that the device has too little memory."""
    return any(words in str(error) for words in _SHORTAGE)
