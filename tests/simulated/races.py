"""Work on two streams that touches the same bytes, with nothing that orders it.

Every stream counts its operations, and knows how far it has waited for each other stream (a vector clock).
Of two operations on the same bytes, one of them writing, the stream of the later one has to know of the
earlier one.
"""

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

Clock = dict[int, int]
LOCK = threading.RLock()


def merge(into: Clock, other: Clock) -> None:
    with LOCK:
        for stream, count in other.items():
            if into.get(stream, 0) < count:
                into[stream] = count


def spans(arrays: Iterable[Any], writes: bool) -> list[Any]:
    """(block, first byte, byte behind the last, written?) of arrays, or of (block, first, behind)."""
    found = []
    for array in arrays:
        if isinstance(array, tuple):
            found.append((*array, writes))
            continue
        block = getattr(getattr(array, "_memory", None), "block", None)
        if block is not None and array.size > 0:
            low, high = np.lib.array_utils.byte_bounds(array._host)
            found.append((block, low - block.ptr, high - block.ptr, writes))
    return found


def touch(
    simulation: Any, name: str, touched: list[Any], stream: int, clock: Clock, capture: Any = None
) -> None:
    """Note who reads and writes what, and complain of what nothing orders."""
    now = clock[stream]
    for block, low, high, writes in touched:
        kept = []
        for entry in block.touched if capture is None else capture.touched.get(id(block), ()):
            start, end, wrote, other, when, who = entry
            if start < high and low < end:
                if (writes or wrote) and clock.get(other, 0) < when:
                    simulation.races.append(
                        f"{name} (stream {stream}) {'writes' if writes else 'reads'} what {who} (stream "
                        f"{other}) {'writes' if wrote else 'reads'}, and nothing orders the two"
                    )
                    if simulation.strict_races:
                        raise RuntimeError(
                            f"race: {simulation.races[-1]}: let the stream wait for an event of the "
                            "other (and keep memory until that event, or a pool hands it out again)"
                        )
                inside = low <= start and end <= high
                if inside and (writes or (not wrote and other == stream)):
                    continue  # who is ordered behind this one is ordered behind that one, too
            kept.append(entry)
        kept.append((low, high, writes, stream, now, name))
        if capture is None:
            block.touched = kept[-64:]
        else:
            capture.touched[id(block)] = kept[-64:]
