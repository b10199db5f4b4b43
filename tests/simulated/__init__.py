"""A GPU without a GPU: a stand-in for CuPy whose kernels g++ compiles and the CPU runs.

    from simulated import simulated_gpu

    with simulated_gpu() as cupy:
        x = cupy.asarray(np.ones(4, np.float32))    # `import cupy` elsewhere gives the same module
        kernel(grid, block, (x, np.int32(4)))       # RawModule(...).get_function(...)
        cupy.sim.synchronisations                   # see state.Simulation

What it finds that a CPU would not show: mixing with NumPy arrays, waiting for the device (counted, and
refused while a stream is captured), arguments that do not fit a kernel's parameters, writes outside of an
allocation or of a __shared__ array, misaligned vector accesses, memory that is read before it was written
(NaN), missing barriers (threads run in both orders), divergent barriers and shuffles, unordered work on two
streams, memory that a graph uses after its pool has handed it out again. What it does not: speed, the
rounding of the GPU's own functions, more than one thread at a time.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401 (as CuPy: np.dtype("bfloat16") works)

from simulated import blocks, memory, modules, state, streams
from simulated.array import ndarray
from simulated.blocks import bytes_at
from simulated.blocks import find as find_memory
from simulated.state import Simulation
from simulated.streams import host_waits, issue

__all__ = [
    "Simulation",
    "bytes_at",
    "find_memory",
    "host_waits",
    "issue",
    "ndarray",
    "simulated_gpu",
]

_NAMES = ("cupy", "cupyx", "cupy_backends")


def _forget_kernels() -> None:
    """Compiled functions belong to one module cupy: empty the caches of cupytron.kernels."""
    for name, module in list(sys.modules.items()):
        if name.startswith("cupytron.") and module is not None:
            for value in list(vars(module).values()):
                if getattr(value, "__module__", None) == name and hasattr(value, "cache_clear"):
                    if name.startswith("cupytron.kernels"):
                        value.cache_clear()


@contextlib.contextmanager
def simulated_gpu(stand_ins: dict[str, ModuleType] | None = None, **rules: Any) -> Iterator[Any]:
    """The simulated cupy in sys.modules, and back to what was there.

    Args:
        stand_ins: modules by name that take the place of others, too, for example "cupy.cuda.nccl".
        rules: attributes of Simulation to set, for example order="reverse".
    """
    stand_ins = stand_ins or {}
    simulation = Simulation()
    for name, value in rules.items():
        if not hasattr(simulation, name):
            raise TypeError(f"Simulation has no rule {name!r}")
        setattr(simulation, name, value)
    state.enter(simulation)

    def concerned() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in _NAMES or name in stand_ins]

    before = {name: sys.modules[name] for name in concerned()}
    try:
        streams.reset()
        memory.reset()
        for name in before:
            del sys.modules[name]
        fakes: dict[str, ModuleType] = modules.build(simulation)
        for name, module in stand_ins.items():
            parent, _, own = name.rpartition(".")
            if parent in fakes:
                setattr(fakes[parent], own, module)
        sys.modules.update({**fakes, **stand_ins})
        _forget_kernels()
        yield fakes["cupy"]
        if simulation.violations:
            raise RuntimeError("; ".join(simulation.violations))
    finally:
        _forget_kernels()
        for name in concerned():
            del sys.modules[name]
        sys.modules.update(before)
        blocks.reset()
        state.enter(None)
