"""Matrix products through cuBLASLt: numbers, layouts, capture and the choice of algorithms.

The library is a stand-in on the simulated GPU; that it has the real one's names, parameters and sizes is
compared at the end, with the real bindings.
"""

import inspect
import json
import sys
import threading
import time

import numpy as np
import pytest
import simulated_cublaslt
from kernel_cases import DTYPES, TOLERANCE, Refused, Sizes
from kernel_cases_3 import CASES
from simulated import simulated_gpu
from simulated_libraries import simulated_libraries

from cupytron import ops
from cupytron.errors import CupytronError
from cupytron.kernels import cublaslt, product_plans, products

PRODUCTS = [name for name in CASES if not name.startswith("cudnn")]


@pytest.fixture
def libraries():
    with simulated_libraries() as both:
        yield both


@pytest.fixture
def lt(libraries):
    return libraries.cublaslt


@pytest.fixture
def cupy(libraries):
    with simulated_gpu() as module:
        yield module


def matrices(cupy, dtype="float32", m=6, k=40, n=8):
    rng = np.random.default_rng(0)
    return [cupy.asarray(rng.standard_normal(s).astype(DTYPES[dtype])) for s in ((m, k), (k, n))]


def issued(cupy):
    """What was issued since the last call of this, without what is only waited for."""
    names = [name for kind, name, _ in cupy.sim.log if kind in ("launch", "array", "copy")]
    cupy.sim.clear()
    return names


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PRODUCTS)
def test_numbers(cupy, case, dtype):
    if case == "half_sums" and DTYPES[dtype].itemsize > 2:
        with pytest.raises(Refused, match="this is for 16 bits"):
            CASES[case](cupy, DTYPES[dtype], Sizes())
        return
    errors = CASES[case](
        cupy, DTYPES[dtype], Sizes(tokens=11, width=16, rows=13, length=5, head_size=8)
    )
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    assert not wrong


def test_tolerances_would_notice_a_wrong_sum(cupy):
    a, b = matrices(cupy, "bfloat16")
    wanted = a.get().astype(float) @ b.get().astype(float)
    found = products.matmul(a[:, :-1], b[:-1])
    assert np.abs(found.get().astype(float) - wanted).max() / np.abs(wanted).max() > 1e-2


@pytest.mark.parametrize("name", ["matmul", "linear", "add_product"])
def test_signatures_are_those_of_ops(name):
    mine = inspect.signature(getattr(products, name)).parameters
    theirs = inspect.signature(getattr(ops, name)).parameters
    assert [(p.name, p.default) for p in mine.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


def test_transposed_and_sliced_arrays_are_not_copied(cupy):
    products.set_timing(False)
    a, b = matrices(cupy, "bfloat16", 16, 32, 24)
    wide = cupy.zeros((16, 64), "bfloat16")
    total = cupy.zeros((32, 24), "float32")
    issued(cupy)
    products.matmul(b.T, a.T)
    products.matmul(wide[:, 8:40], b)
    products.matmul(a, b, out=wide[:, 8:32])
    products.matmul(a, b, out=cupy.empty((24, 16), "bfloat16").T)
    products.add_product(total, a, products.matmul(a, b))
    assert issued(cupy) == ["cublasLtMatmul"] * 6


def test_what_has_gaps_both_ways_is_copied_once(cupy):
    products.set_timing(False)
    a, b = matrices(cupy, "float32", 6, 80, 8)
    issued(cupy)
    found = products.matmul(a[:, ::2], b[:40])
    names = issued(cupy)
    assert len(names) == 2 and names[-1] == "cublasLtMatmul"
    np.testing.assert_allclose(found.get(), a.get()[:, ::2] @ b.get()[:40], rtol=1e-5, atol=1e-5)


def test_a_bias_is_added_on_the_way_out(cupy):
    products.set_timing(False)
    x, weight = matrices(cupy, "bfloat16")
    bias = cupy.ones(9, "bfloat16")
    issued(cupy)
    products.linear(x, weight, bias[:8])
    assert issued(cupy) == ["cublasLtMatmul"]
    products.linear(x, weight, bias[1:])  # not aligned
    assert len(issued(cupy)) == 2


def test_an_out_array_of_float32_keeps_the_digits_of_half_precision_products(cupy):
    a, b = matrices(cupy, "float16")
    out = cupy.empty((6, 8), "float32")
    assert products.matmul(a, b, out=out) is out
    wanted = a.get().astype(float) @ b.get().astype(float)
    assert np.abs(out.get() - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_tf32_has_to_be_allowed(cupy):
    a, b = matrices(cupy, "float32")
    wanted = a.get().astype(float) @ b.get().astype(float)

    def error():
        return np.abs(products.matmul(a, b).get() - wanted).max() / np.abs(wanted).max()

    assert error() < 1e-6
    products.allow_tf32(True)
    assert 1e-5 < error() < 1e-3
    half = products.matmul(*matrices(cupy, "float16"))  # is not concerned
    assert half.dtype == np.float16
    products.allow_tf32(False)
    assert error() < 1e-6


def test_captured_products_are_replayed_on_new_numbers(cupy):
    x, weight = matrices(cupy)
    bias, total = cupy.zeros(8, "float32"), cupy.zeros((40, 8), "float32")
    y = cupy.empty((6, 8), "float32")

    def step():
        y[...] = products.linear(x, weight, bias)
        products.add_product(total, x, y)

    step()  # makes plans, times them
    total.fill(0)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        step()
        graph = stream.end_capture()
    rng = np.random.default_rng(1)
    wanted = np.zeros((40, 8))
    for _ in range(3):
        new = (
            rng.standard_normal((6, 40)).astype(np.float32),
            rng.standard_normal(8).astype(np.float32),
        )
        x.set(new[0])
        bias.set(new[1])
        cupy.cuda.Device().synchronize()
        cupy.sim.clear()
        graph.launch(stream)
        assert cupy.sim.synchronisations == 0
        cupy.cuda.Device().synchronize()
        wanted_y = new[0] @ weight.get().astype(float) + new[1]
        wanted += new[0].T.astype(float) @ wanted_y
        np.testing.assert_allclose(y.get(), wanted_y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(total.get(), wanted, rtol=1e-5, atol=1e-4)


def test_the_first_product_may_be_a_captured_one(cupy, lt):
    a, b = matrices(cupy)
    out = cupy.empty((6, 8), "float32")
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        products.matmul(a, b, out=out)
        graph = stream.end_capture()
        assert lt.calls == 1 and products.choices() == {}  # nothing was timed
        graph.launch(stream)
    cupy.cuda.Device().synchronize()
    np.testing.assert_allclose(out.get(), a.get() @ b.get(), rtol=1e-5, atol=1e-5)


def test_problems_are_planned_once(cupy, lt):
    a, b = matrices(cupy)
    products.matmul(a, b)
    assert lt.heuristics == 1
    first = lt.calls
    products.matmul(a, b)
    products.matmul(a.copy(), b.copy())
    assert lt.heuristics == 1 and lt.calls == first + 2
    products.matmul(a[:, 1:], b[1:])  # another shape
    products.matmul(a[1:], b)
    assert lt.heuristics == 3


def test_workspaces_come_from_the_current_pool_and_go_back(cupy):
    a, b = matrices(cupy)
    out = cupy.empty((6, 8), "float32")
    candidates = products.candidates(a, b, out)
    for run, size in zip(candidates.runs, simulated_cublaslt.WORKSPACES, strict=True):
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            run()
        assert pool.used_bytes() == 0 and pool.total_bytes() == size


def test_a_graph_has_a_workspace_of_its_own(cupy):
    """The stand-in writes to workspaces: one that two streams share would be a race."""
    products.set_timing(False)
    a, b = matrices(cupy)
    out, other = cupy.empty((6, 8), "float32"), cupy.empty((6, 8), "float32")
    products.set_choices({products.candidates(a, b, out).key: 2})
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        products.matmul(a, b, out=out)
        graph = stream.end_capture()
    graph.launch(stream)
    products.matmul(a, b, out=other)  # at the same time, on the null stream
    assert pool.total_bytes() == simulated_cublaslt.WORKSPACES[2] and not cupy.sim.races
    cupy.cuda.Device().synchronize()
    assert (out.get() == other.get()).all()


@pytest.fixture
def clock(cupy, monkeypatch):
    """Algorithm i takes milliseconds[i] of an event's time."""
    milliseconds = [5.0, 3.0, 4.0]
    run, current = cublaslt.Plan.run, []

    def noted(self, *args, algorithm=None, **kwargs):
        current[:] = [algorithm]
        run(self, *args, algorithm=algorithm, **kwargs)

    monkeypatch.setattr(cublaslt.Plan, "run", noted)
    monkeypatch.setattr(cupy.cuda, "get_elapsed_time", lambda a, b: milliseconds[current[0]])
    return milliseconds


def test_the_fastest_algorithm_is_taken(cupy, clock):
    a, b = matrices(cupy)
    products.matmul(a, b)
    assert list(products.choices().values()) == [1]
    clock[:] = [3.01, 3.0, 3.0]  # as good as equal: the library's order decides
    products.matmul(b.T, a.T)
    assert list(products.choices().values()) == [1, 0]


def test_timing_goes_without_memory_that_is_not_there(cupy, lt):
    x, _ = matrices(cupy, "float32", 100, 300, 3)
    total = cupy.zeros((300, 300), "float32")
    with cupy.sim.limited(0):
        products.add_product(total, x, x)
    assert lt.calls == 1
    np.testing.assert_allclose(total.get(), x.get().T @ x.get(), rtol=1e-4, atol=1e-3)


def test_timing_can_be_switched_off_and_on(cupy, lt, clock):
    a, b = matrices(cupy)
    products.set_timing(False)
    products.matmul(a, b)
    products.matmul(a, b)
    assert lt.calls == 2 and products.choices() == {}
    products.set_timing(True)
    products.matmul(a, b)
    assert list(products.choices().values()) == [1]
    before = lt.calls
    products.matmul(a, b)
    assert lt.calls == before + 1


def test_choices_travel_to_other_processes(cupy, lt, clock):
    a, b = matrices(cupy, k=400)
    found = products.matmul(a, b)
    chosen = json.loads(json.dumps(products.choices()))
    products.forget()
    products.set_timing(False)
    favourite = products.matmul(a, b)
    assert (favourite.get() != found.get()).any()  # another order of sums, other bits
    products.set_choices(chosen)  # also for plans that are there already
    assert (products.matmul(a, b).get() == found.get()).all()
    products.forget()
    products.set_timing(True)
    products.set_choices(chosen)  # nothing is left to be timed
    before = lt.calls
    assert (products.matmul(a, b).get() == found.get()).all() and lt.calls == before + 1


@pytest.mark.parametrize("said, decided", [("NOT_SUPPORTED (15)", [2]), ("ALLOC_FAILED (3)", [])])
def test_an_algorithm_that_fails_is_left_out(cupy, lt, clock, monkeypatch, said, decided):
    """And where memory runs short the favourite is taken, and nothing kept."""
    a, b = matrices(cupy, k=400)
    want = a.get() @ b.get()
    right = cublaslt.Plan.run

    def run(plan, *arguments, algorithm=None, **named):
        if algorithm == 1:
            raise RuntimeError(said)
        right(plan, *arguments, algorithm=algorithm, **named)

    monkeypatch.setattr(cublaslt.Plan, "run", run)
    found = products.matmul(a, b)
    assert list(products.choices().values()) == decided
    np.testing.assert_allclose(found.get(), want, rtol=1e-4, atol=1e-4)


def test_products_are_timed_without_memory_to_spare(cupy, clock, monkeypatch):
    monkeypatch.setattr(product_plans, "_COVER", 1 << 30)
    a, b = matrices(cupy, k=400)
    used = cupy.sim.device_bytes
    with cupy.sim.limited(1 << 24):
        out = products.matmul(a, b)
    assert list(products.choices().values()) == [1]
    assert cupy.sim.device_bytes < used + (1 << 24) and out.shape == (6, 8)


def test_a_choice_that_the_library_does_not_offer_is_its_favourite(cupy, clock):
    a, b = matrices(cupy, k=400)
    products.set_timing(False)
    favourite = products.matmul(a, b).get()
    (key,) = [plan.problem.key for plan in product_plans._plans.values()]
    for index in (99, -1):
        products.set_choices({key: index, "a problem of yesterday": 1})
        assert (products.matmul(a, b).get() == favourite).all()


def test_keys_tell_problems_apart(cupy):
    keys = set()
    for dtype in DTYPES:
        a, b = matrices(cupy, dtype, 8, 8, 8)
        wide = cupy.zeros((8, 9), dtype)
        for operands in ((a, b), (a.T, b), (a, b.T), (wide[:, 1:], b), (a[:4], b)):
            out = cupy.empty((len(operands[0]), 8), dtype)
            keys.add(products.candidates(*operands, out).key)
            keys.add(products.candidates(*operands, out, add=True).key)
        if dtype != "float64":
            keys.add(products.candidates(a, b, cupy.empty((8, 8), dtype), bias=b[0]).key)
    assert len(keys) == 4 * 5 + 3


def test_candidates_compute_the_same_but_for_rounding(cupy, lt):
    a, b = matrices(cupy, k=400)
    out = cupy.ones((6, 8), "float32")
    candidates = products.candidates(a, b, out, add=True)
    assert len(candidates.runs) == 3 and lt.calls == 0
    results = []
    for run in candidates.runs:
        out.fill(1)
        run()
        results.append(out.get())
        np.testing.assert_allclose(results[-1], 1 + a.get() @ b.get(), rtol=1e-4, atol=1e-4)
    assert (results[0] != results[1]).any()
    products.set_choices({candidates.key: 1})
    out.fill(1)
    products.add_product(out, a.T, b)
    assert (out.get() == results[1]).all()


def test_the_same_layout_at_another_alignment_is_another_problem(cupy, lt):
    """The stand-in refuses addresses that are less aligned than was promised."""
    products.set_timing(False)
    _, b = matrices(cupy, "bfloat16", 4, 8, 8)
    room = cupy.ones(4 * 8 + 1, b.dtype)
    for start in (0, 1):
        products.matmul(room[start : start + 32].reshape(4, 8), b)
    assert lt.heuristics == 2


def test_threads_share_plans_without_mixing_biases(cupy, monkeypatch):
    products.set_timing(False)
    library = sys.modules["nvmath.bindings.cublasLt"]
    set_attribute = library.matmul_desc_set_attribute

    def slowly(*arguments):
        set_attribute(*arguments)
        time.sleep(1e-4)  # for another thread to come in between

    monkeypatch.setattr(library, "matmul_desc_set_attribute", slowly)
    x, weight = matrices(cupy)
    biases = [cupy.full(8, value, "float32") for value in range(4)]
    plain = products.linear(x, weight).get()
    cupy.cuda.Device().synchronize()
    found = [[] for _ in biases]

    def work(i):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(20):
                found[i].append(products.linear(x, weight, biases[i]))
            stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in enumerate(found):
        assert len(results) == 20
        for y in results:
            np.testing.assert_allclose(y.get(), plain + i, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "out", "says"),
    [
        (np.ones((2, 3), "float32"), np.ones((3, 2), "float64"), None, "float32 and float64"),
        (np.ones((2, 3), "int32"), np.ones((3, 2), "int32"), None, "one of float16, bfloat16"),
        (np.ones((2, 3)), np.ones((4, 2)), None, r"\(2, 3\) @ \(4, 2\)"),
        (np.ones((2, 3)), np.ones((3, 2)), np.ones((2, 3)), r"written to \(2, 3\)"),
        (np.ones((2, 3)), np.ones((3, 2)), np.ones((2, 2), "float32"), "float64 cannot be written"),
        (np.ones(3), np.ones((3, 2)), None, r"two matrices, and these are \(3,\)"),
    ],
)
def test_what_cannot_be_multiplied_is_named(cupy, a, b, out, says):
    with pytest.raises(CupytronError, match=says):
        products.matmul(
            *(cupy.asarray(x) for x in (a, b)), out if out is None else cupy.asarray(out)
        )


def test_stacks_of_different_heights_are_named(cupy):
    a = cupy.ones((2, 3, 3))
    with pytest.raises(CupytronError, match=r"\(2, 3, 3\) and \(1, 3, 3\)"):
        products.batched_matmul(a, a[:1])


def test_a_missing_package_is_named(cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvmath.bindings", None)
    with pytest.raises(CupytronError, match=r"pip install cupytron\[cuda13\]"):
        products.matmul(*matrices(cupy))


def test_a_missing_library_is_named(cupy, monkeypatch):
    def create():
        raise RuntimeError("no libcublasLt.so.13")

    monkeypatch.setattr(sys.modules["nvmath.bindings.cublasLt"], "create", create)
    with pytest.raises(CupytronError, match=r"no libcublasLt.*pip install cupytron\[cuda13\]"):
        products.matmul(*matrices(cupy))


def test_errors_of_the_heuristics_are_not_taken_for_a_lack_of_algorithms(cupy, monkeypatch):
    def fails(*args):
        raise simulated_cublaslt.cuBLASLtError(14, "internal error")

    monkeypatch.setattr(sys.modules["nvmath.bindings.cublasLt"], "matmul_algo_get_heuristic", fails)
    with pytest.raises(simulated_cublaslt.cuBLASLtError, match="internal error"):
        products.matmul(*matrices(cupy))


# The real bindings, which need no GPU to be imported


@pytest.fixture
def real():
    return pytest.importorskip("nvmath.bindings.cublasLt", reason="nvmath-python is not installed")


def test_functions_have_the_real_parameters(real):
    stand_in = simulated_cublaslt.module()
    functions = [name for name in vars(stand_in) if inspect.ismethod(getattr(stand_in, name))]
    assert len(functions) > 12
    for name in functions:
        mine, theirs = (inspect.signature(getattr(m, name)) for m in (stand_in, real))
        assert list(mine.parameters) == list(theirs.parameters), name


@pytest.mark.parametrize(
    "name",
    [
        *("MatmulDescAttribute", "MatrixLayoutAttribute", "MatmulPreferenceAttribute"),
        *("Epilogue", "ReductionScheme"),
    ],
)
def test_numbers_are_the_real_ones(real, name):
    for member in getattr(simulated_cublaslt, name):
        assert int(getattr(real, name)[member.name]) == int(member)


def test_sizes_are_the_real_ones(real):
    for name in ("matmul_algo_dtype", "matmul_heuristic_result_dtype"):
        assert getattr(real, name) == getattr(simulated_cublaslt, name)
    assert (
        simulated_cublaslt.matmul_heuristic_result_dtype.fields["algo"][1] == 0
    )  # run relies on it
    stand_in = simulated_cublaslt.module()
    for enum, function in (
        ("MatmulDescAttribute", "get_matmul_desc_attribute_dtype"),
        ("MatrixLayoutAttribute", "get_matrix_layout_attribute_dtype"),
        ("MatmulPreferenceAttribute", "get_matmul_preference_attribute_dtype"),
    ):
        for member in getattr(simulated_cublaslt, enum):
            mine, theirs = (getattr(m, function)(int(member)) for m in (stand_in, real))
            assert np.dtype(mine) == np.dtype(theirs), member


def test_constants_are_the_real_ones(real):
    from nvmath import CudaDataType
    from nvmath.bindings import cublas

    names = {"float32": "32F", "float64": "64F", "float16": "16F", "bfloat16": "16BF"}
    for dtype, number in cublaslt._TYPES.items():
        assert number == CudaDataType[f"CUDA_R_{names[dtype]}"]
        assert simulated_cublaslt.TYPES[number] == DTYPES[dtype]
    for name in ("COMPUTE_32F", "COMPUTE_64F", "COMPUTE_32F_FAST_TF32"):
        assert getattr(cublaslt, f"_{name}") == cublas.ComputeType[name]


def test_the_real_library_takes_our_descriptors(real, monkeypatch):
    """As far as it goes without a GPU: up to the heuristics, which need the handle of one."""
    try:
        version = real.get_version()
    except RuntimeError as error:
        pytest.skip(f"cuBLASLt cannot be loaded here: {error}")
    monkeypatch.setattr(cublaslt, "library", lambda: real)
    monkeypatch.setattr(cublaslt, "handle", lambda: 0)
    seen = []
    nothing = np.zeros(0, real.matmul_heuristic_result_dtype)
    monkeypatch.setattr(cublaslt, "_heuristics", lambda *args: seen.append(args) or nothing)
    problem = cublaslt.Problem(
        *("bfloat16", "float32", 24, 8, 40, (True, False), (40, 48, 24), 3),
        batch_strides=(960, 0, 192),
        bias=True,
    )
    plan = cublaslt.Plan(problem)
    plan._set(real.MatmulDescAttribute.BIAS_POINTER, 4096)
    written, value = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    attribute = int(real.MatmulDescAttribute.BIAS_POINTER)
    real.matmul_desc_get_attribute(
        plan._descriptor, attribute, value.ctypes.data, 8, written.ctypes.data
    )
    assert value[0] == 4096 and len(seen) == 1 and version > 0
    error = real.cuBLASLtError(cublaslt._NOT_SUPPORTED)
    assert error.status == cublaslt._NOT_SUPPORTED and "NOT_SUPPORTED" in str(error)
