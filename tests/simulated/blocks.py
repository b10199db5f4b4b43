"""Blocks of device memory with guard zones, and the block in which an address lies."""

import bisect
import threading
from typing import Any

import numpy as np

from simulated.errors import CUDARuntimeError

ROUND = 512  # what CuPy's pool rounds to, and how a GPU aligns allocations
_GUARD = b"\xff"
UNWRITTEN = 0xFF  # NaN in every floating-point type, -1 in every integer


# Where all blocks are, sorted by their addresses, until a pool gives them back. These are no weak
# references: of a cycle the garbage collector clears them before Memory.__del__ gives its block to a pool.
# A finaliser may run in the middle of anything, and so none changes this list: a block that was given back
# leaves it when the next one comes.
_places: list[tuple[int, "Block"]] = []
_places_lock = threading.Lock()


class Block:
    """Bytes of the device between two guard zones; `touched` is kept by streams.py."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked = size
        room = np.empty(size + 3 * ROUND, dtype=np.uint8)
        start = ROUND + -(room.ctypes.data + ROUND) % ROUND
        self.head = room[start - ROUND : start]
        self.bytes = room[start : start + size]
        self.tail = room[start + size : start + size + ROUND]
        self.ptr = self.bytes.ctypes.data
        self.head[...] = UNWRITTEN
        self.tail[...] = UNWRITTEN
        self.returned = False  # to the system: nobody may touch it any more
        self.touched: list[Any] = []
        self.reach = 0  # how far recorded work writes, in whichever of the block's lives
        with _places_lock:
            _places[:] = [place for place in _places if not place[1].returned]
            bisect.insort(_places, (self.ptr, self), key=_address)

    def open(self, asked: int) -> None:
        """Begin a life of `asked` bytes, none of them written yet."""
        self.asked = asked
        self.bytes[...] = UNWRITTEN

    def broken(self) -> str:
        """Where somebody wrote outside, or an empty string.

        No NumPy functions: Memory.__del__ calls this in the middle of whatever the garbage collector
        interrupts. At the end of a np.errstate, one that looked up the state would leave a pointer to it in
        CPython's cache (contextvar_del in 3.11), and the next one would use what has been freed.
        """
        written = len(self.head.tobytes().rstrip(_GUARD))
        if written:
            self.head[...] = UNWRITTEN
            return f"{ROUND - written + 1} bytes before the start of an allocation of {self.asked} bytes"
        free = max(self.asked, self.reach)
        for zone, start in ((self.bytes[free:], free), (self.tail, self.size)):
            written = len(zone) - len(zone.tobytes().lstrip(_GUARD))
            if written < len(zone):
                zone[...] = UNWRITTEN
                offset = start + written - self.asked
                return f"{offset} bytes behind the end of an allocation of {self.asked} bytes"
        return ""


def _address(place: tuple[int, Block]) -> int:
    return place[0]


def reset() -> None:
    """No block, at the start and the end of a simulation."""
    _places.clear()


def find(ptr: int, count: int) -> tuple[Block, int, int]:
    """The block that holds `count` bytes at an address, the first of them and the one behind the last.

    Raises:
        CUDARuntimeError: nobody has allocated all of them, or the pool has given them back.
    """
    with _places_lock:
        at = bisect.bisect_right(_places, ptr, key=_address) - 1
        block = _places[at][1] if at >= 0 else None
    if block is None or block.returned or ptr + count > block.ptr + block.asked:
        raise CUDARuntimeError(
            f"cudaErrorIllegalAddress: nobody has allocated {count} bytes of device memory at {ptr}"
        )
    return block, ptr - block.ptr, ptr - block.ptr + count


def bytes_at(ptr: int, count: int) -> np.ndarray:
    """Device memory at an address, as NumPy sees it: for stand-ins of libraries that take pointers."""
    if count == 0:
        return np.empty(0, np.uint8)
    block, first, last = find(ptr, count)
    return block.bytes[first:last]
