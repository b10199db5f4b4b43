"""16-bit floats: moved as raw bits, summed in float32 here.

MPI knows no bfloat16, and one MPI library sums its bytes without a word.
"""

from typing import Any

import numpy as np

from cupytron import backend


def is_half(x: Any) -> bool:
    """Whether an array holds 16-bit floats."""
    return backend.is_half(x.dtype)


def bits(x: Any) -> Any:
    """16-bit floats as integers: every library can move those."""
    return x.view(np.uint16) if is_half(x) else x


def ordered_sum(parts: Any, out: Any) -> None:
    """out = parts[0] + parts[1] + ...: one after the other; 16-bit floats in float32, rounded once."""
    # a sum over an axis would add in another order where NumPy finds it convenient
    first, *others = (part.reshape(out.shape) for part in parts)
    xp = backend.array_module(out)
    total = xp.empty(out.shape, np.float32) if is_half(out) else out
    total[...] = first
    for part in others:
        total += part
    if total is not out:
        out[...] = total
