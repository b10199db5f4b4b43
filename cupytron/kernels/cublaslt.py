"""One matrix product, as cuBLASLt is told about it, and the algorithms that it offers.

cuBLASLt reads columns: D = op(A) op(B) [+ bias] or D += op(A) op(B), with matrices whose columns are
contiguous and `ld` elements apart. products.py says how arrays become such matrices.

The library is called through nvmath.bindings.cublasLt, with addresses, the current stream and a workspace
from CuPy's pool: nothing is allocated or bound behind our back, so that products can be captured into a
graph.

Reference: cuBLAS documentation, "Using the cuBLASLt API".
"""

import functools
import threading
from typing import Any, NamedTuple

import numpy as np

from cupytron.errors import CupytronError

WORKSPACE = 32 << 20  # bytes that an algorithm may need; for Hopper's that is enough
ALIGNMENT = 16  # bytes; none of the algorithms for these types asks for more
_HEURISTICS = 32  # algorithms that are asked for; products are most of a step

# cudaDataType; accumulated and scaled in float32, float64 in float64
_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
_COMPUTE_32F, _COMPUTE_64F, _COMPUTE_32F_FAST_TF32 = 68, 70, 77  # cublasComputeType_t
_SOME_BIAS = 1 << 20  # an address for the heuristics, which may ask for one and its alignment
_NOT_SUPPORTED = 15  # cublasStatus_t
_SCALARS = {name: np.array([0, 1], name) for name in ("float32", "float64")}


class Problem(NamedTuple):
    """All that the choice of an algorithm may depend on. Sizes and strides are in elements."""

    dtype: str  # of A, B and bias: float64, float32, float16 or bfloat16
    out_dtype: str  # of D: the same, or float32
    m: int  # D is (m, n), op(A) (m, k), op(B) (k, n)
    n: int
    k: int
    transpose: tuple[bool, bool]  # of A, of B
    ld: tuple[int, int, int]  # of A, B, D
    batch: int = 1
    batch_strides: tuple[int, int, int] = (0, 0, 0)
    alignments: tuple[int, int, int] = (ALIGNMENT, ALIGNMENT, ALIGNMENT)  # bytes
    bias: bool = False
    tf32: bool = False

    @property
    def key(self) -> str:
        """The problem in words, the same in every process: under it choices are kept."""
        ops = "".join("NT"[int(t)] for t in self.transpose)
        parts = [f"{self.dtype}>{self.out_dtype} {self.m}x{self.n}x{self.k} {ops}"]
        parts += ["ld " + ",".join(map(str, self.ld))]
        if self.batch > 1:
            parts += [f"batch {self.batch} " + ",".join(map(str, self.batch_strides))]
        parts += ["aligned " + ",".join(map(str, self.alignments))]
        return " ".join(parts + ["bias"] * self.bias + ["tf32"] * self.tf32)


class Plan:
    """Descriptors of a problem and the algorithms that can solve it. It lives as long as the process.

    Attributes:
        algorithm: index of the one that is used; 0 is what the library's heuristics take for the best.
        count: how many there are.
        decided: whether product_plans has chosen it.
    """

    def __init__(self, problem: Problem) -> None:
        lt = library()
        self.problem = problem
        self.algorithm, self.decided = 0, False
        self._matmul = lt.matmul
        self._handle = handle()
        self._descriptor = lt.matmul_desc_create(_compute_type(problem), _scale_type(problem))
        self._layouts = _layouts(lt, problem)
        self._lock = threading.Lock()  # the bias's address is part of the descriptor
        attribute = lt.MatmulDescAttribute
        for name, transpose in (("TRANSA", 0), ("TRANSB", 1)):
            self._set(attribute[name], int(problem.transpose[transpose]))
        if problem.bias:
            self._set(attribute.EPILOGUE, lt.Epilogue.BIAS)
            self._set(attribute.BIAS_DATA_TYPE, _TYPES[problem.dtype])
            self._set(attribute.BIAS_POINTER, _SOME_BIAS)
        self._bias = _SOME_BIAS if problem.bias else 0
        self._results = _heuristics(lt, problem, self._handle, self._descriptor, self._layouts)
        self.count = len(self._results)
        self._workspaces = [int(size) for size in self._results["workspace_size"]]
        self._first_algorithm = self._results.ctypes.data  # a result begins with it
        scalars = _SCALARS["float64" if problem.dtype == "float64" else "float32"]
        self._zero = scalars.ctypes.data
        self._one = self._zero + scalars.itemsize

    def run(
        self, a: int, b: int, d: int, bias: int = 0, add: bool = False, algorithm: int | None = None
    ) -> None:
        """D = op(A) op(B) + bias, or with `add` D += op(A) op(B), on the current stream.

        Args:
            a, b, d, bias: addresses; bias is not 0 exactly if the problem has one.
            algorithm: another one than the chosen one.
        """
        import cupy

        index = self.algorithm if algorithm is None else algorithm
        # from the current pool: a captured graph then has its own, and nothing else writes into it
        workspace = cupy.cuda.alloc(self._workspaces[index])
        with self._lock:
            if bias != self._bias:
                self._set(library().MatmulDescAttribute.BIAS_POINTER, bias)
                self._bias = bias
            self._matmul(
                self._handle,
                self._descriptor,
                self._one,
                a,
                self._layouts[0],
                b,
                self._layouts[1],
                self._one if add else self._zero,
                d,  # C is D
                self._layouts[2],
                d,
                self._layouts[2],
                self._first_algorithm + index * self._results.itemsize,
                workspace.ptr,
                self._workspaces[index],
                current_stream().ptr,
            )

    def _set(self, attribute: Any, value: int) -> None:
        lt = library()
        dtype = lt.get_matmul_desc_attribute_dtype(attribute)
        _set(lt.matmul_desc_set_attribute, self._descriptor, attribute, value, dtype)


def _compute_type(problem: Problem) -> int:
    if problem.dtype == "float64":
        return _COMPUTE_64F
    return _COMPUTE_32F_FAST_TF32 if problem.tf32 else _COMPUTE_32F


def _scale_type(problem: Problem) -> int:
    return _TYPES["float64" if problem.dtype == "float64" else "float32"]


def _layouts(lt: Any, problem: Problem) -> list[int]:
    """Of A, B and D, as they lie in memory."""
    m, n, k = problem.m, problem.n, problem.k
    transpose_a, transpose_b = problem.transpose
    shapes = [(k, m) if transpose_a else (m, k), (n, k) if transpose_b else (k, n), (m, n)]
    types = [problem.dtype, problem.dtype, problem.out_dtype]
    layouts = []
    for i, (rows, columns) in enumerate(shapes):
        layout = lt.matrix_layout_create(_TYPES[types[i]], rows, columns, problem.ld[i])
        if problem.batch > 1:
            attributes = lt.MatrixLayoutAttribute
            for attribute, value in (
                (attributes.BATCH_COUNT, problem.batch),
                (attributes.STRIDED_BATCH_OFFSET, problem.batch_strides[i]),
            ):
                dtype = lt.get_matrix_layout_attribute_dtype(attribute)
                _set(lt.matrix_layout_set_attribute, layout, attribute, value, dtype)
        layouts.append(layout)
    return layouts


def _heuristics(
    lt: Any, problem: Problem, handle: int, descriptor: int, layouts: list[int]
) -> np.ndarray:
    """The algorithms that the library proposes, best first; may be none."""
    preference = lt.matmul_preference_create()
    attributes = lt.MatmulPreferenceAttribute
    a, b, d = problem.alignments
    for attribute, value in (
        (attributes.MAX_WORKSPACE_BYTES, WORKSPACE),
        # parts of a sum are added up in float32 or float64, never in half precision
        (attributes.REDUCTION_SCHEME_MASK, lt.ReductionScheme.COMPUTE_TYPE),
        (attributes.MIN_ALIGNMENT_A_BYTES, a),
        (attributes.MIN_ALIGNMENT_B_BYTES, b),
        (attributes.MIN_ALIGNMENT_C_BYTES, d),
        (attributes.MIN_ALIGNMENT_D_BYTES, d),
    ):
        dtype = lt.get_matmul_preference_attribute_dtype(attribute)
        _set(lt.matmul_preference_set_attribute, preference, attribute, value, dtype)
    results = np.zeros(_HEURISTICS, lt.matmul_heuristic_result_dtype)
    found = np.zeros(1, np.int32)
    arguments = (descriptor, layouts[0], layouts[1], layouts[2], layouts[2], preference)
    try:
        lt.matmul_algo_get_heuristic(
            handle, *arguments, _HEURISTICS, results.ctypes.data, found.ctypes.data
        )
    except lt.cuBLASLtError as error:
        if error.status != _NOT_SUPPORTED:
            raise
        found[0] = 0
    finally:
        lt.matmul_preference_destroy(preference)
    results = results[: found[0]]
    return np.ascontiguousarray(results[results["state"] == 0])


def _set(function: Any, thing: int, attribute: Any, value: int, dtype: Any) -> None:
    box = np.array([value], dtype)
    function(thing, int(attribute), box.ctypes.data, box.nbytes)


@functools.cache
def library() -> Any:
    """nvmath.bindings.cublasLt.

    Raises:
        CupytronError: it is not installed.
    """
    try:
        from nvmath.bindings import cublasLt
    except ImportError as error:
        raise CupytronError(_missing(f"nvmath-python cannot be imported ({error})")) from error
    return cublasLt


def handle() -> int:
    """The library's handle for the current device."""
    import cupy

    device = cupy.cuda.runtime.getDevice()
    if device not in _handles:
        lt = library()
        try:
            _handles[device] = lt.create()
        except (RuntimeError, lt.cuBLASLtError) as error:  # no driver or library, no GPU
            raise CupytronError(_missing(f"cuBLASLt cannot be used ({error})")) from error
    return _handles[device]


def _missing(what: str) -> str:
    return f"{what}, but matrix products on a GPU need it: pip install cupytron[cuda13] (or cuda12)"


def current_stream() -> Any:
    """CuPy's, on the current device."""
    import cupy

    return cupy.cuda.get_current_stream()


_handles: dict[int, int] = {}


def forget() -> None:
    """Let go of handles: the library is about to be exchanged, or the device reset."""
    library.cache_clear()
    _handles.clear()
