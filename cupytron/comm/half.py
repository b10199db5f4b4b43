"""16-bit floats: moved as raw bits, summed in float32 here.

MPI knows no bfloat16, and one MPI library sums its bytes without a word.
"""

from typing import Any

import numpy as np


def is_half(x: Any) -> bool:
    """Whether an array holds 16-bit floats."""
    return x.dtype.itemsize == 2 and x.dtype.kind not in "iu"


def bits(x: Any) -> Any:
    """16-bit floats as integers: every library can move those."""
    return x.view(np.uint16) if is_half(x) else x


def ordered_sum(parts: Any, out: Any) -> None:
    """out = parts[0] + parts[1] + ...: one after the other, in float32, rounded once."""
    # a sum over an axis would add in another order where NumPy finds it convenient
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total += part.astype(np.float32)
    out[...] = total.reshape(out.shape)
