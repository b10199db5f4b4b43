"""The simulated GPU itself: kernels run right, and it finds the mistakes that it is there to find."""

import contextvars
import gc
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from simulated import bytes_at, functions, issue, simulated_gpu

KERNELS = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

struct alignas(16) Four { float at[4]; };

// sums of rows: warps by shuffles, then the first warp over the others
extern "C" __global__ void __launch_bounds__(256) row_sums(const float* x, float* y, int width) {
    __shared__ float scratch[32];
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += x[blockIdx.x * width + i];
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = threadIdx.x < blockDim.x / 32 ? scratch[threadIdx.x] : 0.0f;
    for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(0xffffffffu, sum, by);
    if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

extern "C" __global__ void flip(const float* x, float* y, int wait) {
    extern __shared__ float tile[];  // a comment about __shared__ float nothing[3];
    tile[threadIdx.x] = x[threadIdx.x];
    if (wait) __syncthreads();
    y[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void places(int* y) {
    int row = blockIdx.y * blockDim.y + threadIdx.y, column = blockIdx.x * blockDim.x + threadIdx.x;
    y[row * gridDim.x * blockDim.x + column] = row * 100 + column;
}

extern "C" __global__ void votes(unsigned* y) {
    unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x & 1);
    int most = __syncthreads_count(threadIdx.x < 40);
    if (threadIdx.x == 0) y[0] = odd, y[1] = most, y[2] = __popc(odd);
}

extern "C" __global__ void round_trip(const double* x, float* half, float* brain, int n) {
    int i = threadIdx.x + blockIdx.x * blockDim.x;
    if (i < n) half[i] = __half2float(__half(x[i])), brain[i] = __bfloat162float(__nv_bfloat16(x[i]));
}

extern "C" __global__ void copy_four(const float* x, float* y) {
    *reinterpret_cast<Four*>(y) = *reinterpret_cast<const Four*>(x);
}

extern "C" __global__ void write_at(float* y, long long at) { y[at] = 1; }

extern "C" __global__ void beyond(float* y, int at) {
    __shared__ float tile[8][4];
    float* all = &tile[0][0];
    all[at] = 1;
    y[0] = tile[0][0];
}

extern "C" __global__ void part_waits() {
    if (threadIdx.x < 5) __syncwarp(); else __syncthreads();
}

extern "C" __global__ void two_barriers() {
    if (threadIdx.x < 5) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

extern "C" __global__ void lane_shuffles(float* y) {
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, y[threadIdx.x], 16);
}

extern "C" __global__ void twice(const float* x, float* y, int n) {
    int i = threadIdx.x + blockIdx.x * blockDim.x;
    if (i < n) y[i] = 2 * x[i];
}
"""


@pytest.fixture
def cupy():
    with simulated_gpu() as module:
        yield module


@pytest.fixture
def kernel(cupy):
    """kernel(name): one of KERNELS."""
    return cupy.RawModule(code=KERNELS, options=("-std=c++17",)).get_function


def on_device(*values, dtype=np.float32):
    import cupy

    return cupy.asarray(np.array(values, dtype=dtype))


# ---- kernels -------------------------------------------------------------------------------


def test_blocks_and_warps_reduce(cupy, kernel, rng):
    host = rng.normal(size=(6, 1000)).astype(np.float32)
    x, y = cupy.asarray(host), cupy.empty(6, np.float32)
    for _ in range(2):  # forwards and backwards
        y.fill(0)
        kernel("row_sums")((6,), (256,), (x, y, np.int32(1000)))
        np.testing.assert_allclose(y.get(), host.sum(axis=1), rtol=1e-4, atol=1e-4)


def test_indices_of_threads_and_blocks(cupy, kernel):
    y = cupy.empty((6, 8), np.int32)
    kernel("places")((2, 3), (4, 2), (y,))
    rows, columns = np.indices((6, 8))
    np.testing.assert_array_equal(y.get(), rows * 100 + columns)


def test_votes(cupy, kernel):
    y = cupy.empty(3, np.uint32)
    kernel("votes")((1,), (64,), (y,))
    assert y.get().tolist() == [0xAAAAAAAA, 40, 16]


def test_half_types_round_as_numpy_does(cupy, kernel, rng):
    edges = [0.0, -0.0, 1e-30, 65519.9, 65520, 3e38, 1e-40, 2.0**-25, np.inf, -np.inf, np.nan]
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    with np.errstate(all="ignore"):
        any_bits = rng.integers(0, 2**32, 4000, dtype=np.uint32).view(np.float32).astype(np.float64)
        ties = halves * (1 + 2.0**-11)
        values = np.concatenate([edges, any_bits, halves, ties, np.nextafter(ties, np.inf)])
        half, single = values.astype(np.float16), values.astype(np.float32)
        brain = single.astype(
            ml_dtypes.bfloat16
        )  # rounded twice, unless the first time changes nothing
    exact = (single == values) | np.isnan(values)
    out = cupy.empty((2, len(values)), np.float32)
    x, n = cupy.asarray(values), np.int32(len(values))
    kernel("round_trip")((len(values) // 128 + 1,), (128,), (x, out[0], out[1], n))
    np.testing.assert_array_equal(out[0].get(), half.astype(np.float32))
    np.testing.assert_array_equal(out[1].get()[exact], brain.astype(np.float32)[exact])


def test_double_to_bfloat16_rounds_once(cupy, kernel):
    x = on_device(1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, dtype=np.float64)
    out = cupy.empty((2, 2), np.float32)
    kernel("round_trip")((1,), (32,), (x, out[0], out[1], np.int32(2)))
    assert out[1].tolist() == [1 + 2.0**-7, 1.0]


def test_missing_barrier_shows_in_one_of_two_launches(cupy, kernel):
    x, y = cupy.arange(64, dtype=np.float32), cupy.empty(64, np.float32)
    results = []
    for wait in (1, 1, 0, 0):
        kernel("flip")((1,), (64,), (x, y, np.int32(wait)), shared_mem=256)
        results.append(y.get())
    right = np.arange(64)[::-1]
    np.testing.assert_array_equal(results[:2], [right, right])
    assert not all(np.array_equal(result, right) for result in results[2:])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("x", "y", 4), r"parameter is i4: pass a NumPy scalar"),
        (("x", "y", np.float32(4)), r"argument 2 of twice is float32"),
        (("x", "y", np.int64(4)), r"argument 2 of twice is int64"),
        (("x", "wide", np.int32(4)), r"array of float64, the kernel's pointer is to f4"),
        (("x", np.ones(4), np.int32(4)), r"pass a cupy.ndarray"),
        (("x", None, np.int32(4)), r"Unsupported type"),
        (("x", "y", "x"), r"argument 2 of twice is a number"),
        (("x", "y"), r"takes 3 arguments"),
    ],
)
def test_arguments_have_to_fit(cupy, kernel, arguments, error):
    arrays = {"x": on_device(1, 2, 3, 4), "y": on_device(0, 0, 0, 0)}
    arrays["wide"] = cupy.zeros(4)
    given = tuple(arrays[a] if isinstance(a, str) else a for a in arguments)
    with pytest.raises(TypeError, match=error):
        kernel("twice")((1,), (32,), given)


def test_pointers_may_be_numbers(cupy, kernel):
    x, y = on_device(1, 2, 3, 4), cupy.empty(4, np.float32)
    kernel("twice")((1,), (32,), (np.uint64(x.data.ptr), y.data, np.int32(4)))
    assert y.tolist() == [2, 4, 6, 8]
    with pytest.raises(RuntimeError, match="nobody has allocated"):
        kernel("twice")((1,), (32,), (np.uint64(12345), y, np.int32(4)))


@pytest.mark.parametrize(
    ("grid", "block", "shared", "error"),
    [
        ((1,), (2048,), 0, "1024 threads"),
        ((0,), (32,), 0, "invalid"),
        ((1, 70000), (32,), 0, "65535"),
        ((1,), (32,), 50_000, "max_dynamic_shared_size_bytes"),
    ],
)
def test_sizes_of_launches(cupy, kernel, grid, block, shared, error):
    x = on_device(1, 2)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match=error):
        kernel("twice")(grid, block, (x, x, np.int32(2)), shared_mem=shared)


def test_launch_bounds(cupy, kernel):
    x, y = cupy.ones((1, 512), np.float32), cupy.empty(1, np.float32)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match=r"launch_bounds__\(256\)"):
        kernel("row_sums")((1,), (512,), (x, y, np.int32(512)))


def test_more_shared_memory_when_asked_for(cupy, kernel):
    flip = kernel("flip")
    flip.max_dynamic_shared_size_bytes = 100_000
    x, y = cupy.arange(64, dtype=np.float32), cupy.empty(64, np.float32)
    flip((1,), (64,), (x, y, np.int32(1)), shared_mem=100_000)
    assert y.get()[0] == 63


def test_writes_outside_of_an_allocation(cupy, kernel):
    y = cupy.zeros(10, np.float32)
    for at, where in (
        (10, "0 bytes behind the end"),
        (127, "before|behind"),
        (-1, "before the start"),
    ):
        with pytest.raises(cupy.cuda.driver.CUDADriverError, match=where):
            kernel("write_at")((1,), (1,), (y, np.int64(at)))
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="illegal memory access"):
        kernel("write_at")((1,), (1,), (y, np.int64(1 << 44)))
    kernel("write_at")((1,), (1,), (y, np.int64(9)))  # the device lives on
    assert y.get()[9] == 1


def test_writes_outside_of_a_shared_array(cupy, kernel):
    y = cupy.empty(1, np.float32)
    kernel("beyond")((1,), (1,), (y, np.int32(31)))
    assert np.isnan(y.get()[0])  # nobody has written that element
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="__shared__"):
        kernel("beyond")((1,), (1,), (y, np.int32(32)))


def test_misaligned_access(cupy, kernel):
    x, y = cupy.arange(8, dtype=np.float32), cupy.empty(4, np.float32)
    kernel("copy_four")((1,), (1,), (x[4:], y))
    assert y.tolist() == [4, 5, 6, 7]
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="misaligned"):
        kernel("copy_four")((1,), (1,), (x[1:], y))


def test_threads_that_wait_for_ever(cupy, kernel):
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="deadlock: 59 threads"):
        kernel("part_waits")((1,), (64,), ())
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="different __syncthreads: lines"):
        kernel("two_barriers")((1,), (64,), ())


def test_shuffle_from_a_lane_that_is_not_there(cupy, kernel):
    y = cupy.zeros(32, np.float32)
    kernel("lane_shuffles")((1,), (32,), (y,))
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="lane 0 shuffles from lane 16"):
        kernel("lane_shuffles")((1,), (16,), (y,))


def test_unknown_kernels_and_sources_that_do_not_compile(cupy, kernel):
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="NOT_FOUND"):
        kernel("thrice")
    module = cupy.RawModule(code='extern "C" __global__ void bad(float* x) { x[0] = nothing; }')
    with pytest.raises(cupy.cuda.compiler.CompileException, match="nothing"):
        module.get_function("bad")
    with pytest.raises(NotImplementedError, match="extern"):
        cupy.RawModule(code="template <int N> __global__ void t() {}").get_function("t")


# ---- arrays --------------------------------------------------------------------------------


def test_arrays_are_strict_about_numpy(cupy):
    x = cupy.ones(3)
    for mixed in (
        lambda: x + np.ones(3),
        lambda: np.ones(3) * x,
        lambda: cupy.maximum(x, np.ones(3)),
    ):
        with pytest.raises(TypeError, match=r"Unsupported type .*numpy.ndarray"):
            mixed()
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    with pytest.raises(TypeError):
        x[:] = np.ones(3)
    with pytest.raises(TypeError):
        [1, 2, 3][cupy.zeros((), np.int64)]
    assert isinstance(np.float32(2) * x, cupy.ndarray) and isinstance(np.exp(x), cupy.ndarray)
    assert not isinstance(x, np.ndarray)


def test_reductions_and_elements_stay_on_the_device(cupy):
    x = cupy.arange(6, dtype=np.float32).reshape(2, 3)
    before = cupy.sim.synchronisations
    parts = [x.sum(), x[1, 2], x.max(axis=0), cupy.allclose(x, x), cupy.argmax(x), (x > 1).any()]
    assert all(isinstance(part, cupy.ndarray) for part in parts)
    x[0, 1] = parts[0]
    assert cupy.sim.synchronisations == before
    assert float(x[0, 1]) == 15.0
    assert bool(parts[3]) and x.tolist()[1] == [3, 4, 5]
    x[x > 4]
    cupy.argsort(x)
    assert cupy.sim.synchronisations == before + 5
    assert ("sync", "ndarray.__float__", 0) in cupy.sim.log


def test_views_share_memory_and_copies_do_not(cupy):
    x = cupy.zeros((4, 6), np.float32)
    x[1:3].T[2] += 5
    x.reshape(24)[0] = 1
    x.ravel()[1] = 2
    x.T.copy()[...] = 7
    assert x.get()[0].tolist() == [1, 2, 0, 0, 0, 0] and x.get()[1:3, 2].tolist() == [5, 5]
    assert x[1:].data.ptr - x.data.ptr == 24 and x.data.ptr % 512 == 0
    assert (
        cupy.empty_like(x.T).strides == (4, 24) and cupy.split(x, 2)[1].data.ptr == x[2:].data.ptr
    )


def test_unwritten_memory_is_nan(cupy):
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        assert np.isnan(cupy.empty(5, dtype).get().astype(np.float64)).all()
    x = cupy.ones(1000)
    del x
    assert np.isnan(cupy.empty(1000).get()).all()  # the same bytes once more


def test_half_sums_are_rounded_once(cupy, rng):
    host = rng.normal(size=(64, 4096)).astype(ml_dtypes.bfloat16)
    x = cupy.asarray(host)
    exact = host.astype(np.float32).sum(axis=1).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(x.sum(axis=1).get(), exact)
    assert (x @ x.T).dtype == ml_dtypes.bfloat16 and x.sum(dtype=np.float32).dtype == np.float32
    with pytest.raises(TypeError, match="3 dimensions"):
        x[None] @ x.T[None]


def test_only_names_that_cupy_has(cupy):
    for missing in ("block", "apply_everything", "string_"):
        with pytest.raises(AttributeError, match=missing):
            getattr(cupy, missing)
    assert cupy.float32 is np.float32 and cupy.pi == np.pi and callable(cupy.moveaxis)
    public = {name for name in dir(cupy.ndarray) if not name.startswith("_")}
    assert public - {"kind"} <= functions.ATTRIBUTES


def test_names_agree_with_the_real_cupy():
    real = pytest.importorskip("cupy")
    if real.__version__ != "14.2.0":
        pytest.skip(f"the list of names is of CuPy 14.2.0, not {real.__version__}")
    assert functions.NAMES <= set(dir(real))
    attributes = {name for name in dir(real.ndarray) if not name.startswith("_")}
    assert attributes == functions.ATTRIBUTES


def test_copies_check_shape_type_and_layout(cupy):
    x = cupy.zeros((2, 3), np.float32)
    x.set(np.ones((2, 3), np.float32))
    with pytest.raises(TypeError):
        x.set(np.ones((2, 3)))
    with pytest.raises(ValueError, match="Shape mismatch"):
        x.get(out=np.empty((3, 2), np.float32))
    with pytest.raises(RuntimeError, match="non-contiguous"):
        x[:, :2].set(np.ones((2, 2), np.float32))
    out = np.empty((2, 3), np.float32)
    before = cupy.sim.synchronisations
    assert x.get(out=out, blocking=False) is out and cupy.sim.synchronisations == before
    assert out.sum() == 6


# ---- memory --------------------------------------------------------------------------------


def test_pools_count_and_hand_out_again(cupy):
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        x = cupy.empty(1000, np.float32)
        address = x.data.ptr
        assert (pool.used_bytes(), pool.total_bytes()) == (4096, 4096)
        del x
        assert (pool.used_bytes(), pool.total_bytes()) == (0, 4096)
        assert cupy.empty(1001, np.float32).data.ptr == address
        pool.free_all_blocks()
        assert pool.total_bytes() == 0
    assert cupy.get_default_memory_pool().used_bytes() == 0


def test_out_of_memory(cupy):
    keep = cupy.zeros(1 << 10)
    with cupy.sim.limited(more=1 << 20):
        cached = cupy.zeros(1 << 16)
        del cached
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="Out of memory allocating"):
            cupy.zeros(1 << 18)
        cupy.zeros(100_000)  # what the pool keeps is given back first
    assert keep.sum().item() == 0
    free, total = cupy.cuda.Device().mem_info
    assert 0 < free < total


# ---- streams -------------------------------------------------------------------------------


def test_unordered_streams_race(cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4)
    with stream, pytest.raises(RuntimeError, match=r"race: add .* reads what setitem"):
        x + 1
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        y = x + 1
    assert len(cupy.sim.races) == 1
    with pytest.raises(RuntimeError, match="race"):
        y.get()
    stream.synchronize()
    assert y.get().tolist() == [2, 2, 2, 2]
    kinds = [kind for kind, _, _ in cupy.sim.log]
    assert kinds.index("record") < kinds.index("wait") < kinds.index("sync")


def test_blocking_streams_are_ordered_with_the_null_stream(cupy):
    x = cupy.ones(4)
    with cupy.cuda.Stream():
        x += 1
    assert x.tolist() == [2, 2, 2, 2]


def test_memory_given_up_while_another_stream_uses_it(cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4)
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        y = x * 3
    del x
    with pytest.raises(RuntimeError, match="hands it out again"):
        cupy.zeros(4)
    stream.synchronize()
    assert cupy.zeros(4).sum().item() == 0 and y.sum().item() == 12


def test_elapsed_time_needs_timing(cupy):
    first, last = cupy.cuda.Event(), cupy.cuda.Event()
    first.record()
    last.record()
    last.synchronize()
    assert cupy.cuda.get_elapsed_time(first, last) >= 0 and last.done
    with pytest.raises(RuntimeError):
        cupy.cuda.get_elapsed_time(first, cupy.cuda.Event(disable_timing=True))


def test_streams_belong_to_threads(cupy):
    stream = cupy.cuda.Stream()
    seen = []
    with stream:
        thread = threading.Thread(target=lambda: seen.append(cupy.cuda.get_current_stream()))
        thread.start()
        thread.join()
        assert cupy.cuda.get_current_stream() == stream
    assert seen == [cupy.cuda.Stream.null]


def test_threads_share_the_null_stream(cupy):
    errors = []

    def work(number: int) -> None:
        try:
            for _ in range(200):
                x = cupy.full(10, number)
                x += 1
                assert x.sum().item() == 10 * (number + 1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# ---- capture -------------------------------------------------------------------------------


def test_capture_records_and_replays(cupy, kernel):
    stream, side = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    x, total = cupy.arange(4, dtype=np.float32), cupy.zeros(4, np.float32)
    twice = kernel("twice")
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        y = cupy.empty_like(x)
        twice((1,), (32,), (x, y, np.int32(4)))
        side.wait_event(stream.record())
        with side:
            z = y + 1
            total += z
            joined = side.record()
        stream.wait_event(joined)
        graph = stream.end_capture()
        assert np.isnan(y.get()).all()  # nothing has run yet
        for _ in range(2):
            graph.launch()
        assert total.tolist() == [2, 6, 10, 14]
        x[...] = 1
        graph.launch()
        assert total.tolist() == [5, 9, 13, 17] and z.tolist() == [3, 3, 3, 3]
    assert ("launch", "twice", stream.ptr) in cupy.sim.log


def test_capture_refuses_what_a_gpu_refuses(cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    x, mask = cupy.ones((4, 4), np.float32), cupy.ones(4, bool)
    cupy.cuda.Device().synchronize()
    refused = {
        "__float__": lambda: float(x.sum()),
        "__bool__": lambda: bool(mask.all()),
        "item": lambda: x[0, 0].item(),
        "tolist": lambda: x.tolist(),
        "ndarray.get": lambda: x.get(),
        "mask": lambda: x[mask],
        "nonzero": lambda: cupy.nonzero(mask),
        "argsort": lambda: cupy.argsort(x),
        "array copies": lambda: cupy.asarray(np.ones(3)),
        "set copies": lambda: x.set(np.ones((4, 4), np.float32)),
        "concatenate": lambda: cupy.concatenate([x, x]),
        "cuBLAS": lambda: x @ x,
        "einsum": lambda: cupy.einsum("ij,jk->ik", x, x),
        "cuRAND": lambda: cupy.random.rand(3),
        "Stream.synchronize": stream.synchronize,
        "deviceSynchronize": cupy.cuda.runtime.deviceSynchronize,
    }
    with stream:
        stream.begin_capture()
        for what, call in refused.items():
            with pytest.raises((RuntimeError, NotImplementedError), match=what):
                call()
        x *= 2
        graph = stream.end_capture()
        assert [node.name for node in graph.nodes if node.name == "multiply"]
        assert x.tolist()[0] == [1, 1, 1, 1]


def test_capture_has_to_be_joined(cupy):
    stream, side = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4)
    with pytest.raises(RuntimeError, match="default"):
        cupy.cuda.Stream.null.begin_capture()
    stream.begin_capture()
    side.wait_event(stream.record())
    assert side.is_capturing()
    with side:
        x += 1
    with pytest.raises(RuntimeError, match="Unjoined"):
        stream.end_capture()
    assert not side.is_capturing()
    stream.begin_capture()
    event = stream.record()
    graph = stream.end_capture()
    with pytest.raises(RuntimeError, match="CapturedEvent"):
        side.wait_event(event)
    graph.launch(stream)


def test_capture_races_within(cupy):
    stream, side = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4)
    with stream:
        stream.begin_capture()
        side.wait_event(stream.record())
        x += 1
        with side, pytest.raises(RuntimeError, match="race"):
            x += 1


def test_graphs_use_memory_after_it_was_given_up(cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    pool = cupy.cuda.MemoryPool()
    x = cupy.ones(4)
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        y = x + 1
        graph = stream.end_capture()
        del y
        graph.launch()  # the pool has the bytes, so this may go well
        other = cupy.zeros(4)
        graph.launch()
        assert other.tolist() == [2, 2, 2, 2]  # and this destroys what somebody else put there
        del other
    pool.free_all_blocks()
    with pytest.raises(RuntimeError, match="given back"):
        graph.launch(stream)


# ---- the rest ------------------------------------------------------------------------------


def test_stand_ins_reach_memory_by_address(cupy):
    x = cupy.arange(4, dtype=np.float32)
    bytes_at(x.data.ptr + 4, 8).view(np.float32)[...] = 9
    assert x.tolist() == [0, 9, 9, 3]
    with pytest.raises(RuntimeError, match="nobody has allocated"):
        bytes_at(x.data.ptr + 12, 8)
    issue("mine", lambda: bytes_at(x.data.ptr, 16).fill(0), writes=[x], kind="launch")
    assert x.tolist() == [0, 0, 0, 0] and ("launch", "mine", 0) in cupy.sim.log


def test_memory_that_a_collection_frees_is_found_when_it_is_handed_out_again(cupy):
    x = cupy.zeros(1000)
    cycle, address = [x], x.data.ptr
    cycle.append(cycle)
    del x, cycle
    gc.collect()
    again = cupy.ones(1000)
    assert again.data.ptr == address
    assert bytes_at(address, 8000).view(np.float64).sum() == 1000


def test_memory_is_freed_without_numpy_functions(cupy):
    """The garbage collector may free it while np.errstate changes their state: see Block.broken."""
    pool = cupy.get_default_memory_pool()
    x = cupy.zeros(8)
    used = pool.used_bytes()

    def free():
        np._core.umath._extobj_contextvar.set("no state")
        with pytest.raises(ValueError):
            np.add(1, 1)
        nonlocal x
        del x

    contextvars.copy_context().run(free)
    assert pool.used_bytes() == used - 512


@pytest.mark.skipif(sys.platform != "linux", reason="counts mappings in /proc")
def test_all_libraries_share_one_memory_for_the_stacks_of_threads(cupy):
    """With one for each, a process has more mappings than Linux allows."""
    code = """extern "C" __global__ void wait(int* to) {{
        __shared__ int all[64]; all[threadIdx.x] = {};
        __syncthreads(); to[threadIdx.x] = all[63 - threadIdx.x]; }}"""
    counts = []
    for number in range(4):
        x = cupy.empty(64, np.int32)
        cupy.RawKernel(code.format(number), "wait")((1,), (64,), (x,))
        assert x.tolist() == [number] * 64
        counts.append(len(Path("/proc/self/maps").read_text().splitlines()))
    assert counts[-1] - counts[0] < 64


def test_copies_by_address(cupy):
    runtime = cupy.cuda.runtime
    x, y = cupy.arange(4, dtype=np.float32), cupy.empty(4, np.float32)
    runtime.memcpyAsync(y.data.ptr, x.data.ptr, 16, runtime.memcpyDeviceToDevice, 0)
    y[:2].data.memset_async(0, 8)
    assert y.tolist() == [0, 0, 2, 3]
    with pytest.raises(RuntimeError, match="nobody has allocated"):
        runtime.memcpyAsync(y.data.ptr, x.data.ptr, 20, runtime.memcpyDeviceToDevice, 0)


def test_device_and_ranges(cupy):
    from cupy.cuda import nvtx

    device = cupy.cuda.Device(0)
    device.use()
    nvtx.RangePush("forward")
    nvtx.RangePop()
    assert cupy.sim.names == ["forward"] and device.compute_capability == "90"
    assert cupy.cuda.runtime.getDeviceProperties(0)["name"] == b"Simulated GPU"
    with pytest.raises(RuntimeError, match="invalid device"):
        cupy.cuda.Device(1).use()


def test_modules_are_put_back():
    before = sys.modules.get("cupy")
    stand_in = type(sys)("cupy.cuda.nccl")
    with simulated_gpu({"cupy.cuda.nccl": stand_in}, order="reverse") as cupy:
        assert sys.modules["cupy"] is cupy
        assert cupy.cuda.nccl is stand_in and cupy.sim.reverse() and cupy.sim.reverse()
        from cupy.cuda import nccl

        assert nccl is stand_in
        with pytest.raises(RuntimeError, match="entered already"), simulated_gpu():
            pass
        x = cupy.ones(2)
    assert sys.modules.get("cupy") is before
    with pytest.raises(RuntimeError, match="no GPU is simulated"):
        x + 1


def test_modules_run_on_a_simulated_gpu(tmp_path):
    (tmp_path / "job.py").write_text(
        "import sys, cupy\nprint(cupy.sim.synchronisations, sys.argv[1])\n"
    )
    command = [sys.executable, "-m", "simulated", "job", "argument"]
    folders = f"{tmp_path}:{__file__.rpartition('/')[0]}"
    done = subprocess.run(command, env={"PYTHONPATH": folders}, capture_output=True, text=True)
    assert done.stdout == "0 argument\n", done.stderr
