"""The modules cupy, cupy.cuda, ... of a simulation."""

import functools
from types import ModuleType
from typing import Any

import numpy as np

from simulated import device, emulator, errors, memory, state, streams
from simulated import functions as catalogue
from simulated.array import ndarray, run

_LINALG = "norm det inv solve cholesky qr svd eigh eigvalsh lstsq matrix_rank pinv slogdet".split()
_DRAWS = (
    "rand randn random random_sample normal uniform standard_normal randint permutation".split()
)


def _fill(module: ModuleType, source: Any, names: str) -> None:
    for name in names.split():
        setattr(module, name, getattr(source, name))


def build(simulation: state.Simulation) -> dict[str, ModuleType]:
    """All modules under their names."""
    made: dict[str, ModuleType] = {}

    def make(name: str) -> ModuleType:
        module = made[name] = ModuleType(name)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, module)
            made[parent].__path__ = []
        return module

    cupy = make("cupy")
    cupy.__version__ = "14.2.0"
    cupy.__getattr__ = catalogue.lookup
    cupy.__dir__ = lambda: sorted(catalogue.NAMES | set(vars(cupy)))
    cupy.sim = simulation
    _fill(cupy, emulator, "RawModule RawKernel")
    _fill(cupy, memory, "get_default_memory_pool get_default_pinned_memory_pool")
    cupy.ndarray = ndarray
    cupy.ElementwiseKernel = cupy.ReductionKernel = _no_kernel

    cuda = make("cupy.cuda")
    _fill(cuda, streams, "Stream ExternalStream Event Graph get_current_stream get_elapsed_time")
    _fill(cuda, memory, "MemoryPointer MemoryPool PinnedMemoryPointer PinnedMemoryPool alloc "
          "set_allocator get_allocator using_allocator alloc_pinned_memory")  # fmt: skip
    cuda.Device = device.Device
    cuda.is_available = lambda: True
    cuda.get_device_id = device.getDevice

    runtime = make("cupy.cuda.runtime")
    for name, value in vars(device).items():
        if name[0].islower() and not name.endswith("_pinned"):
            setattr(runtime, name, value)
    runtime.CUDARuntimeError = errors.CUDARuntimeError
    runtime.is_hip = False
    make("cupy.cuda.driver").CUDADriverError = errors.CUDADriverError
    make("cupy.cuda.compiler").CompileException = errors.CompileException
    make("cupy.cuda.device").Device = device.Device
    _fill(make("cupy.cuda.memory"), memory, "MemoryPointer MemoryPool OutOfMemoryError alloc "
          "set_allocator get_allocator using_allocator")  # fmt: skip
    made["cupy.cuda.memory"].Memory = memory.DeviceMemory
    _fill(make("cupy.cuda.pinned_memory"), memory, "PinnedMemoryPointer PinnedMemoryPool "
          "alloc_pinned_memory")  # fmt: skip
    _fill(make("cupy.cuda.stream"), streams, "Stream ExternalStream Event get_current_stream "
          "get_elapsed_time")  # fmt: skip
    make("cupy.cuda.graph").Graph = streams.Graph
    _ranges(make("cupy.cuda.nvtx"), simulation)
    profiler = make("cupy.cuda.profiler")
    profiler.start = profiler.stop = lambda: None
    make("cupy.cuda.nccl").available = False  # for a test to put its own in this place

    linalg = make("cupy.linalg")
    for name in _LINALG:
        setattr(linalg, name, _linear(name))
    _random(make("cupy.random"))
    made["cupy"].exceptions = np.exceptions

    cupyx = make("cupyx")
    _fill(cupyx, device, "empty_pinned zeros_pinned empty_like_pinned zeros_like_pinned")
    cupyx.rsqrt = lambda x: run("rsqrt", lambda host: 1 / np.sqrt(host), (x,))
    cupyx.scatter_add = lambda a, slices, value: a.scatter_add(slices, value)
    return made


def _no_kernel(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the simulated GPU runs RawModule and RawKernel only")


def _ranges(nvtx: ModuleType, simulation: state.Simulation) -> None:
    def push(name: str, color: int = 0) -> None:
        simulation.log.append(("range", name, streams.get_current_stream().ptr))

    def pop() -> None:
        simulation.log.append(("pop", "", streams.get_current_stream().ptr))

    nvtx.RangePush = nvtx.RangePushC = push
    nvtx.RangePop = pop


def _linear(name: str) -> Any:
    host = getattr(np.linalg, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        if name != "norm":
            if streams.capturing():
                raise NotImplementedError(
                    f"calling cuSOLVER API (cupy.linalg.{name}) during stream capture is currently "
                    "unsupported"
                )
            streams.host_waits(f"cupy.linalg.{name}")
        return run(name, host, args, kwargs)

    return function


def _random(random: ModuleType) -> None:
    """Functions of numpy.random; other numbers than cuRAND's."""

    def drawing(host: Any) -> Any:
        def function(*args: Any, dtype: Any = None, **kwargs: Any) -> Any:
            if streams.capturing():
                raise NotImplementedError(
                    "calling cuRAND API during stream capture is currently unsupported"
                )
            drawn = np.asarray(host(*args, **kwargs))
            return run("random", lambda: drawn if dtype is None else drawn.astype(dtype), ())

        return function

    class Generator:
        def __init__(self, seed: Any = None) -> None:
            self._host = np.random.default_rng(seed)

        def __getattr__(self, name: str) -> Any:
            return drawing(getattr(self._host, name))

    def draw(name: str, *args: Any, **kwargs: Any) -> Any:
        return drawing(getattr(shared["host"], name))(*args, **kwargs)

    shared = {"host": np.random.RandomState(0)}
    random.default_rng = Generator
    random.RandomState = Generator
    random.seed = lambda seed=None: shared.update(host=np.random.RandomState(seed))
    for name in _DRAWS:
        setattr(random, name, functools.partial(draw, name))
