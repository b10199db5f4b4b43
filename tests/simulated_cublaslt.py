"""A stand-in for nvmath.bindings.cublasLt: the calls that cupytron makes, on the simulated GPU's memory.

Names, parameters, numbers and sizes are the real module's (test_products.py compares them). It is stricter
than the real one where that can notice a mistake: pointers have to keep the alignment that was promised to
the heuristics, algorithms belong to one problem, and the stream has to be the current one.

Each algorithm adds up its sums in another order, so that choosing another one changes the last bits.
"""

import ctypes
import enum
import itertools
import types
from typing import Any

import ml_dtypes
import numpy as np
from simulated_pointers import device_view, issue

TYPES = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float64),
    2: np.dtype(np.float16),
    14: np.dtype(ml_dtypes.bfloat16),
}
WORKSPACES = (0, 4096, 1 << 20)  # bytes that the algorithms need
NOT_INITIALIZED, INVALID_VALUE, NOT_SUPPORTED = 1, 7, 15

matmul_algo_dtype = np.dtype([("data_", "<u8", (8,))])
matmul_heuristic_result_dtype = np.dtype(
    [
        ("algo", matmul_algo_dtype),
        ("workspace_size", "<u8"),
        ("state", "<i4"),
        ("waves_count", "<f4"),
        ("reserved", "<i4", (4,)),
    ]
)


class cuBLASLtError(Exception):
    def __init__(self, status: int, why: str = "") -> None:
        self.status = status
        super().__init__(f"status {status}: {why}")


class MatmulDescAttribute(enum.IntEnum):
    TRANSA = 3
    TRANSB = 4
    EPILOGUE = 7
    BIAS_POINTER = 8
    BIAS_DATA_TYPE = 26


class MatrixLayoutAttribute(enum.IntEnum):
    BATCH_COUNT = 5
    STRIDED_BATCH_OFFSET = 6


class MatmulPreferenceAttribute(enum.IntEnum):
    MAX_WORKSPACE_BYTES = 1
    REDUCTION_SCHEME_MASK = 3
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


class Epilogue(enum.IntEnum):
    DEFAULT = 1
    BIAS = 4


class ReductionScheme(enum.IntEnum):
    COMPUTE_TYPE = 2


_SIZES: dict[Any, Any] = {
    **dict.fromkeys((MatmulDescAttribute.TRANSA, MatmulDescAttribute.TRANSB), np.int32),
    MatmulDescAttribute.EPILOGUE: np.uint32,
    MatmulDescAttribute.BIAS_POINTER: np.int64,
    MatmulDescAttribute.BIAS_DATA_TYPE: np.int32,
}
_LAYOUT_SIZES: dict[Any, Any] = {
    MatrixLayoutAttribute.BATCH_COUNT: np.int32,
    MatrixLayoutAttribute.STRIDED_BATCH_OFFSET: np.int64,
}
_PREFERENCE_SIZES: dict[Any, Any] = {
    **dict.fromkeys(MatmulPreferenceAttribute, np.uint32),
    MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES: np.uint64,
}


class _Thing:
    """A descriptor, a layout or a preference."""

    def __init__(self, kind: str, **values: Any) -> None:
        self.kind, self.values = kind, values
        self.attributes: dict[int, int] = {}


class Library:
    """The module's functions. `calls` counts matmul, `heuristics` the queries."""

    def __init__(self) -> None:
        self._things: dict[int, _Thing] = {}
        self._numbers = itertools.count(0x1000, 8)
        self._problems: list[tuple[Any, ...]] = []
        self.calls = self.heuristics = 0

    def create(self) -> int:
        return self._new("handle")

    def get_version(self) -> int:
        return 130100

    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        if (compute_type, scale_type) not in ((68, 0), (77, 0), (70, 1)):
            raise cuBLASLtError(
                INVALID_VALUE, f"compute type {compute_type} scaled in {scale_type}"
            )
        return self._new("descriptor", compute=compute_type, scale=scale_type)

    def matmul_desc_set_attribute(
        self, matmul_desc: int, attr: int, buf: int, size_in_bytes: int
    ) -> None:
        self._set("descriptor", matmul_desc, MatmulDescAttribute(attr), buf, size_in_bytes, _SIZES)

    def get_matmul_desc_attribute_dtype(self, attr: int) -> Any:
        return _SIZES[MatmulDescAttribute(attr)]

    def matrix_layout_create(self, type: int, rows: int, cols: int, ld: int) -> int:
        if rows < 1 or cols < 1 or ld < rows:
            raise cuBLASLtError(INVALID_VALUE, f"a layout of {rows} rows, {cols} columns, ld {ld}")
        return self._new("layout", dtype=TYPES[type], rows=rows, cols=cols, ld=ld)

    def matrix_layout_set_attribute(
        self, mat_layout: int, attr: int, buf: int, size_in_bytes: int
    ) -> None:
        known = MatrixLayoutAttribute(attr)
        self._set("layout", mat_layout, known, buf, size_in_bytes, _LAYOUT_SIZES)

    def get_matrix_layout_attribute_dtype(self, attr: int) -> Any:
        return _LAYOUT_SIZES[MatrixLayoutAttribute(attr)]

    def matmul_preference_create(self) -> int:
        return self._new("preference")

    def matmul_preference_set_attribute(
        self, pref: int, attr: int, buf: int, size_in_bytes: int
    ) -> None:
        known = MatmulPreferenceAttribute(attr)
        self._set("preference", pref, known, buf, size_in_bytes, _PREFERENCE_SIZES)

    def get_matmul_preference_attribute_dtype(self, attr: int) -> Any:
        return _PREFERENCE_SIZES[MatmulPreferenceAttribute(attr)]

    def matmul_preference_destroy(self, pref: int) -> None:
        self._get("preference", pref)
        del self._things[pref]

    def matmul_algo_get_heuristic(
        self,
        light_handle: int,
        operation_desc: int,
        adesc: int,
        bdesc: int,
        cdesc: int,
        ddesc: int,
        preference: int,
        requested_algo_count: int,
        heuristic_results_array: int,
        return_algo_count: int,
    ) -> None:
        self.heuristics += 1
        self._get("handle", light_handle)
        problem = self._problem(operation_desc, adesc, bdesc, cdesc, ddesc)
        wishes = self._get("preference", preference).attributes
        assert wishes[MatmulPreferenceAttribute.REDUCTION_SCHEME_MASK] == 2, (
            "sums in half precision"
        )
        room = wishes[MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES]
        count = min(sum(size <= room for size in WORKSPACES), requested_algo_count)
        results = _host(
            heuristic_results_array, requested_algo_count, matmul_heuristic_result_dtype
        )
        for i in range(count):
            number = len(self._problems)
            self._problems.append((problem, i, dict(wishes)))
            results[i]["algo"]["data_"][:] = number
            results[i]["workspace_size"] = WORKSPACES[i]
            results[i]["state"] = 0
        _host(return_algo_count, 1, np.dtype(np.int32))[0] = count

    def matmul(
        self,
        light_handle: int,
        compute_desc: int,
        alpha: int,
        a: int,
        adesc: int,
        b: int,
        bdesc: int,
        beta: int,
        c: int,
        cdesc: int,
        d: int,
        ddesc: int,
        algo: int,
        workspace: int,
        workspace_size_in_bytes: int,
        stream: int,
    ) -> None:
        import cupy

        self.calls += 1
        self._get("handle", light_handle)
        problem = self._problem(compute_desc, adesc, bdesc, cdesc, ddesc)
        planned, number, wishes = self._problems[
            int(_host(algo, 1, matmul_algo_dtype)[0]["data_"][0])
        ]
        assert planned == problem, "an algorithm of another problem"
        assert stream == cupy.cuda.get_current_stream().ptr, "not the current stream"
        assert workspace_size_in_bytes >= WORKSPACES[number], "the workspace is too small"
        assert workspace or not workspace_size_in_bytes
        assert workspace % 256 == 0, "the workspace is not aligned"
        for letter, pointer in zip("ABCD", (a, b, c, d), strict=True):
            alignment = wishes[MatmulPreferenceAttribute[f"MIN_ALIGNMENT_{letter}_BYTES"]]
            assert pointer and pointer % alignment == 0, (
                f"{letter} is not aligned to {alignment} bytes"
            )
        descriptor = self._get("descriptor", compute_desc)
        scale = TYPES[descriptor.values["scale"]]
        one, beta_value = (_host(p, 1, scale)[0] for p in (alpha, beta))
        assert one == 1 and (c, cdesc) == (d, ddesc)
        matrices = [self._view(desc, p) for desc, p in ((adesc, a), (bdesc, b), (ddesc, d))]
        bias = self._bias(descriptor, matrices[2])
        scratch = device_view(workspace, (WORKSPACES[number],), np.dtype(np.uint8))
        tf32 = descriptor.values["compute"] == 77
        transposed = [
            descriptor.attributes.get(x, 0)
            for x in (MatmulDescAttribute.TRANSA, MatmulDescAttribute.TRANSB)
        ]

        def compute() -> None:
            scratch[...] = 0xAB
            left, right = (
                x.astype(scale).swapaxes(-1, -2) if t else x.astype(scale)
                for x, t in zip(matrices, transposed, strict=False)
            )
            if tf32:
                left, right = _rounded(left), _rounded(right)
            total = _in_parts(left, right, number + 1)
            out = matrices[2]
            if beta_value:
                total = total + beta_value * out.astype(scale)
            if bias is not None:
                total = total + bias.astype(scale)[:, None]
            with np.errstate(over="ignore"):
                out[...] = total.astype(out.dtype)

        reads = [
            *matrices[:2],
            *([matrices[2]] if beta_value else []),
            *([] if bias is None else [bias]),
        ]
        issue("cublasLtMatmul", compute, reads, [matrices[2], scratch], stream)

    def _new(self, kind: str, **values: Any) -> int:
        number = next(self._numbers)
        self._things[number] = _Thing(kind, **values)
        return number

    def _get(self, kind: str, number: int) -> _Thing:
        thing = self._things.get(number)
        if thing is None or thing.kind != kind:
            raise cuBLASLtError(NOT_INITIALIZED, f"{number} is no {kind}")
        return thing

    def _set(self, kind: str, number: int, attribute: Any, buf: int, size: int, sizes: Any) -> None:
        dtype = np.dtype(sizes[attribute])
        assert size == dtype.itemsize, f"{attribute.name} has {dtype.itemsize} bytes, not {size}"
        self._get(kind, number).attributes[attribute] = int(_host(buf, 1, dtype)[0])

    def _problem(
        self, desc: int, adesc: int, bdesc: int, cdesc: int, ddesc: int
    ) -> tuple[Any, ...]:
        """All that an algorithm depends on; refuses what does not fit together, as the real one does."""
        descriptor = self._get("descriptor", desc)
        layouts = [self._get("layout", x) for x in (adesc, bdesc, cdesc, ddesc)]
        attributes = {k: v for k, v in descriptor.attributes.items() if k.name != "BIAS_POINTER"}
        shapes = [(x.values["rows"], x.values["cols"]) for x in layouts]
        for i, name in enumerate(("TRANSA", "TRANSB")):
            if attributes.get(MatmulDescAttribute[name], 0):
                shapes[i] = shapes[i][::-1]
        (m, k), (k2, n) = shapes[:2]
        if k != k2 or shapes[2:] != [(m, n)] * 2:
            raise cuBLASLtError(INVALID_VALUE, f"shapes {shapes}")
        dtypes = [x.values["dtype"].name for x in layouts]
        half = dtypes[0] in ("float16", "bfloat16")
        allowed = [dtypes[0], "float32"] if half else [dtypes[0]]
        if dtypes[1] != dtypes[0] or dtypes[2] not in allowed or dtypes[3] != dtypes[2]:
            raise cuBLASLtError(NOT_SUPPORTED, f"types {dtypes}")
        wide = dtypes[0] == "float64"
        if wide != (descriptor.values["compute"] == 70):
            raise cuBLASLtError(NOT_SUPPORTED, f"{dtypes[0]} computed otherwise")
        if descriptor.values["compute"] == 77 and dtypes[0] != "float32":
            raise cuBLASLtError(NOT_SUPPORTED, f"TF32 of {dtypes[0]}")
        if attributes.get(MatmulDescAttribute.EPILOGUE) == Epilogue.BIAS:
            if wide or TYPES[attributes[MatmulDescAttribute.BIAS_DATA_TYPE]].name != dtypes[3]:
                raise cuBLASLtError(NOT_SUPPORTED, "this type of bias")
        batches = {x.attributes.get(MatrixLayoutAttribute.BATCH_COUNT, 1) for x in layouts}
        if len(batches) > 1:
            raise cuBLASLtError(INVALID_VALUE, f"batches of {batches}")
        described = [(*x.values.items(), *x.attributes.items()) for x in layouts]
        return (*descriptor.values.items(), *attributes.items(), *described)

    def _view(self, desc: int, pointer: int) -> np.ndarray:
        """(batch, rows, columns), or without the batch."""
        layout = self._get("layout", desc)
        dtype, rows, cols, ld = (layout.values[x] for x in ("dtype", "rows", "cols", "ld"))
        shape, strides = (rows, cols), (dtype.itemsize, ld * dtype.itemsize)
        batch = layout.attributes.get(MatrixLayoutAttribute.BATCH_COUNT, 1)
        if batch > 1:
            step = layout.attributes[MatrixLayoutAttribute.STRIDED_BATCH_OFFSET]
            shape, strides = (batch, *shape), (step * dtype.itemsize, *strides)
        return device_view(pointer, shape, dtype, strides)

    def _bias(self, descriptor: _Thing, out: np.ndarray) -> np.ndarray | None:
        if descriptor.attributes.get(MatmulDescAttribute.EPILOGUE) != Epilogue.BIAS:
            return None
        pointer = descriptor.attributes[MatmulDescAttribute.BIAS_POINTER]
        assert pointer and pointer % 16 == 0, "the bias is not aligned"
        return device_view(
            pointer,
            (out.shape[-2],),
            TYPES[descriptor.attributes[MatmulDescAttribute.BIAS_DATA_TYPE]],
        )


def _host(pointer: int, count: int, dtype: np.dtype) -> np.ndarray:
    """Host memory at an address."""
    return np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(pointer), dtype)


def _rounded(x: np.ndarray) -> np.ndarray:
    """To TF32: 10 bits of fraction."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _in_parts(left: np.ndarray, right: np.ndarray, parts: int) -> np.ndarray:
    """left @ right, summed over every `parts`-th inner index first (an algorithm's split-K)."""
    parts = min(parts, left.shape[-1])
    sums = [left[..., i::parts] @ right[..., i::parts, :] for i in range(parts)]
    return sum(sums[1:], sums[0])


def module() -> types.ModuleType:
    """nvmath.bindings.cublasLt, with `simulation`, the Library behind it."""
    made: Any = types.ModuleType("nvmath.bindings.cublasLt")
    made.simulation = library = Library()
    for name in dir(library):
        if not name.startswith("_") and callable(getattr(library, name)):
            setattr(made, name, getattr(library, name))
    for thing in (
        *(cuBLASLtError, MatmulDescAttribute, MatrixLayoutAttribute, MatmulPreferenceAttribute),
        *(Epilogue, ReductionScheme),
    ):
        setattr(made, thing.__name__, thing)
    made.matmul_algo_dtype = matmul_algo_dtype
    made.matmul_heuristic_result_dtype = matmul_heuristic_result_dtype
    return made
