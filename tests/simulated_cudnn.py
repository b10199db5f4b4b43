"""A stand-in for cudnn, the frontend's Python module: causal attention on the simulated GPU's memory.

It takes the calls that cupytron makes, with the real module's names and parameters (test_cudnn_attention.py
compares them), in the order in which a graph is built, and refuses what cuDNN 9.19 was seen to refuse.
Attention is computed in float64 and rounded.
"""

import enum
import itertools
import types
from typing import Any

import ml_dtypes
import numpy as np
from simulated_pointers import device_view, issue

STEPS = [
    "validate",
    "build_operation_graph",
    "create_execution_plans",
    "check_support",
    "build_plans",
]


class data_type(enum.Enum):
    NOT_SET = 0
    FLOAT = 1
    HALF = 3
    BFLOAT16 = 10
    INT64 = 11


class heur_mode(enum.Enum):
    A = 0


class diagonal_alignment(enum.Enum):
    TOP_LEFT = 0
    BOTTOM_RIGHT = 1


class cudnnGraphNotSupportedError(Exception):
    """No RuntimeError, which the real module raises for all else."""


_DTYPES = {
    data_type.FLOAT: np.dtype(np.float32),
    data_type.HALF: np.dtype(np.float16),
    data_type.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    data_type.INT64: np.dtype(np.int64),
}


class Tensor:
    """What a graph knows of one of its tensors."""

    def __init__(self, name: str, dim: Any = None, stride: Any = None, dtype: Any = None) -> None:
        self.name, self.dim, self.stride, self.dtype = name, dim, stride, dtype
        self.output = False

    def set_output(self, arg0: bool) -> "Tensor":
        self.output = arg0
        return self

    def set_dim(self, arg0: list[int]) -> "Tensor":
        self.dim = _ints(arg0)
        return self

    def set_stride(self, arg0: list[int]) -> "Tensor":
        self.stride = _ints(arg0)
        return self

    def set_data_type(self, data_type: data_type) -> "Tensor":
        self.dtype = data_type
        return self

    def at(self, pointer: int) -> np.ndarray:
        assert pointer and pointer % 16 == 0, f"{self.name} is not aligned to 16 bytes"
        dtype = _DTYPES[self.dtype]
        strides = tuple(s * dtype.itemsize for s in self.stride)
        return device_view(pointer, tuple(self.dim), dtype, strides)


def _ints(values: Any) -> list[int]:
    assert isinstance(values, list) and all(type(v) is int for v in values), values
    return values


class Library:
    """Handles, and counters: graphs built, executions, and of these the deterministic ones."""

    def __init__(self) -> None:
        self.streams: dict[int, int] = {}
        self._numbers = itertools.count(0x9000, 8)
        self.built = self.executions = self.deterministic = 0

    def create_handle(self) -> int:
        handle = next(self._numbers)
        self.streams[handle] = 0
        return handle

    def set_stream(self, handle: int, stream: int) -> None:
        assert handle in self.streams
        self.streams[handle] = stream

    def backend_version(self) -> int:
        return 91900

    def pygraph(
        self,
        io_data_type: data_type = data_type.NOT_SET,
        intermediate_data_type: data_type = data_type.NOT_SET,
        compute_data_type: data_type = data_type.NOT_SET,
        handle: int | None = None,
    ) -> "Graph":
        assert handle in self.streams
        assert (intermediate_data_type, compute_data_type) == (data_type.FLOAT, data_type.FLOAT)
        return Graph(self, io_data_type)


class Graph:
    """As pygraph, with one operation."""

    def __init__(self, library: Library, io: data_type) -> None:
        self._library, self._io = library, io
        self._steps: list[str] = []
        self._operation: Any = None

    def tensor(
        self, dim: Any, stride: Any, data_type: Any = data_type.NOT_SET, name: str = ""
    ) -> Tensor:
        return Tensor(name, _ints(dim), _ints(stride), data_type)

    def sdpa(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_scale: float | None = None,
        diagonal_alignment: diagonal_alignment = diagonal_alignment.TOP_LEFT,
        diagonal_band_right_bound: int | None = None,
        generate_stats: bool | None = None,
        dropout: Any = None,
    ) -> list[Tensor]:
        assert generate_stats, "backward needs them"
        outputs = [Tensor("o", dtype=self._io), Tensor("stats")]
        self._set(
            "forward", (q, k, v), outputs, attn_scale, diagonal_alignment, diagonal_band_right_bound
        )
        self._set_dropout(dropout)
        return outputs

    def _set_dropout(self, dropout: Any) -> None:
        self._p, *address = dropout or (0.0,)
        assert 0 < self._p < 1 or not address
        for tensor in address:
            assert (tensor.dim, tensor.dtype) == ([1, 1, 1, 1], data_type.INT64)
        self._inputs = (*self._inputs, *address)

    def sdpa_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        dO: Tensor,
        stats: Tensor,
        attn_scale: float | None = None,
        diagonal_alignment: diagonal_alignment = diagonal_alignment.TOP_LEFT,
        diagonal_band_right_bound: int | None = None,
        use_deterministic_algorithm: bool = False,
        dropout: Any = None,
    ) -> list[Tensor]:
        outputs = [Tensor(name, dtype=self._io) for name in ("dq", "dk", "dv")]
        inputs = (q, k, v, o, dO, stats)
        self._set(
            "backward", inputs, outputs, attn_scale, diagonal_alignment, diagonal_band_right_bound
        )
        self._deterministic = use_deterministic_algorithm
        self._set_dropout(dropout)
        return outputs

    def _set(
        self, name: str, inputs: Any, outputs: Any, scale: Any, alignment: Any, right_bound: Any
    ) -> None:
        assert self._operation is None and not self._steps
        assert alignment is diagonal_alignment.TOP_LEFT and right_bound == 0, "not causal"
        self._operation, self._inputs, self._outputs, self._scale = name, inputs, outputs, scale
        self._deterministic = False

    def validate(self) -> None:
        self._step("validate")
        q, k, v = self._inputs[:3]
        batch, heads, tokens, size = q.dim
        assert k.dim == v.dim and k.dim[0] == batch and k.dim[2:] == [tokens, size]
        assert heads % k.dim[1] == 0
        lse = self._outputs[1] if self._operation == "forward" else self._inputs[5]
        assert lse.dtype is data_type.FLOAT and lse.dim == [batch, heads, tokens, 1]
        for tensor in (*self._inputs, *self._outputs):
            assert tensor.dim and tensor.stride and len(tensor.dim) == len(tensor.stride) == 4
            if tensor is not lse and tensor.dtype is not data_type.INT64:
                assert tensor.dtype is self._io is not data_type.NOT_SET
                assert tensor.stride[-1] == 1, "the last dim has to be contiguous"
        assert all(tensor.output for tensor in self._outputs)
        if size % 8 or size > 256:
            raise cudnnGraphNotSupportedError(
                "Num hidden_dim should be less than or equal to 256 and hidden_dim should be multiple of 8"
            )
        if self._operation == "backward" and tokens == 1:
            raise cudnnGraphNotSupportedError("s_q = s_kv = 1 is not supported.")

    def build_operation_graph(self) -> None:
        self._step("build_operation_graph")

    def create_execution_plans(self, arg0: list[heur_mode]) -> None:
        assert arg0 == [heur_mode.A]
        self._step("create_execution_plans")

    def check_support(self) -> None:
        self._step("check_support")

    def build_plans(self) -> None:
        self._step("build_plans")
        self._library.built += 1

    def _step(self, name: str) -> None:
        assert name == STEPS[len(self._steps)], f"{name} after {self._steps}"
        self._steps.append(name)

    def get_workspace_size(self) -> int:
        assert self._steps == STEPS
        return 0 if self._operation == "forward" else 4 * int(np.prod(self._inputs[0].dim))

    def execute(
        self, tensor_to_device_buffer: dict[Tensor, int], workspace: int, handle: int | None = None
    ) -> None:
        import cupy

        assert self._steps == STEPS
        library, needed = self._library, self.get_workspace_size()
        assert handle in library.streams
        stream = library.streams[handle]
        assert stream == cupy.cuda.get_current_stream().ptr, "not the current stream"
        assert workspace and workspace % 16 == 0
        assert set(tensor_to_device_buffer) == {*self._inputs, *self._outputs}
        assert all(type(p) is int for p in (*tensor_to_device_buffer.values(), workspace))
        library.executions += 1
        library.deterministic += self._deterministic
        inputs = [t.at(tensor_to_device_buffer[t]) for t in self._inputs]
        outputs = [t.at(tensor_to_device_buffer[t]) for t in self._outputs]
        scratch = device_view(workspace, (needed,), np.dtype(np.uint8))
        function = _forward if self._operation == "forward" else _backward

        def compute() -> None:
            scratch[...] = 0xAB
            mask = 1.0
            arrays = inputs
            if self._p:
                *arrays, seed, offset = inputs
                mask = _mask(self._p, int(seed.item()), int(offset.item()), inputs[0].shape)
            wide = [x.astype(np.float64) for x in arrays]
            for out, value in zip(outputs, function(*wide, self._scale, mask), strict=True):
                out[...] = value.astype(out.dtype)

        issue(f"cudnn_{self._operation}", compute, inputs, [*outputs, scratch], stream)


def _per_head(x: np.ndarray, heads: int) -> np.ndarray:
    """(B, N_kv, S, H) for each query head: (B, N, S, H)."""
    return np.repeat(x, heads // x.shape[1], axis=1)


def _scores(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    s = scale * q @ _per_head(k, q.shape[1]).swapaxes(-1, -2)
    return np.where(np.tri(q.shape[2], dtype=bool), s, -np.inf)


def _mask(p: float, seed: int, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Factors of the probabilities (B, N, S, S), by an address as cuDNN's generator has one."""
    batch, heads, tokens, _ = shape
    rng = np.random.Generator(np.random.Philox(key=seed % (1 << 64), counter=offset % (1 << 64)))
    return (rng.random((batch, heads, tokens, tokens)) >= p) / (1 - p)


def _forward(q: Any, k: Any, v: Any, scale: float, mask: Any) -> list[np.ndarray]:
    s = _scores(q, k, scale)
    peak = s.max(axis=-1, keepdims=True)
    total = np.exp(s - peak).sum(axis=-1, keepdims=True)
    p = mask * np.exp(s - peak) / total
    return [p @ _per_head(v, q.shape[1]), peak + np.log(total)]


def _backward(
    q: Any, k: Any, v: Any, o: Any, do: Any, stats: Any, scale: float, mask: Any
) -> list[np.ndarray]:
    heads = q.shape[1]
    p = np.exp(_scores(q, k, scale) - stats)
    dp = mask * (do @ _per_head(v, heads).swapaxes(-1, -2))
    ds = scale * p * (dp - (do * o).sum(axis=-1, keepdims=True))
    dk, dv = ds.swapaxes(-1, -2) @ q, (mask * p).swapaxes(-1, -2) @ do
    grouped = (k.shape[0], k.shape[1], heads // k.shape[1], *k.shape[2:])
    return [ds @ _per_head(k, heads), *(x.reshape(grouped).sum(axis=2) for x in (dk, dv))]


def module() -> types.ModuleType:
    """cudnn, with `simulation`, the Library behind it."""
    made: Any = types.ModuleType("cudnn")
    made.simulation = library = Library()
    for name in ("create_handle", "set_stream", "backend_version", "pygraph"):
        setattr(made, name, getattr(library, name))
    for thing in (data_type, heur_mode, diagonal_alignment, cudnnGraphNotSupportedError):
        setattr(made, thing.__name__, thing)
    return made
