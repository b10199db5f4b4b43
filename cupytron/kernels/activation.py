"""Activation functions: see activation.cu. What GELU and ReLU save is x, which they do not overwrite."""

from typing import Any

import numpy as np

from cupytron import backend
from cupytron.kernels import loader

_THREADS = 256
_PACKS = 2  # PACKS in activation.cu


def gelu(x: Any) -> tuple[Any, Any]:
    """As ops.gelu; saved is x, and y is new."""
    return _forward("gelu", x)


def gelu_backward(dy: Any, saved: Any) -> Any:
    """As ops.gelu_backward: overwrites dy, unless it has gaps."""
    return _backward("gelu_backward", dy, saved)


def gelu_exact(x: Any) -> tuple[Any, Any]:
    """As ops.gelu_exact; saved is x, and y is new."""
    return _forward("gelu_exact", x)


def gelu_exact_backward(dy: Any, saved: Any) -> Any:
    """As ops.gelu_exact_backward: overwrites dy, unless it has gaps."""
    return _backward("gelu_exact_backward", dy, saved)


def relu(x: Any) -> tuple[Any, Any]:
    """As ops.relu; saved is x, and y is new."""
    return _forward("relu", x)


def relu_backward(dy: Any, saved: Any) -> Any:
    """As ops.relu_backward: overwrites dy, unless it has gaps."""
    return _backward("relu_backward", dy, saved)


def _forward(name: str, x: Any) -> tuple[Any, Any]:
    x = loader.contiguous("x", x, x.shape, x.dtype)
    y = backend.array_module(x).empty(x.shape, x.dtype)
    vec = loader.access(x.size, x)
    _launch(name, x.dtype, vec, x.size // vec, x, y)
    return y, x


def _backward(name: str, dy: Any, saved: Any) -> Any:
    dy = loader.contiguous("dy", dy, saved.shape, saved.dtype)
    vec = loader.access(dy.size, dy, saved)
    _launch(name, dy.dtype, vec, dy.size // vec, dy, saved, dy)
    return dy


def swiglu(gate: Any, up: Any) -> Any:
    """As ops.swiglu; gate and up may be columns of one array."""
    gate, up = _columns("gate", gate, gate), _columns("up", up, gate)
    y = backend.array_module(gate).empty(gate.shape, gate.dtype)
    vec, shape = _shape(gate, up)
    _launch("swiglu", gate.dtype, vec, y.size // vec, gate, up, y, after=shape)
    return y


def swiglu_backward(dy: Any, gate: Any, up: Any) -> tuple[Any, Any]:
    """As ops.swiglu_backward; gate and up may be columns of one array."""
    gate, up = _columns("gate", gate, gate), _columns("up", up, gate)
    dy = loader.contiguous("dy", dy, gate.shape, gate.dtype)
    xp = backend.array_module(dy)
    dgate, dup = xp.empty(dy.shape, dy.dtype), xp.empty(dy.shape, dy.dtype)
    vec, shape = _shape(gate, up, dy)
    packs = dy.size // vec
    _launch("swiglu_backward", dy.dtype, vec, packs, dy, gate, up, dgate, dup, after=shape)
    return dgate, dup


def _columns(name: str, x: Any, like: Any) -> Any:
    """x, copied if its rows have gaps in them; there may be some between them."""
    if x.strides[1] == x.itemsize and x.shape == like.shape and x.dtype == like.dtype:
        return x
    return loader.contiguous(name, x, like.shape, like.dtype)


def _shape(gate: Any, up: Any, *others: Any) -> tuple[int, tuple[Any, ...]]:
    """VEC, and what the kernel has to know of rows: how many packs they have, and where they begin."""
    vec = loader.access(gate.shape[1], gate, up, *others)
    strides = [x.strides[0] // x.itemsize for x in (gate, up)]
    if any(stride % vec for stride in strides):
        vec = 1
    return vec, tuple(map(np.int64, (gate.shape[1] // vec, *strides)))


def _launch(
    name: str, dtype: Any, vec: int, packs: int, *arrays: Any, after: tuple[Any, ...] = ()
) -> None:
    if not packs:
        return
    loader.function("activation", name, dtype, vec)(
        (loader.split(packs, _THREADS * _PACKS),), (_THREADS,), (*arrays, np.int64(packs), *after)
    )
