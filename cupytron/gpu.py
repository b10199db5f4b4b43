"""A GPU as the device of a rank. CuPy is imported here and below, and only once a GPU is asked for."""

import contextlib
import ctypes
import importlib.util
import os
import weakref
from collections.abc import Iterator
from typing import Any

from cupytron.backend import CPU, Device
from cupytron.errors import CupytronError
from cupytron.launcher import local_rank

INSTALL = "pip install 'cupytron[cuda13]', or [cuda12] for drivers of CUDA 12"


class GPU(Device):
    """One GPU, with a stream on which this thread's work runs in order.

    Attributes:
        number: as CUDA counts.
        stream: of this rank's computation: the thread's current one, unless that is a default stream.
        graphs: recorded work that is in use (graph.Graph), with memory pools of its own.
    """

    gpu = True

    def __init__(self, cupy: Any, number: int) -> None:
        self.xp = cupy
        self.number = number
        cupy.cuda.Device(number).use()
        properties = cupy.cuda.runtime.getDeviceProperties(number)
        self.model = properties["name"].decode()
        self.memory = int(properties["totalGlobalMem"])
        self.name = f"cuda:{number} ({self.model})"
        self.stream = cupy.cuda.get_current_stream()
        if self.stream.ptr in (cupy.cuda.Stream.null.ptr, cupy.cuda.Stream.ptds.ptr):
            # the default streams wait for others, and cannot be captured
            self.stream = cupy.cuda.Stream(non_blocking=True)
            self.stream.use()
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def put(self, x: Any) -> Any:
        """A host array, here; an array that is here stays."""
        return self.xp.asarray(x)

    def versions(self) -> dict[str, str]:
        """Of what results on it may depend on, for a run's record."""
        runtime = self.xp.cuda.runtime
        return {
            "gpu": self.model,
            "cupy": self.xp.__version__,
            "cuda_driver": str(runtime.driverGetVersion()),
            "cuda_runtime": str(runtime.runtimeGetVersion()),
        }

    def refusals(self) -> list[str]:
        """Why attention in 16 bits has not used cuDNN in this process."""
        from cupytron import kernels

        return kernels.refusals()

    @property
    def bus(self) -> str:
        """Its place on the node's bus, the same for all processes; numbers may differ."""
        return str(self.xp.cuda.Device(self.number).pci_bus_id)

    def used_bytes(self) -> int:
        """Bytes that this process has taken from the GPU for arrays; pools give nothing back."""
        pools = [self.xp.get_default_memory_pool(), *(graph.pool for graph in self.graphs)]
        return sum(int(pool.total_bytes()) for pool in pools)

    def free_bytes(self) -> int:
        """Bytes of the GPU that nobody has taken."""
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """An NVTX range, which Nsight Systems shows above the kernels that are started in it."""
        nvtx = self.xp.cuda.nvtx
        nvtx.RangePush(name)
        try:
            yield
        finally:
            nvtx.RangePop()


def present() -> bool:
    """Whether there is a driver with a GPU, and CuPy is installed; imports nothing."""
    return importlib.util.find_spec("cupy") is not None and _count_by_driver() > 0


def uses_gpu(wish: str) -> bool:
    """Whether open_device would take a GPU; "cuda" is taken at its word."""
    return wish == "cuda" or (wish == "auto" and present())


def idle(wish: str) -> bool:
    """Whether a GPU is there that "auto" cannot use, since there is no CuPy."""
    return wish == "auto" and importlib.util.find_spec("cupy") is None and _count_by_driver() > 0


def _count_by_driver() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def open_device(wish: str = "auto", config: Any = None) -> Device:
    """The device that this rank computes on; a GPU's kernels take their places in ops.

    Ranks of a node take its GPUs in turn, by local rank.

    Args:
        wish: "cpu", "cuda" or "auto": a GPU where one can be used.
        config: the run's settings, for the choice of kernels; None: their defaults.

    Raises:
        CupytronError: "cuda", and there is no driver, no GPU or no fitting CuPy.
    """
    if wish != "cpu":
        # streams of several communicators must not queue behind each other: a receive that waits there
        # would hold back the send that it waits for
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if not uses_gpu(wish):
        return CPU
    cupy, count = _import(wish)
    rank = local_rank()
    device = GPU(cupy, rank % count)
    from cupytron import kernels

    kernels.install(config)
    return device


def _import(wish: str) -> tuple[Any, int]:
    """CuPy, and how many GPUs it sees."""
    ask = "--device cuda" if wish == "cuda" else "a GPU was found"
    try:
        import cupy
    except ImportError as error:
        raise CupytronError(
            f"{ask}: CuPy cannot be imported ({error}); {INSTALL}, or use --device cpu"
        ) from None
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # CuPy's own class for each library, none of them public
        raise CupytronError(
            f"{ask}: CUDA cannot be used ({error}); install NVIDIA's driver and the CuPy that fits it: "
            f"{INSTALL}, or use --device cpu"
        ) from None
    if count == 0:
        raise CupytronError(f"{ask}: the driver shows no GPU; use --device cpu")
    if tuple(map(int, cupy.__version__.split(".")[:2])) < (14, 2):
        raise CupytronError(
            f"{ask}: CuPy {cupy.__version__} is too old, bfloat16 needs 14.2; {INSTALL}"
        )
    return cupy, count
