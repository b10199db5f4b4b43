"""cupy.cuda.Device, cupy.cuda.runtime and what else a program asks the driver."""

import ctypes
from typing import Any

import numpy as np

from simulated import blocks, state, streams
from simulated.errors import CUDARuntimeError

TOTAL_MEMORY = 141 << 30
memcpyHostToHost, memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault = (
    range(5)
)
streamNonBlocking, eventDisableTiming = 1, 2
streamCaptureModeGlobal, streamCaptureModeThreadLocal, streamCaptureModeRelaxed = range(3)
streamLegacy = 1


class Device:
    """As cupy.cuda.Device."""

    def __init__(self, device: Any = None) -> None:
        self.id = getDevice() if device is None else int(device)
        self._before: list[int] = []

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __enter__(self) -> "Device":
        self._before.append(getDevice())
        setDevice(self.id)
        return self

    def __exit__(self, *error: object) -> None:
        setDevice(self._before.pop())

    def use(self) -> None:
        setDevice(self.id)

    def synchronize(self) -> None:
        streams.device_waits("Device.synchronize")

    compute_capability = "90"
    pci_bus_id = property(lambda self: f"0000:{self.id:02X}:00.0")
    mem_info = property(lambda self: memGetInfo())
    attributes = property(lambda self: {
        "MultiProcessorCount": 132, "MaxThreadsPerBlock": 1024, "WarpSize": 32,
        "MaxSharedMemoryPerBlock": 48 << 10, "MaxSharedMemoryPerBlockOptin": 227 << 10,
        "ComputeCapabilityMajor": 9, "ComputeCapabilityMinor": 0, "L2CacheSize": 50 << 20,
    })  # fmt: skip


def getDevice() -> int:
    return state.device_id()


def setDevice(device: int) -> None:
    if not 0 <= device < state.sim().device_count:
        raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
    state.set_device_id(device)


def getDeviceCount() -> int:
    return state.sim().device_count


def getDeviceProperties(device: int) -> dict[str, Any]:
    if not 0 <= device < state.sim().device_count:
        raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
    return {
        "name": b"Simulated GPU", "major": 9, "minor": 0, "totalGlobalMem": TOTAL_MEMORY,
        "multiProcessorCount": 132, "maxThreadsPerBlock": 1024, "warpSize": 32,
        "sharedMemPerBlock": 48 << 10, "sharedMemPerBlockOptin": 227 << 10, "l2CacheSize": 50 << 20,
        "clockRate": 1980000, "memoryClockRate": 3201000, "memoryBusWidth": 6144,
    }  # fmt: skip


def memGetInfo() -> tuple[int, int]:
    simulation = state.sim()
    total = TOTAL_MEMORY if simulation.memory_limit is None else simulation.memory_limit
    return total - simulation.device_bytes, total


def driverGetVersion() -> int:
    return 13000


def runtimeGetVersion() -> int:
    return 13000


def deviceSynchronize() -> None:
    streams.device_waits("runtime.deviceSynchronize")


def streamSynchronize(stream: int) -> None:
    streams.host_waits("runtime.streamSynchronize", _stream(stream))


def streamIsCapturing(stream: int) -> bool:
    return _stream(stream).is_capturing()


def _stream(ptr: int) -> streams.Stream:
    if ptr not in streams._streams:
        raise CUDARuntimeError(f"cudaErrorInvalidResourceHandle: there is no stream {ptr}")
    return streams._streams[ptr]


def memcpyAsync(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    """Bytes from address to address, on a stream."""
    if size == 0:
        return
    name = {memcpyHostToDevice: "h2d", memcpyDeviceToHost: "d2h"}.get(kind, "d2d")
    if streams.capturing(_stream(stream)) and name != "d2d":
        raise CUDARuntimeError(f"the simulated GPU captures no copies from or to the host ({name})")
    reads = [] if name == "h2d" else [blocks.find(src, size)]
    writes = [] if name == "d2h" else [blocks.find(dst, size)]
    streams.issue(name, lambda: ctypes.memmove(dst, src, size), reads, writes, stream, kind="copy")


def memcpy(dst: int, src: int, size: int, kind: int) -> None:
    memcpyAsync(dst, src, size, kind, streams.get_current_stream().ptr)
    streams.host_waits("runtime.memcpy")


def memsetAsync(ptr: int, value: int, size: int, stream: int) -> None:
    if size > 0:
        writes = [blocks.find(ptr, size)]
        streams.issue(
            "memset", lambda: ctypes.memset(ptr, value, size), (), writes, stream, kind="copy"
        )


def empty_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    """As cupyx.empty_pinned: a NumPy array."""
    array = np.empty(shape, dtype, order)
    array.reshape(-1, order="A").view(np.uint8)[...] = 0xFF
    return array


def zeros_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    return np.zeros(shape, dtype, order)


def empty_like_pinned(a: Any, dtype: Any = None, **options: Any) -> np.ndarray:
    return empty_pinned(a.shape, a.dtype if dtype is None else dtype)


def zeros_like_pinned(a: Any, dtype: Any = None, **options: Any) -> np.ndarray:
    return zeros_pinned(a.shape, a.dtype if dtype is None else dtype)
