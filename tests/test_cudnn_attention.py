"""Attention through cuDNN: numbers, layouts, capture, and what is refused.

The library is a stand-in on the simulated GPU; that it has the real one's names and parameters is compared
at the end, with the real frontend, and with cuDNN itself where that is installed.
"""

import ctypes
import inspect
import json
import re
import sys
import types
import warnings

import numpy as np
import pytest
import simulated_cudnn
from kernel_cases import DTYPES, TOLERANCE, Sizes
from kernel_cases_3 import CASES
from simulated import simulated_gpu
from simulated_libraries import simulated_libraries

from cupytron import kernels, ops
from cupytron.errors import CupytronError
from cupytron.kernels import cudnn_attention, cudnn_graphs

ATTENTION = [name for name in CASES if name.startswith("cudnn")]
HALF = ["bfloat16", "float16"]


@pytest.fixture
def libraries():
    with simulated_libraries() as both:
        yield both


@pytest.fixture
def cudnn(libraries):
    return libraries.cudnn


@pytest.fixture
def cupy(libraries):
    with simulated_gpu() as module:
        yield module


def packed(cupy, kv_heads, group, batch=2, length=9, size=16, dtype="bfloat16"):
    """Packed arrays and their views q, k, v; dq, dk, dv; and do."""
    rng = np.random.default_rng(0)
    shape = (batch, length, kv_heads, group + 2, size)
    qkv = cupy.asarray(rng.standard_normal(shape).astype(DTYPES[dtype]))
    dqkv = cupy.full(shape, 7, DTYPES[dtype])
    do = cupy.asarray(
        rng.standard_normal((batch, length, kv_heads, group, size)).astype(DTYPES[dtype])
    )
    return views(qkv, group), views(dqkv, group), do


def views(qkv, group):
    return qkv[..., :group, :], qkv[..., group, :], qkv[..., group + 1, :]


def issued(cupy):
    names = [name for kind, name, _ in cupy.sim.log if kind in ("launch", "array", "copy")]
    cupy.sim.clear()
    return names


def near(found, wanted, tolerance=1e-2):
    found, wanted = (np.asarray(x, dtype=float) for x in (found.get(), wanted))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", ATTENTION)
def test_numbers(cupy, case, dtype):
    errors = CASES[case](cupy, DTYPES[dtype], Sizes())
    assert len(errors) >= 4
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    assert not wrong


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (2, 3)])
def test_equals_the_reference(cupy, kv_heads, group):
    (q, k, v), gradients, do = packed(cupy, kv_heads, group)
    o, lse = cudnn_attention.attention(q, k, v)
    cudnn_attention.attention_backward(do, q, k, v, o, lse, gradients)
    host = [x.get().astype(np.float32) for x in (q, k, v, do)]
    wanted_o, wanted_lse = ops.attention(*host[:3])
    out = tuple(np.empty(x.shape, np.float32) for x in (q, k, v))
    ops.attention_backward(host[3], *host[:3], wanted_o, wanted_lse, out)
    for found, wanted in zip((o, lse, *gradients), (wanted_o, wanted_lse, *out), strict=True):
        near(found, wanted)
    assert o.flags.c_contiguous and o.dtype == q.dtype
    assert lse.dtype == np.float32 and lse.shape == (2, kv_heads, group, 9)


@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_signatures_are_those_of_ops(name):
    mine = inspect.signature(getattr(cudnn_attention, name)).parameters
    theirs = inspect.signature(getattr(ops, name)).parameters
    assert [(p.name, p.default) for p in mine.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize(("kv_heads", "group", "copies"), [(3, 1, 0), (1, 4, 0), (2, 3, 1)])
def test_only_uneven_heads_are_copied(cupy, kv_heads, group, copies):
    (q, k, v), gradients, do = packed(cupy, kv_heads, group)
    issued(cupy)
    o, lse = cudnn_attention.attention(q, k, v)
    names = issued(cupy)
    assert len(names) == 1 + copies and names[-1] == "cudnn_forward"
    cudnn_attention.attention_backward(do, q, k, v, o, lse, gradients)
    names = issued(cupy)
    assert len(names) == 1 + 2 * copies and names[copies] == "cudnn_backward"


def moved(cupy, x):
    """From an address that is no multiple of 16 bytes."""
    room = cupy.zeros(x.size + 1, x.dtype)
    room[1:] = x.reshape(-1)
    return room[1:].reshape(x.shape)


def padded(cupy, x):
    """Heads begin at addresses that are no multiples of 16 bytes, tokens at such that are."""
    room = cupy.zeros((*x.shape[:-1], x.shape[-1] + 1), x.dtype)
    room[..., :-1] = x
    return room[..., :-1]


def spread(cupy, x):
    """Every other element."""
    room = cupy.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    room[..., ::2] = x
    return room[..., ::2]


@pytest.mark.parametrize("lay", [moved, padded, spread])
def test_what_cudnn_cannot_read_is_copied(cupy, lay):
    (q, k, v), gradients, do = packed(cupy, 8, 1)
    o, lse = cudnn_attention.attention(q, k, v)
    cudnn_attention.attention_backward(do, q, k, v, o, lse, gradients)
    other = [lay(cupy, x) for x in (q, k, v)]
    issued(cupy)
    other_o, other_lse = cudnn_attention.attention(*other)
    assert len(issued(cupy)) == 4  # three copies
    assert (other_o.get() == o.get()).all() and (other_lse.get() == lse.get()).all()
    out = tuple(lay(cupy, cupy.ones(x.shape, x.dtype)) for x in (q, k, v))
    arrays = [lay(cupy, x) for x in (do, q, k, v, o)]
    cudnn_attention.attention_backward(*arrays, spread(cupy, other_lse), out)
    for mine, wanted in zip(out, gradients, strict=True):
        assert (mine.get() == wanted.get()).all()


def test_captured_attention_is_replayed_on_new_numbers(cupy):
    group = 2
    shape = (2, 9, 2, group + 2, 16)
    qkv, dqkv = cupy.zeros(shape, DTYPES["float16"]), cupy.zeros(shape, DTYPES["float16"])
    do = cupy.ones((2, 9, 2, group, 16), DTYPES["float16"])
    out = cupy.empty(do.shape, do.dtype)

    def step():
        o, lse = cudnn_attention.attention(*views(qkv, group))
        out[...] = o
        cudnn_attention.attention_backward(do, *views(qkv, group), o, lse, views(dqkv, group))

    step()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    pool = cupy.cuda.MemoryPool()  # a graph's own: what it uses has to stay
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        step()
        graph = stream.end_capture()
    rng = np.random.default_rng(1)
    for _ in range(2):
        new = rng.standard_normal(shape).astype(np.float16)
        qkv.set(new)
        cupy.cuda.Device().synchronize()
        cupy.sim.clear()
        graph.launch(stream)
        assert cupy.sim.synchronisations == 0
        cupy.cuda.Device().synchronize()
        q, k, v = (x.astype(np.float32) for x in views(new, group))
        o, lse = ops.attention(q, k, v)
        near(out, o)
        wanted = np.empty(shape, np.float32)
        ones = np.ones(o.shape, np.float32)
        ops.attention_backward(ones, q, k, v, o, lse, views(wanted, group))
        near(dqkv, wanted)
    assert pool.total_bytes() > 0


def test_graphs_are_built_once_for_a_shape(cupy, cudnn):
    (q, k, v), gradients, do = packed(cupy, 2, 1)
    for _ in range(2):
        o, lse = cudnn_attention.attention(q, k, v)
        cudnn_attention.attention_backward(do, q, k, v, o, lse, gradients)
    assert cudnn.built == 2 and cudnn.executions == 4
    cudnn_attention.attention(q[:1], k[:1], v[:1])
    cudnn_attention.attention(*(cupy.array(x, order="C") for x in (q, k, v)))
    assert cudnn.built == 6


def test_deterministic_gradients_are_another_graph(cupy, cudnn):
    (q, k, v), gradients, do = packed(cupy, 2, 1)
    o, lse = cudnn_attention.attention(q, k, v)
    assert cudnn.built == 2
    for on, so_far in ((False, 0), (True, 1), (True, 2), (False, 2)):
        cudnn_attention.deterministic(on)
        cudnn_attention.attention_backward(do, q, k, v, o, lse, gradients)
        assert cudnn.deterministic == so_far
    assert cudnn.built == 3


def test_no_sequences_at_all(cupy, cudnn):
    (q, k, v), gradients, do = packed(cupy, 2, 1, batch=0)
    o, lse = cudnn_attention.attention(q, k, v)
    assert o.shape == (0, 9, 2, 1, 16) and lse.shape == (0, 2, 1, 9)
    cudnn_attention.attention_backward(do, q, k, v, o, lse, gradients)
    assert cudnn.executions == 0


DROPOUT = ops.AttentionDropout(0.1, (1, 2), 0, 0, 0)


def test_dropout_depends_on_every_part_of_its_address(cupy):
    """As own masks do, but for what lies within a micro-batch; forward and backward agree on it."""
    (q, k, v), gradients, do = packed(cupy, 2, 2)
    same = ops.AttentionDropout(0.3, (5, 2**31), 7, 40, 4)
    seen = []
    for change in ({}, {"key": (6, 2**31)}, {"step": 8}, {"first_token": 36}, {"first_head": 8}):
        found = [cudnn_attention.attention(q, k, v, same._replace(**change))[0].get()]
        found.append(cudnn_attention.attention(q, k, v, same._replace(**change))[0].get())
        assert (found[0] == found[1]).all()
        assert not any((found[0] == other).all() for other in seen)
        seen.append(found[0])
    assert not (seen[0] == cudnn_attention.attention(q, k, v)[0].get()).all()
    numbers = {"step": cupy.full((), 7, "int64"), "first_token": cupy.full((), 40, "int64")}
    o, lse = cudnn_attention.attention(q, k, v, same._replace(**numbers))
    assert (o.get() == seen[0]).all()  # from the device's memory
    cudnn_attention.attention_backward(do, q, k, v, o, lse, gradients, same)
    # with a fixed mask o is linear in v, and dv its adjoint
    forward, back = (
        (a.get().astype(np.float64) * b.get().astype(np.float64)).sum()
        for a, b in ((do, o), (gradients[2], v))
    )
    assert forward == pytest.approx(back, rel=1e-2)


def test_a_replay_draws_new_masks(cupy):
    (q, k, v), _, _ = packed(cupy, 2, 1)
    step = cupy.full((), 3, "int64")
    dropout = ops.AttentionDropout(0.3, (5, 6), step, 0, 0)
    eager = [cudnn_attention.attention(q, k, v, dropout)[0].get()]
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        o, _ = cudnn_attention.attention(q, k, v, dropout)
        graph = stream.end_capture()
        for i in (3, 4):
            step[...] = i
            graph.launch(stream)
            eager.append(o.get())
    assert (eager[0] == eager[1]).all() and not (eager[1] == eager[2]).all()


@pytest.mark.parametrize(
    ("changes", "dropout", "says"),
    [
        ({"dtype": "float32"}, None, "takes bfloat16 and float16, and this is float32"),
        ({"dtype": "float64"}, None, "this is float64"),
        ({"length": 1}, None, "no gradient for sequences of 1 tokens"),
        ({"size": 12}, None, "multiples of 8, up to 256 on this GPU, and this is 12"),
        ({"size": 264}, None, "this is 264"),
    ],
)
def test_what_is_not_supported_is_named(cupy, monkeypatch, changes, dropout, says):
    monkeypatch.setattr(cudnn_attention, "_capability", lambda device: 90)
    (q, k, v), gradients, do = packed(cupy, 2, 1, **changes)
    assert says in cudnn_attention.supports(q, k, v, dropout)
    with pytest.raises(CupytronError, match=re.escape(says) + ".*; use cupytron's own"):
        cudnn_attention.attention(q, k, v, dropout)
    with pytest.raises(CupytronError, match=re.escape(says)):
        cudnn_attention.attention_backward(do, q, k, v, do, None, gradients, dropout)


def test_answers_are_not_mixed_up(cupy, monkeypatch):
    """The same arrays with dropout or without, and where only the deterministic gradient is refused."""
    (q, k, v), _, _ = packed(cupy, 2, 1)
    check = simulated_cudnn.Graph.check_support

    def refuse(self):
        check(self)
        if self._deterministic:
            raise simulated_cudnn.cudnnGraphNotSupportedError("not in any order")

    monkeypatch.setattr(simulated_cudnn.Graph, "check_support", refuse)
    for _ in range(2):
        cudnn_attention.deterministic(False)
        assert cudnn_attention.supports(q, k, v) is None
        assert cudnn_attention.supports(q, k, v, DROPOUT) is None
        cudnn_attention.deterministic(True)
        assert "not in any order" in cudnn_attention.supports(q, k, v)


def test_queries_of_a_cache_are_not_supported(cupy):
    (q, k, v), _, _ = packed(cupy, 2, 1)
    assert "2 queries have 9 keys" in cudnn_attention.supports(q[:, -2:], k, v)
    assert cudnn_attention.supports(q, k, v) is None


@pytest.mark.parametrize(
    ("capability", "size"), [(80, 128), (89, 128), (90, 256), (100, 128), (120, 128)]
)
def test_head_sizes_by_architecture(cupy, monkeypatch, capability, size):
    monkeypatch.setattr(cudnn_attention, "_capability", lambda device: capability)
    (q, k, v), _, _ = packed(cupy, 1, 1, size=size)
    assert cudnn_attention.supports(q, k, v) is None
    (q, k, v), _, _ = packed(cupy, 1, 1, size=size + 8)
    assert f"up to {size} on this GPU" in cudnn_attention.supports(q, k, v)


def test_old_gpus_are_named(cupy, monkeypatch):
    monkeypatch.setattr(cudnn_attention, "_capability", lambda device: 75)
    (q, k, v), _, _ = packed(cupy, 1, 1)
    assert "this GPU has 7.5" in cudnn_attention.supports(q, k, v)


@pytest.mark.parametrize("error", [simulated_cudnn.cudnnGraphNotSupportedError, RuntimeError])
def test_a_refusal_of_cudnn_is_named(cupy, monkeypatch, error):
    def refuse(self):
        raise error("No valid engine configs\nand a page of others")

    monkeypatch.setattr(simulated_cudnn.Graph, "check_support", refuse)
    (q, k, v), _, _ = packed(cupy, 2, 1)
    assert cudnn_attention.supports(q, k, v) == "cuDNN 91900 refuses it: No valid engine configs"
    with pytest.raises(CupytronError, match="No valid engine configs; use cupytron's own"):
        cudnn_attention.attention(q, k, v)


def test_a_refusal_of_the_gradient_is_known_before_forward(cupy, cudnn, monkeypatch):
    """Forward and backward are done alike: what has no gradient here is done elsewhere from the start."""
    check = simulated_cudnn.Graph.check_support

    def refuse(self):
        check(self)
        if self._operation == "backward":
            raise simulated_cudnn.cudnnGraphNotSupportedError("RESHAPE_MODE")

    monkeypatch.setattr(simulated_cudnn.Graph, "check_support", refuse)
    (q, k, v), _, _ = packed(cupy, 2, 1)
    assert "RESHAPE_MODE" in cudnn_attention.supports(q, k, v)
    built = cudnn.built
    assert (
        "RESHAPE_MODE" in cudnn_attention.supports(q, k, v) and cudnn.built == built
    )  # remembered


def test_a_missing_package_is_named(cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    (q, k, v), _, _ = packed(cupy, 2, 1)
    assert "pip install cupytron[cuda13]" in cudnn_attention.supports(q, k, v)


def test_a_missing_library_is_named(cupy, monkeypatch):
    def version():
        raise RuntimeError("Unable to find symbol cudnnGetVersion")

    monkeypatch.setattr(sys.modules["cudnn"], "backend_version", version)
    (q, k, v), _, _ = packed(cupy, 2, 1)
    reason = cudnn_attention.supports(q, k, v)
    assert "cudnnGetVersion" in reason and "pip install cupytron[cuda13]" in reason


def test_a_fallback_in_16_bits_is_told_once(cupy, monkeypatch):
    monkeypatch.setattr(kernels, "_refusals", {})
    attention = kernels._attention()["attention"]
    odd, _, _ = packed(cupy, 2, 1, size=12)
    with pytest.warns(
        RuntimeWarning, match="own kernel, .* multiples of 8, .* and this is 12"
    ) as told:
        attention(*odd)
        attention(*odd)
    assert len(told) == 1 and kernels.refusals()[0] in str(told[0].message)
    single, _, _ = packed(cupy, 2, 1, dtype="float32")
    good, _, _ = packed(cupy, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*single)
        attention(*good)
    assert len(kernels.refusals()) == 1


def test_too_little_memory_is_no_refusal(cupy, monkeypatch):
    (q, k, v), _, _ = packed(cupy, 2, 1)

    def build(self):
        raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED")

    with monkeypatch.context() as short:
        short.setattr(simulated_cudnn.Graph, "build_plans", build)
        with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
            cudnn_attention.supports(q, k, v)
    assert cudnn_attention.supports(q, k, v) is None


@pytest.mark.parametrize("there", [True, False])
def test_the_runtime_is_loaded_before_the_frontend(cupy, monkeypatch, there):
    """The frontend finds libcudart by its name alone, which wheels do not put on the loader's path."""
    calls = []

    def load(name):
        calls.append(name)
        if not there:
            raise RuntimeError(f'Failure finding "lib{name}.so"')

    pathfinder = types.ModuleType("cuda.pathfinder")
    pathfinder.load_nvidia_dynamic_lib = load
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    version = sys.modules["cudnn"].backend_version
    monkeypatch.setattr(
        sys.modules["cudnn"], "backend_version", lambda: calls.append("cudnn") or version()
    )
    cudnn_graphs.library.cache_clear()
    cudnn_graphs.library()
    assert calls[:2] == ["cudart", "cudnn"]


# The real frontend, which needs neither a GPU nor cuDNN to be imported


@pytest.fixture
def real():
    return pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")


def parameters(function):
    """Names and, where there are any, defaults, from the first line of a bound function's docstring."""
    signature = function.__doc__.strip().partition("\n")[0]
    found = re.findall(r"(\w+): [^=,(]*(?:\[[^]]*\])?[^=,]*(?:= ([^,)]+))?", signature)
    return {name: default.strip() for name, default in found}


def test_functions_have_the_real_parameters(real):
    graph = simulated_cudnn.Graph
    pairs = [
        (getattr(graph, name), getattr(real.pygraph, name)) for name in ("sdpa", "sdpa_backward")
    ]
    pairs += [(getattr(graph, name), getattr(real.pygraph, name)) for name in simulated_cudnn.STEPS]
    setters = ("set_output", "set_dim", "set_stride")
    pairs += [
        (getattr(simulated_cudnn.Tensor, name), getattr(real.tensor, name)) for name in setters
    ]
    pairs += [(simulated_cudnn.Library.pygraph, real.pygraph.__init__)]
    pairs += [(simulated_cudnn.Library.set_stream, real.set_stream)]
    for mine, theirs in pairs:
        known = parameters(theirs)
        for name, parameter in list(inspect.signature(mine).parameters.items())[1:]:
            assert name in known, f"{mine.__qualname__}: {name}"
            if parameter.default is not inspect.Parameter.empty:
                wanted = getattr(parameter.default, "name", str(parameter.default))
                assert wanted in known[name], f"{mine.__qualname__}: {name}"
    for mine, theirs in (
        (graph.tensor, real.pygraph.tensor),
        (graph.execute, real.pygraph.execute),
        (simulated_cudnn.Tensor.set_data_type, real.tensor.set_data_type),
    ):
        assert set(inspect.signature(mine).parameters) <= set(inspect.signature(theirs).parameters)


@pytest.mark.parametrize("name", ["data_type", "heur_mode", "diagonal_alignment"])
def test_numbers_are_the_real_ones(real, name):
    for member in getattr(simulated_cudnn, name):
        assert getattr(real, name).__members__[member.name].value == member.value


def test_the_real_refusal_is_no_runtime_error(real):
    assert issubclass(real.cudnnGraphNotSupportedError, Exception)
    assert not issubclass(real.cudnnGraphNotSupportedError, RuntimeError)


H200 = {
    "deviceName": "NVIDIA H200",
    **{"deviceVer": 900, "driverVer": 13000, "cudaDeviceId": 0, "totalGlobalMem": 150_000_000_000},
    **{"multiProcessorCount": 132, "warpSize": 32, "regsPerBlock": 65536, "l2CacheSize": 62914560},
    **{"maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64]},
    **{"maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448},
    **{"reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536, "maxCtasPerSM": 32},
    **{"maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "pciDeviceId": 0, "isTccDriver": 0},
    **{"smCountOrigin": 0, "oversizedSharedMemoryPerBlock": 0, "memoryBusWidth": 6144},
    **{"supportCoopLaunch": 1, "smClockRateKHz": 1980000, "memClockRateKHz": 3201000},
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("kv_heads", "group", "tokens", "size"), [(12, 1, 1024, 64), (8, 4, 37, 128)]
)
def test_cudnn_has_engines_for_our_graphs(
    real, kv_heads, group, tokens, size, deterministic, dropout
):
    """As far as it goes without a GPU: its heuristics for a described H200; kernels are not made."""
    try:
        cudnn_graphs.library.cache_clear()
        cudnn_graphs.library()
        ctypes.CDLL("libcuda.so.1")  # the driver's library, which its engines want; no GPU
    except (CupytronError, OSError) as error:
        pytest.skip(f"cuDNN or a driver is not installed: {error}")
    device = real.create_device_properties(json.dumps(H200))
    heads, columns = kv_heads * group, kv_heads * (group + 2) * size
    kv = (tokens * columns, (group + 2) * size, columns, 1)
    o = (tokens * heads * size, size, heads * size, 1)
    q = kv if group == 1 else o
    strides = {"forward": (q, kv, kv, o), "backward": (q, kv, kv, o, o, q, kv, kv)}
    for name, build in (
        ("forward", cudnn_graphs.add_forward),
        ("backward", cudnn_graphs.add_backward),
    ):
        shape = cudnn_graphs.Shape(
            *("bfloat16", 4, heads, kv_heads, tokens, size, strides[name]),
            *(deterministic, dropout, 0),
        )
        graph = real.pygraph(
            io_data_type=real.data_type.BFLOAT16,
            intermediate_data_type=real.data_type.FLOAT,
            compute_data_type=real.data_type.FLOAT,
            device_property=device,
            sm_version=90,
        )
        tensors = build(graph, shape)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([real.heur_mode.A])
        assert graph.get_execution_plan_count() > 0
        assert len({t.get_uid() for t in tensors}) == len(tensors)
