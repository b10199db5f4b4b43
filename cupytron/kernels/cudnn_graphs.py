"""Attention and its gradient as cuDNN's graphs, built through its Python frontend.

A graph is built once for a shape, which takes cuDNN up to half a second.

Reference: cuDNN frontend documentation, "Scaled Dot Product Attention".
"""

import contextlib
import ctypes
import functools
import importlib.util
import math
import threading
from pathlib import Path
from typing import Any, NamedTuple

from cupytron import backend
from cupytron.errors import CupytronError


class Shape(NamedTuple):
    """What a graph is built for. Strides are those of the arrays, in elements, by (B, N, S, H)."""

    dtype: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_size: int
    strides: tuple[tuple[int, ...], ...]  # of q, k, v, o; backward: and of do, dq, dk, dv
    deterministic: bool
    dropout: float  # probability that one of the softmax's results is dropped
    device: int


class Graph(NamedTuple):
    """A graph that is ready to run, and its tensors in the order in which arrays are passed."""

    graph: Any
    tensors: tuple[Any, ...]
    workspace: int  # bytes
    device: int

    def run(self, *arrays: Any) -> None:
        """Enqueue it on the current stream."""
        import cupy

        cudnn = library()
        # from the current pool, so that a captured graph has its own
        workspace = cupy.cuda.alloc(max(1, self.workspace))
        pointers = {t: x.data.ptr for t, x in zip(self.tensors, arrays, strict=True)}
        handle = _handle(self.device)
        with _lock:  # threads have streams of their own, but share the handle
            cudnn.set_stream(handle=handle, stream=cupy.cuda.get_current_stream().ptr)
            self.graph.execute(pointers, workspace.ptr, handle=handle)


_lock = threading.Lock()


@functools.cache
def forward(shape: Shape) -> Graph:
    """For arrays q, k, v, o, lse; with dropout and seed, offset, int64.

    Raises:
        CupytronError: cuDNN has no kernel for it.
        RuntimeError: there is too little memory to build it.
    """
    graph = _new_graph(shape)
    return _built(graph, shape, add_forward(graph, shape))


@functools.cache
def backward(shape: Shape) -> Graph:
    """For arrays q, k, v, o, do, lse, dq, dk, dv; with dropout and seed, offset, int64.

    Raises:
        CupytronError: cuDNN has no kernel for it.
    """
    graph = _new_graph(shape)
    return _built(graph, shape, add_backward(graph, shape))


def _new_graph(shape: Shape) -> Any:
    cudnn = library()
    return cudnn.pygraph(
        io_data_type=_data_type(shape.dtype),
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=_handle(shape.device),
    )


def add_forward(graph: Any, shape: Shape) -> tuple[Any, ...]:
    """Attention becomes part of the graph; returns its tensors in the order of `forward`."""
    q, k, v = (_input(graph, shape, name, i) for i, name in enumerate("qkv"))
    address = _address(graph, shape)
    o, lse = graph.sdpa(
        q=q,
        k=k,
        v=v,
        attn_scale=1 / math.sqrt(shape.head_size),
        generate_stats=True,
        **_causal(),
        **({"dropout": (shape.dropout, *address)} if address else {}),
    )
    o.set_output(True).set_dim(_dim(shape, 3)).set_stride(list(shape.strides[3]))
    dim, stride = _of_lse(shape)
    lse.set_output(True).set_data_type(library().data_type.FLOAT)
    lse.set_dim(dim).set_stride(stride)
    return q, k, v, o, lse, *address


def add_backward(graph: Any, shape: Shape) -> tuple[Any, ...]:
    """The gradient becomes part of the graph; returns its tensors in the order of `backward`."""
    names = ("q", "k", "v", "o", "do")
    q, k, v, o, do = (_input(graph, shape, name, i) for i, name in enumerate(names))
    dim, stride = _of_lse(shape)
    lse = graph.tensor(name="lse", dim=dim, stride=stride, data_type=library().data_type.FLOAT)
    address = _address(graph, shape)
    gradients = graph.sdpa_backward(
        q=q,
        k=k,
        v=v,
        o=o,
        dO=do,
        stats=lse,
        attn_scale=1 / math.sqrt(shape.head_size),
        use_deterministic_algorithm=shape.deterministic,
        **_causal(),
        **({"dropout": (shape.dropout, *address)} if address else {}),
    )
    for i, gradient in enumerate(gradients):
        gradient.set_output(True).set_dim(_dim(shape, i)).set_stride(list(shape.strides[5 + i]))
    return (q, k, v, o, do, lse, *gradients, *address)


def _address(graph: Any, shape: Shape) -> tuple[Any, ...]:
    """Tensors of the dropout's seed and offset; none without dropout."""
    if not shape.dropout:
        return ()
    one, integer = [1, 1, 1, 1], library().data_type.INT64
    return tuple(
        graph.tensor(name=name, dim=one, stride=one, data_type=integer)
        for name in ("seed", "offset")
    )


def _causal() -> dict[str, Any]:
    """Keys up to the query's own position, counted from the first of both."""
    alignment = library().diagonal_alignment.TOP_LEFT
    return {"diagonal_alignment": alignment, "diagonal_band_right_bound": 0}


def _dim(shape: Shape, tensor: int) -> list[int]:
    """Of q, k, v, o, do."""
    heads = shape.kv_heads if tensor in (1, 2) else shape.heads
    return [shape.batch, heads, shape.tokens, shape.head_size]


def _of_lse(shape: Shape) -> tuple[list[int], list[int]]:
    """Dim and stride: (B, N, S, 1), contiguous."""
    dim = [shape.batch, shape.heads, shape.tokens, 1]
    return dim, [shape.heads * shape.tokens, shape.tokens, 1, 1]


def _input(graph: Any, shape: Shape, name: str, tensor: int) -> Any:
    return graph.tensor(
        name=name,
        dim=_dim(shape, tensor),
        stride=list(shape.strides[tensor]),
        data_type=_data_type(shape.dtype),
    )


def _built(graph: Any, shape: Shape, tensors: tuple[Any, ...]) -> Graph:
    cudnn = library()
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        if backend.is_shortage(error):  # of this moment, and no answer about the shape
            raise
        why = str(error).strip().partition("\n")[0]
        raise CupytronError(f"cuDNN {cudnn.backend_version()} refuses it: {why}") from error
    return Graph(graph, tensors, graph.get_workspace_size(), shape.device)


def _data_type(dtype: str) -> Any:
    types = library().data_type
    return {"bfloat16": types.BFLOAT16, "float16": types.HALF}[dtype]


@functools.cache
def _handle(device: int) -> int:
    return library().create_handle()


@functools.cache
def library() -> Any:
    """cuDNN's frontend.

    Raises:
        CupytronError: it, or cuDNN itself, is not installed.
    """
    _load_runtime()
    _load_cudnn()
    try:
        import cudnn

        cudnn.backend_version()
    except (ImportError, RuntimeError) as error:
        raise CupytronError(
            f"cuDNN cannot be used ({error}): pip install cupytron[cuda13] (or cuda12)"
        ) from error
    return cudnn


def _load_runtime() -> None:
    """Load CUDA's runtime from wherever its wheel is: the frontend knows its name alone.

    Without it, validating a graph fails with "Unable to load any libcudart.so.* library"
    (NVIDIA/cudnn-frontend, issue 207).
    """
    with contextlib.suppress(
        Exception
    ):  # there may be neither wheel nor toolkit; cuDNN says so then
        from cuda.pathfinder import load_nvidia_dynamic_lib

        load_nvidia_dynamic_lib("cudart")


def _load_cudnn() -> None:
    """Load libcudnn from wherever its wheel is: the frontend looks into one site-packages only."""
    try:
        found = importlib.util.find_spec("nvidia.cudnn")
    except ImportError:  # no package nvidia at all
        return
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "lib" / "libcudnn.so.9"
        if path.exists():
            with contextlib.suppress(OSError):  # library() will say that it is missing
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                return


def forget() -> None:
    """Let go of graphs and handles: the library is about to be exchanged, or the device reset."""
    for cached in (forward, backward, _handle, library):
        cached.cache_clear()
