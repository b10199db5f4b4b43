"""What a launch hands over, against what the kernel takes."""

from typing import Any

import numpy as np

from simulated import blocks, memory, state
from simulated.array import ndarray


def three(size: Any, what: str) -> tuple[int, int, int]:
    if not isinstance(size, tuple) or not 1 <= len(size) <= 3:
        raise ValueError(f"{what} has to be a tuple of 1 to 3 integers, not {size!r}")
    if not all(isinstance(n, int | np.integer) for n in size):
        raise TypeError(f"{what} has to hold integers: {size!r}")
    x, y, z = (*map(int, size), 1, 1)[:3]
    return x, y, z


def value(kernel: str, place: int, argument: Any, parameter: str) -> bytes:
    """The bytes of an argument, once they fit the parameter.

    Parameters are described as in launch.h: a letter and a size (f4: float), with c (const) or p in front
    for what a pointer points to.
    """
    where = f"argument {place} of {kernel}"
    pointer = parameter[0] in "cp"
    if isinstance(argument, ndarray | memory.MemoryPointer):
        if not pointer:
            raise TypeError(f"{where} is a number ({parameter}), got an array")
        if isinstance(argument, memory.MemoryPointer):
            return int(argument.ptr).to_bytes(8, "little")
        if state.sim().check_types:
            _check_pointee(where, argument.dtype, parameter[1], int(parameter[2:]))
        return int(argument.data.ptr).to_bytes(8, "little")
    if isinstance(argument, np.ndarray):
        if argument.size != 1:
            raise TypeError(
                f"You are trying to pass a numpy.ndarray of shape {argument.shape} as a kernel parameter "
                f"({where}): pass a cupy.ndarray"
            )
        argument = argument.reshape(())[()]
    if type(argument) is bool:
        argument = np.bool_(argument)
    elif type(argument) is int:
        argument = np.int64(argument)
    elif type(argument) is float:
        argument = np.float64(argument)
    if not isinstance(argument, np.generic):
        raise TypeError(f"Unsupported type {type(argument)} ({where})")
    if pointer:
        if argument.dtype.kind not in "iu" or argument.itemsize != 8:
            raise TypeError(f"{where} is a pointer, got {argument!r}")
        if argument != 0:
            blocks.find(int(argument), 1)  # raises
        return argument.tobytes()
    kind, size = parameter[0], int(parameter[1:])
    own = _letter(argument.dtype)
    same = own == kind or {own, kind} <= {"i", "u"} or kind == "s"
    if argument.itemsize != size or not same:
        raise TypeError(
            f"{where} is {argument.dtype} ({argument!r}), the parameter is {parameter}: pass a NumPy "
            "scalar of the parameter's type (CuPy passes Python numbers as 64 bits)"
        )
    return argument.tobytes()


def _letter(dtype: Any) -> str:
    return {"bfloat16": "e", "float16": "h"}.get(dtype.name, dtype.kind)


def _check_pointee(where: str, dtype: Any, kind: str, size: int) -> None:
    """An array's numbers are what the kernel reads; bytes, void and structs may be anything."""
    if kind in "vs" or (kind in "iu" and size == 1):
        return
    own = _letter(dtype)
    integers = {"i", "u"}
    # integers may also be the bits of 16-bit numbers
    fits = own == kind or (kind in integers and (own in "eh" or own in integers))
    if dtype.itemsize != size or not fits:
        raise TypeError(f"{where} is an array of {dtype}, the kernel's pointer is to {kind}{size}")
