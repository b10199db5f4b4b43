"""Random numbers by address: Philox-4x32-10 maps a counter and a key to 128 random bits.

A value depends on its address only, never on what was drawn before it. So there is no generator state to
save, and every rank of a mesh can draw just its own part of a mask or of the initial weights.

Reference: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

import hashlib
import math
from typing import Any

import numpy as np

_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def key_of(seed: int, purpose: str, name: str) -> tuple[int, int]:
    """The two key words of one stream, such as key_of(1, "dropout", "blocks.0.dropout1")."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(xp: Any, counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, ...]:
    """Four random 32-bit words for each counter.

    Args:
        xp: the array module of the result.
        counter: four words, each an integer or an array of uint64 below 2^32; they broadcast.
        key: two words below 2^32.

    Returns: four arrays of uint64 below 2^32, of the broadcast shape.
    """
    c0, c1, c2, c3 = (xp.asarray(c, dtype=xp.uint64) for c in counter)
    k0, k1 = key
    mask, half = xp.uint64(_MASK), xp.uint64(32)
    m0, m1 = xp.uint64(_MULTIPLY[0]), xp.uint64(_MULTIPLY[1])
    for _ in range(10):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (
            (p1 >> half) ^ c1 ^ xp.uint64(k0),
            p1 & mask,
            (p0 >> half) ^ c3 ^ xp.uint64(k1),
            p0 & mask,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return tuple(xp.broadcast_arrays(c0, c1, c2, c3))


def keep_mask(xp: Any, shape: tuple[int, ...], address: Any, key: tuple[int, int], p: float) -> Any:
    """A dropout mask over the last dim: False with probability p.

    Eight neighbours along the last dim share one Philox block, 16 bits each; so p is rounded to a
    multiple of 1/65536 (`keep_scale` uses the rounded one).

    Args:
        shape: of the mask; its last dim is the feature or key index, from 0.
        address: three words (integers, or arrays that broadcast against shape[:-1]): where the rows
            of the mask stand in the whole batch.
        key: of the layer's stream.

    Returns: bool array of `shape`.
    """
    blocks = -(-shape[-1] // 8)
    rows = [a if isinstance(a, int) else a[..., None] for a in address]
    words = philox(xp, (xp.arange(blocks, dtype=xp.uint64), *rows), key)
    lanes = xp.empty((*shape[:-1], blocks, 4), dtype=xp.uint32)
    for lane, word in enumerate(words):
        lanes[..., lane] = word
    bits = lanes.view(xp.uint16).reshape(*shape[:-1], blocks * 8)[..., : shape[-1]]
    return bits >= threshold(p)


def keep_scale(p: float) -> float:
    """What kept values are multiplied by, so that the mean stays: 1 / (1 - p)."""
    return 65536 / (65536 - threshold(p))


def threshold(p: float) -> int:
    """How many of 65536 equally likely values are dropped."""
    return min(round(p * 65536), 65535)


def normal(shape: tuple[int, ...], box: tuple[slice, ...], key: tuple[int, int]) -> np.ndarray:
    """Standard normal values of a part of a tensor, by Box-Muller, on the host.

    Args:
        shape: of the whole, logical tensor.
        box: which part, a slice for each dim.
        key: of the tensor's stream.

    Returns: float64 array of the part's shape; an element's value depends on the key and on its flat
        index in the whole tensor only.
    """
    part = np.empty([s.stop - s.start for s in box])
    if part.size == 0:
        return part
    # the part is made of runs that are contiguous in the whole tensor
    inner = len(shape)
    while inner > 0 and (box[inner - 1].start, box[inner - 1].stop) == (0, shape[inner - 1]):
        inner -= 1
    inner = max(inner - 1, 0)  # dims before `inner` are looped over; from it on a run is contiguous
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    run = math.prod(part.shape[inner:])
    flat = part.reshape(-1, run)
    for i, outer in enumerate(np.ndindex(*part.shape[:inner])):
        start = sum(
            (box[d].start + (outer[d] if d < inner else 0)) * strides[d]
            for d in range(min(inner + 1, len(shape)))
        )
        _fill_normal(flat[i], start, key)
    return part


def _fill_normal(out: np.ndarray, start: int, key: tuple[int, int], block: int = 1 << 14) -> None:
    """Values start ... start + len(out) of the stream; four to a Philox block."""
    first, last = start // 4, -(-(start + len(out)) // 4)
    for begin in range(first, last, block):
        end = min(begin + block, last)
        index = np.arange(begin, end, dtype=np.uint64)
        words = philox(np, (index & np.uint64(_MASK), index >> np.uint64(32), 0, 0), key)
        values = np.empty((end - begin, 4))
        for a, b in ((0, 1), (2, 3)):
            # uniform in (0, 1): the half keeps the logarithm finite
            radius = np.sqrt(-2 * np.log((words[a] + 0.5) * 2.0**-32))
            angle = words[b] * (2 * math.pi * 2.0**-32)
            values[:, a], values[:, b] = radius * np.cos(angle), radius * np.sin(angle)
        low, high = max(begin * 4, start), min(end * 4, start + len(out))
        out[low - start : high - start] = values.reshape(-1)[low - begin * 4 : high - begin * 4]
