"""Kernels on the simulated GPU: right in every dtype and shape, the same bits each time, no waiting.

What is compared is in kernel_cases.py; a real GPU is asked the same by `make gpu-check`.
"""

import numpy as np
import pytest
from kernel_cases import CASES, DTYPES, Sizes, inequality, relative_error, tolerance
from simulated import simulated_gpu

from cupytron import ops
from cupytron.kernels import activation, dropout, embedding, loader, norm, rotary, sums
from cupytron.nn import Dropout
from cupytron.stash import MicroBatch, Stash

ODD = Sizes(3, 7, rows=5, length=3, head_size=6, shift=1)
ONE = Sizes(1, 1, rows=1, batch=1, length=1, kv_heads=1, groups=1, head_size=2)
NORMS = ("layer_norm", "layer_norm without bias", "add_layer_norm", "rms_norm", "add_rms_norm")


@pytest.fixture(scope="module")
def cupy():
    with simulated_gpu() as module:
        yield module


def hold(cupy, case, dtype, sizes):
    """Run a case: errors within what rounding explains, and the host has not waited before it looked."""
    errors = CASES[case](cupy, DTYPES[dtype], sizes)
    assert errors
    too_large = {
        output: error
        for output, error in errors.items()
        if not error <= tolerance(DTYPES[dtype], output)
    }
    assert not too_large


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_wide_accesses(cupy, case, dtype):
    hold(cupy, case, dtype, Sizes())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_odd_shapes(cupy, case, dtype):
    hold(cupy, case, dtype, ODD)


@pytest.mark.parametrize("case", CASES)
def test_unaligned_arrays_of_an_even_width(cupy, case):
    hold(cupy, case, "float32", Sizes(3, 16, rows=8, shift=1))


@pytest.mark.parametrize("case", CASES)
def test_a_single_element(cupy, case):
    hold(cupy, case, "float32", ONE)


@pytest.mark.parametrize("case", CASES)
def test_no_tokens(cupy, case):
    cupy.sim.clear()
    hold(cupy, case, "float32", Sizes(tokens=0, length=0))
    kinds = {name for kind, name, _ in cupy.sim.log if kind == "launch"}
    assert not kinds


# rows of a warp, of blocks of several sizes, in registers and read again; widths that leave threads idle
WIDTHS = [
    ("bfloat16", 96),
    ("float32", 769),
    ("bfloat16", 1000),
    ("float16", 1280),
    ("float64", 4104),
    ("float32", 12300),
    ("float64", 16400),
]


@pytest.mark.parametrize(("dtype", "width"), WIDTHS)
def test_norms_of_all_widths(cupy, dtype, width):
    for case in NORMS:
        hold(cupy, case, dtype, Sizes(3, width))


@pytest.mark.parametrize("width", [64, 1280, 12300])
def test_norms_of_more_rows_than_blocks(cupy, monkeypatch, width):
    """A block of the backward then has several groups of rows."""
    monkeypatch.setattr(loader, "multiprocessors", lambda: 1)
    for case in ("layer_norm", "rms_norm"):
        hold(cupy, case, "float32", Sizes(37 if width == 64 else 7, width))


def test_table_gradient_of_many_tokens(cupy):
    """Lists of equal ids that go over chunks and tiles, by themselves and between others."""
    hold(cupy, "embedding_backward", "float32", Sizes(2300, 20, rows=700))
    hold(cupy, "embedding_backward", "bfloat16", Sizes(600, 264, rows=3))


def test_sums_of_many_rows(cupy):
    hold(cupy, "sum_rows", "bfloat16", Sizes(4001, 8))
    hold(cupy, "sum_rows", "float32", Sizes(2, 5000))


def test_dropout_of_many_elements(cupy):
    """Some of their 16 bits are just the threshold."""
    hold(cupy, "dropout", "float32", Sizes(600, 512))


def calls(cupy, dtype, gaps):
    """Every function on fresh arrays, views with gaps if wanted: name -> function without arguments."""
    rng = np.random.default_rng(5)

    def array(*shape):
        room = cupy.asarray(rng.normal(size=(*shape[:-1], 2 * shape[-1])).astype(dtype))
        return room[..., ::2] if gaps else cupy.ascontiguousarray(room[..., ::2])

    t, d = 5, 24
    acc = np.float64 if dtype == np.float64 else np.float32
    x, delta, dy, residual, gate, up = (array(t, d) for _ in range(6))
    weight, bias = array(1, d)[0], array(1, d)[0]
    ids = cupy.asarray(rng.integers(0, 7, size=(t, 2)))[:, 0]
    ids = ids if gaps else cupy.ascontiguousarray(ids)
    table, dtable = array(7, d), cupy.zeros((7, d), acc)
    heads, cos, sin = (
        cupy.ascontiguousarray(array(1, t, 2, 3, 8)),
        array(t, 4).astype(acc),
        array(t, 4).astype(acc),
    )
    mask, wide = array(t, d) > 0, array(t, d).astype(acc)
    step = cupy.asarray(np.int64(3))
    _, layer_saved = norm.layer_norm(x, weight, bias, 1e-5)
    _, rms_saved = norm.rms_norm(x, weight, 1e-5)
    return {
        "layer_norm": lambda: norm.layer_norm(x, weight, bias, 1e-5)[0],
        "add_layer_norm": lambda: norm.add_layer_norm(x, delta.copy(), weight, bias, 1e-5)[1],
        "layer_norm_backward": lambda: norm.layer_norm_backward(dy, layer_saved, weight, residual)[
            0
        ],
        "rms_norm": lambda: norm.rms_norm(x, weight, 1e-5)[0],
        "add_rms_norm": lambda: norm.add_rms_norm(x, delta.copy(), weight, 1e-5)[0],
        "rms_norm_backward": lambda: norm.rms_norm_backward(dy, rms_saved, weight, residual)[1],
        "gelu": lambda: activation.gelu(x)[0],
        "gelu_backward": lambda: activation.gelu_backward(dy + dy, activation.gelu(x)[1]),
        "swiglu": lambda: activation.swiglu(gate, up),
        "swiglu_backward": lambda: activation.swiglu_backward(dy, gate, up)[0],
        "rotary": lambda: (rotary.rotary(heads, cos, sin), heads)[1],
        "embedding": lambda: embedding.embedding(ids, table),
        "embedding_backward": lambda: (embedding.embedding_backward(dy, ids, dtable), dtable)[1],
        "dropout": lambda: dropout.dropout(x, 0.5, (1, 2), step, 0)[0],
        "dropout_backward": lambda: dropout.dropout_backward(dy, mask, 0.5),
        "sum_rows": lambda: sums.sum_rows(dy),
        "add_to": lambda: sums.add_to(wide, x),
    }


@pytest.mark.parametrize("dtype", [np.float32, DTYPES["bfloat16"]])
def test_arrays_with_gaps(cupy, dtype):
    """The same bits as from contiguous arrays."""
    plain, gaps = (calls(cupy, dtype, gaps) for gaps in (False, True))
    for name in plain:
        found, wanted = (cupy.ascontiguousarray(run()) for run in (gaps[name], plain[name]))
        assert inequality(found, wanted) == 0.0, name


def test_captured_into_a_graph(cupy):
    """Nothing waits for the device or copies from the host, and a graph repeats what was captured."""
    for name, run in calls(cupy, np.float32, gaps=False).items():
        if name in ("rotary", "embedding_backward", "add_to"):  # change what they are given
            continue
        wanted = run().get()
        before = cupy.sim.synchronisations
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            found = run()
            graph = stream.end_capture()
            assert cupy.sim.synchronisations == before, name
            found[...] = 0
            graph.launch(stream)
        stream.synchronize()
        assert inequality(found, wanted) == 0.0, name


def test_numbers_go_to_the_device_without_a_copy(cupy):
    x = cupy.asarray(np.ones((4, 16), np.float32))
    cupy.sim.clear()
    dropout.dropout(x, 0.5, (1, 2), 3, 4)
    assert not [entry for entry in cupy.sim.log if entry[0] == "copy"]
    assert cupy.sim.synchronisations == 0


def test_the_layer_of_dropout_is_one_kernel(cupy):
    step = cupy.asarray(np.int64(3))
    batch = MicroBatch(1, 4, None, step, cupy.asarray(np.int64(8)), training=True)
    layer, x = Dropout(0.5), cupy.asarray(np.ones((4, 16), np.float32))
    layer.name = "a"
    ops.use({"dropout": dropout.dropout})
    try:
        cupy.sim.clear()
        layer.forward(x, Stash(batch))
    finally:
        ops.use(None)
    assert [kind for kind, *_ in cupy.sim.log] == ["launch"]


def test_dropout_of_a_graph_goes_on_with_the_step(cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.asarray(np.ones((4, 16), np.float32))
        step, first = cupy.asarray(np.int64(3)), cupy.asarray(np.int64(0))
        stream.begin_capture()
        _, mask = dropout.dropout(x, 0.5, (1, 2), step, first)
        graph = stream.end_capture()
        for now in (3, 4):
            step[...] = now
            graph.launch(stream)
            stream.synchronize()
            wanted = ops.REFERENCE["dropout"](np.ones((4, 16)), 0.5, (1, 2), now, 0)[1]
            assert inequality(mask, wanted) == 0.0


def test_add_to_takes_any_dtypes_and_strides(cupy):
    a, b = np.arange(12.0).reshape(3, 4), np.arange(12.0, 24.0).reshape(3, 4)
    for one, other in (
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.float32, np.float64),
    ):
        total = cupy.asarray(a.astype(one))
        assert sums.add_to(total, cupy.asarray(b.astype(other))) is total
        assert relative_error(total, a + b) < 1e-6
    total = cupy.asarray(a.astype(np.float32))
    sums.add_to(total.T, cupy.asarray(b.T.astype(np.float32)))
    assert relative_error(total, a + b) < 1e-6


def test_what_a_kernel_cannot_take_is_refused(cupy):
    x = cupy.zeros((4, 8), np.float32)
    weight, half = cupy.ones(8, np.float32), cupy.ones(8, np.float16)
    with pytest.raises(
        ValueError, match=r"weight is float16 \(8,\); this kernel takes float32 \(8,\)"
    ):
        norm.layer_norm(x, half, None, 1e-5)
    with pytest.raises(ValueError, match=r"bias is float32 \(4,\)"):
        norm.layer_norm(x, weight, weight[:4], 1e-5)
    with pytest.raises(ValueError, match=r"dy is float32 \(3, 8\)"):
        activation.gelu_backward(x[:3], x)
    with pytest.raises(ValueError, match=r"up is float32 \(4, 4\)"):
        activation.swiglu(x, x[:, :4])
    with pytest.raises(ValueError, match=r"mask is float32"):
        dropout.dropout_backward(x, x, 0.5)
    with pytest.raises(ValueError, match=r"step is float32 \(\)"):
        dropout.dropout(x, 0.5, (1, 2), cupy.zeros((), np.float32), 0)
    ids = cupy.zeros(4, np.int64)
    with pytest.raises(ValueError, match=r"dtable is float16 \(5, 8\), contiguous True"):
        embedding.embedding_backward(x, ids, cupy.zeros((5, 8), np.float16))
    with pytest.raises(ValueError, match=r"contiguous False"):
        embedding.embedding_backward(x, ids, cupy.zeros((5, 16), np.float32)[:, :8])
    heads = cupy.zeros((1, 2, 3, 16), np.float32)
    with pytest.raises(ValueError, match=r"the last dim contiguous"):
        rotary.rotary(
            heads[..., ::2], cupy.zeros((2, 4), np.float32), cupy.zeros((2, 4), np.float32)
        )
    with pytest.raises(ValueError, match=r"cos is float32 \(3, 8\)"):
        rotary.rotary(heads, cupy.zeros((3, 8), np.float32), cupy.zeros((2, 8), np.float32))
