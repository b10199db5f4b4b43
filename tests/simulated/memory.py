"""Device memory as CuPy hands it out: pointers, pools, allocators; and pinned memory."""

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from simulated import blocks, state
from simulated.blocks import ROUND, Block


class OutOfMemoryError(MemoryError):
    """As cupy.cuda.memory.OutOfMemoryError."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        self._size, self._total, self._limit = size, total, limit
        text = f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes"
        super().__init__(text + (f", limit set to: {limit:,} bytes)." if limit else ")."))


class Memory:
    """One allocation; its block goes back to the pool when nothing refers to this any more."""

    def __init__(
        self, pool: "MemoryPool", block: Block | None, arena: int, simulation: Any
    ) -> None:
        self.pool, self.block, self.arena, self.simulation = pool, block, arena, simulation
        self.size = 0 if block is None else block.size
        self.ptr = 0 if block is None else block.ptr
        self.device_id = state.device_id()

    @property
    def device(self) -> Any:
        from simulated.device import Device

        return Device(self.device_id)

    def __del__(self) -> None:
        block = self.block
        ended = (
            state is None or state.running is None
        )  # the interpreter takes modules apart at its end
        if not ended and block is not None and self.simulation is state.running():
            fault = block.broken()
            if fault:
                self.simulation.violations.append(f"something wrote {fault}")
            self.pool.take_back(block, self.arena)


class MemoryPointer:
    """An address within an allocation."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.offset = mem, offset
        self.ptr = mem.ptr + offset if mem.ptr else 0

    @property
    def device_id(self) -> int:
        return self.mem.device_id

    @property
    def device(self) -> Any:
        return self.mem.device

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> "MemoryPointer":
        return MemoryPointer(self.mem, self.offset + offset)

    def bytes(self, count: int) -> np.ndarray:
        """The memory of the next `count` bytes, as NumPy sees it."""
        if count == 0:
            return np.empty(0, dtype=np.uint8)
        if self.mem.block is None or self.offset + count > self.mem.block.asked:
            raise ValueError(f"{count} bytes at offset {self.offset} reach behind the allocation")
        return self.mem.block.bytes[self.offset : self.offset + count]

    def span(self, count: int) -> tuple[Block, int, int]:
        """What streams.issue wants to know of the next `count` bytes."""
        assert self.mem.block is not None
        return (self.mem.block, self.offset, self.offset + count)

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        from simulated import streams

        if size > 0:
            target, span = self.bytes(size), self.span(size)
            streams.issue(
                "memset", lambda: target.fill(value), writes=[span], stream=stream, kind="copy"
            )

    memset = memset_async

    def copy_from_device_async(self, src: "MemoryPointer", size: int, stream: Any = None) -> None:
        from simulated import streams

        if size > 0:
            target, source = self.bytes(size), src.bytes(size)
            streams.issue(
                "d2d",
                lambda: np.copyto(target, source),
                [src.span(size)],
                [self.span(size)],
                stream,
                kind="copy",
            )

    copy_from_device = copy_from_device_async


class DeviceMemory:
    """`cupy.cuda.memory.Memory`: bytes of the device that no pool has taken, if there are so many."""

    def __init__(self, size: int) -> None:
        simulation = state.sim()
        limit = simulation.memory_limit
        if limit is not None and simulation.device_bytes + size > limit:
            raise OutOfMemoryError(size, simulation.device_bytes, limit)
        self.size, self.ptr = size, 0  # a promise: the pool makes the block


class MemoryPool:
    """Blocks of the same rounded size are handed out again, on the stream for which they were made."""

    def __init__(self, allocator: Any = None) -> None:
        self._allocator = allocator or (lambda size: DeviceMemory(size))
        self._free: dict[tuple[int, int], list[Block]] = {}
        self._used = self._held = self._limit = 0
        self._lock = threading.RLock()
        self._simulation = state.sim()

    def malloc(self, size: int) -> MemoryPointer:
        from simulated import streams

        simulation = self._simulation
        if simulation is not state.sim():
            raise RuntimeError("this memory pool is of an earlier simulated_gpu()")
        arena = streams.get_current_stream().ptr
        if size == 0:
            return MemoryPointer(Memory(self, None, arena, simulation), 0)
        rounded = -(-size // ROUND) * ROUND
        with self._lock:
            kept = self._free.get((arena, rounded))
            block = kept.pop() if kept else self._new_block(rounded, simulation)
            self._used += rounded
        block.open(size)
        return MemoryPointer(Memory(self, block, arena, simulation), 0)

    def _new_block(self, size: int, simulation: Any) -> Block:
        from simulated import streams

        for attempt in range(2):
            pool_full = self._limit and self._held + size > self._limit
            try:
                self._allocator(size)
                device_full = False
            except OutOfMemoryError:
                device_full = True
            if not pool_full and not device_full:
                streams.refuse_growth()
                self._held += size
                simulation.device_bytes += size
                return Block(size)
            if attempt == 0:
                gc.collect()
                self.free_all_blocks()
        raise OutOfMemoryError(size, self._held, self._limit)

    def take_back(self, block: Block, arena: int) -> None:
        with self._lock:
            self._used -= block.size
            self._free.setdefault((arena, block.size), []).append(block)

    def free_all_blocks(self, stream: Any = None) -> None:
        with self._lock:
            for (arena, _), free in list(self._free.items()):  # a finaliser may add to it
                while free and (stream is None or stream.ptr == arena):
                    block = free.pop()
                    block.returned = True
                    self._held -= block.size
                    self._simulation.device_bytes -= block.size

    def __del__(self) -> None:
        self.free_all_blocks()

    def free_all_free(self) -> None:
        self.free_all_blocks()

    def n_free_blocks(self) -> int:
        return sum(len(free) for free in self._free.values())

    def used_bytes(self) -> int:
        return self._used

    def total_bytes(self) -> int:
        return self._held

    def free_bytes(self) -> int:
        return self._held - self._used

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        from simulated.device import TOTAL_MEMORY

        if size is not None and fraction is not None:
            raise ValueError("size and fraction cannot be specified at one time")
        self._limit = int(fraction * TOTAL_MEMORY) if fraction is not None else int(size or 0)

    def get_limit(self) -> int:
        return self._limit


class PinnedMemoryPointer(bytearray):
    """Host memory with a buffer and an address."""

    @property
    def ptr(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self))

    def size(self) -> int:
        return len(self)


class PinnedMemoryPool:
    """Only what a program asks of it."""

    def malloc(self, size: int) -> PinnedMemoryPointer:
        return PinnedMemoryPointer(max(1, size))

    def free_all_blocks(self) -> None:
        pass

    def n_free_blocks(self) -> int:
        return 0


_thread = threading.local()
_default: MemoryPool
_allocator: Callable[[int], MemoryPointer]
_pinned: PinnedMemoryPool


def reset() -> None:
    """A new default pool, at the start of a simulation."""
    global _default, _allocator, _pinned
    blocks.reset()
    _default, _pinned = MemoryPool(), PinnedMemoryPool()
    _allocator = _default.malloc
    _thread.__dict__.clear()


def get_default_memory_pool() -> MemoryPool:
    return _default


def get_default_pinned_memory_pool() -> PinnedMemoryPool:
    return _pinned


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    return _pinned.malloc(size)


def set_allocator(allocator: Any = None) -> None:
    global _allocator
    if getattr(_thread, "allocators", None):
        raise ValueError(
            "Can't change the global allocator inside `using_allocator` context manager"
        )
    _allocator = allocator or _default.malloc


def get_allocator() -> Callable[[int], MemoryPointer]:
    stack = getattr(_thread, "allocators", None)
    return stack[-1] if stack else _allocator


@contextlib.contextmanager
def using_allocator(allocator: Any = None) -> Iterator[None]:
    """Another allocator for this thread."""
    if not hasattr(_thread, "allocators"):
        _thread.allocators = []
    _thread.allocators.append(allocator or _default.malloc)
    try:
        yield
    finally:
        _thread.allocators.pop()


def alloc(size: int) -> MemoryPointer:
    return get_allocator()(size)
