"""What one simulation knows: counters, the log, and the rules that tests may set."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class Simulation:
    """`cupy.sim`, new for each simulated_gpu().

    Attributes:
        log: (kind, name, stream) of what was issued, in this order. Kinds: "launch" (kernels), "array"
            (array operations), "copy" (between host and device, or of bytes on the device), "record",
            "wait", "sync" (the host waits), "graph" (a graph is launched), "range" (nvtx).
        synchronisations: how often the host waited for the device.
        memory_limit: bytes that all pools may hold, None for any number.
        order: which thread of a block, and which block, comes first: "forward", "reverse" or "alternate"
            (forward in the first launch, reverse in the second...).
        races: messages about work on two streams that touches the same bytes, with nothing that orders it.
        strict_races: raise a RuntimeError at a race.
        check_types: compare the arrays of a launch with what the kernel's pointers point to.
        names: where nvtx pushed ranges, their names in order.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, str, int]] = []
        self.synchronisations = 0
        self.memory_limit: int | None = None
        self.device_bytes = 0
        self.order = "alternate"
        self.launches = 0
        self.races: list[str] = []
        self.strict_races = True
        self.check_types = True
        self.violations: list[str] = []
        self.lock = threading.RLock()  # one kernel runs at a time
        self.host_clock: dict[int, int] = {}
        self.device_count = 1

    @property
    def names(self) -> list[str]:
        return [name for kind, name, _ in self.log if kind == "range"]

    def clear(self) -> None:
        """Forget the log and the counters, not the rules."""
        self.log.clear()
        self.races.clear()
        self.synchronisations = 0

    def reverse(self) -> bool:
        """Whether the launch that begins now runs backwards."""
        self.launches += 1
        return self.order == "reverse" or (self.order == "alternate" and self.launches % 2 == 0)

    @contextlib.contextmanager
    def limited(self, more: int) -> Iterator[None]:
        """No more than `more` bytes on top of what is held now."""
        before, self.memory_limit = self.memory_limit, self.device_bytes + more
        try:
            yield
        finally:
            self.memory_limit = before


_current: Simulation | None = None
_thread = threading.local()


def device_id() -> int:
    """The device of this thread."""
    return getattr(_thread, "device", 0)


def set_device_id(device: int) -> None:
    _thread.device = device


def sim() -> Simulation:
    """The simulation in which this process is."""
    if _current is None:
        raise RuntimeError(
            "no GPU is simulated: this array or function outlived its simulated_gpu()"
        )
    return _current


def enter(simulation: Simulation | None) -> None:
    global _current
    if simulation is not None and _current is not None:
        raise RuntimeError("simulated_gpu() is entered already")
    _current = simulation


def running() -> Any:
    """The simulation, or None outside of one."""
    return _current
