"""CUDA sources to functions that can be launched: compiled by NVRTC when they are first asked for."""

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np

from cupytron import backend

NULL = np.uint64(0)  # the pointer to an array that there is not: CuPy takes no None

_compiling = threading.RLock()  # ranks may be threads
_FOLDER = Path(__file__).parent
CTYPES = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "__nv_bfloat16",
    "float16": "__half",
}


def source(file: str) -> str:
    """The text of `file`.cu with common.cuh in the place of its #include.

    CuPy keeps what it compiled by the text that it is given: a header of its own would not be noticed
    when it changes.
    """
    text = (_FOLDER / f"{file}.cu").read_text()
    include = '#include "common.cuh"\n'
    assert text.count(include) == 1, f"{file}.cu has to include common.cuh once"
    return text.replace(include, (_FOLDER / "common.cuh").read_text())


def options(dtype: str, vec: int, **defines: int) -> tuple[str, ...]:
    """How a file is compiled for one type of activations.

    Args:
        dtype: a key of CTYPES, the kernels' T.
        vec: elements of one access, the kernels' VEC.
        defines: other names with integer values.
    """
    names = {"ACTIVATION": CTYPES[dtype], "VEC": vec, **defines}
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in names.items()))


def files() -> list[str]:
    """Names of all CUDA sources."""
    return sorted(path.stem for path in _FOLDER.glob("*.cu"))


def wide(dtype: Any) -> int:
    """Elements of a 16-byte access."""
    return 16 // np.dtype(dtype).itemsize


def access(width: int, *arrays: Any) -> int:
    """VEC for rows of `width` elements: wide if every row begins at a multiple of 16 bytes, else 1.

    Args:
        arrays: those that a caller has handed in (new ones are aligned); the first has the dtype T, and
            None does not count.
    """
    vec = wide(arrays[0].dtype)
    aligned = all(x.data.ptr % 16 == 0 for x in arrays if x is not None)
    return vec if aligned and width % vec == 0 else 1


def contiguous(name: str, array: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The array, copied if its elements do not lie side by side: what a kernel may read by a pointer.

    Raises: ValueError if it is not of this shape and dtype: the kernel would read other memory.
    """
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}; this kernel takes {np.dtype(dtype)} {shape}"
        )
    return backend.array_module(array).ascontiguousarray(array)


def on_device(name: str, value: Any, dtype: Any) -> Any:
    """A number that a kernel reads from the device's memory: there already as a 0-d array, or put there."""
    import cupy

    if isinstance(value, int | float | np.generic):
        return cupy.full((), value, dtype)
    return contiguous(name, value, (), dtype)


def split(size: int, each: int) -> int:
    """How many blocks cover `size` elements, `each` a block."""
    return -(-size // each)


@functools.cache
def _multiprocessors(device: int) -> int:
    import cupy

    return cupy.cuda.Device(device).attributes["MultiProcessorCount"]


def multiprocessors() -> int:
    """How many of them the current device has."""
    return _multiprocessors(_device())


def function(file: str, name: str, dtype: Any, vec: int = 1, **defines: int) -> Any:
    """A kernel, to be launched as function(name, ...)(grid, block, arguments).

    Scalar arguments have to be NumPy scalars of the parameter's type: CuPy passes a Python number as 64
    bits, whatever the kernel takes.
    """
    return _function(
        file, name, np.dtype(dtype).name, vec, tuple(sorted(defines.items())), _device()
    )


def _device() -> int:
    import cupy

    return cupy.cuda.runtime.getDevice()


@functools.cache
def _module(
    file: str, dtype: str, vec: int, defines: tuple[tuple[str, int], ...], device: int
) -> Any:
    import cupy

    return cupy.RawModule(code=source(file), options=options(dtype, vec, **dict(defines)))


@functools.cache
def _function(
    file: str, name: str, dtype: str, vec: int, defines: tuple[tuple[str, int], ...], device: int
) -> Any:
    with _compiling:
        return _module(file, dtype, vec, defines, device).get_function(name)


def prepare() -> None:
    """Have the compiler load its own libraries: several threads at once may fail to."""
    import cupy

    with _compiling:
        nothing = 'extern "C" __global__ void nothing() {}'
        cupy.RawModule(code=nothing, options=("-std=c++17",)).get_function("nothing")
