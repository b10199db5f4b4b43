"""Attention, loss and update of a GPU, on the simulated one: numbers, repetition, what decides a step."""

import math
import re

import numpy as np
import pytest
from kernel_cases import DTYPES, TOLERANCE, Sizes
from kernel_cases_2 import CASES, control_of
from simulated import simulated_gpu

from cupytron import ops
from cupytron.kernels import attention, cross_entropy, loader, optimizer
from cupytron.kernels.optimizer import Control
from cupytron.ops import philox


@pytest.fixture(scope="module")
def cupy():
    with simulated_gpu() as cupy:
        yield cupy


# whole accesses of 16 bytes; nothing that is a multiple of anything
ROUND = Sizes(tokens=16, width=64, rows=128, length=64, batch=1, kv_heads=1, groups=2, head_size=64)
ODD = Sizes(tokens=11, width=37, rows=61, length=71, batch=2, kv_heads=2, groups=2, head_size=10)


def tolerance(case: str, dtype: str) -> float:
    # longer sums of larger numbers
    return 1e-11 if case.startswith("attention") and dtype == "float64" else TOLERANCE[dtype]


@pytest.mark.parametrize("sizes", [ROUND, ODD], ids=["round", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_case(cupy, case, dtype, sizes):
    errors = CASES[case](cupy, DTYPES[dtype], sizes)
    allowed = tolerance(case, dtype)
    assert {name: error for name, error in errors.items() if not error <= allowed} == {}


def test_heads_of_several_chunks(cupy):
    """A head that is wider than a tile of features, and does not fill its last one."""
    sizes = Sizes(batch=1, length=33, kv_heads=1, groups=2, head_size=72)
    for dtype in ("float32", "float64"):
        errors = CASES["attention"](cupy, DTYPES[dtype], sizes)
        assert max(errors.values()) <= tolerance("attention", dtype), errors


def test_head_too_large(cupy):
    q, k = cupy.zeros((1, 2, 1, 1, 264), np.float32), cupy.zeros((1, 2, 1, 264), np.float32)
    with pytest.raises(ValueError, match=r"head size 264.*at most 256"):
        attention.attention(q, k, k)


def test_nothing_is_done_for_no_tokens(cupy):
    """A grid of no blocks would be launched as one of one block, which reads what is not there."""
    q, k = cupy.zeros((0, 4, 1, 1, 8), np.float32), cupy.zeros((0, 4, 1, 8), np.float32)
    o, lse = attention.attention(q, k, k)
    attention.attention_backward(o, q, k, k, o, lse, (q, k, k))
    assert o.shape == q.shape and lse.shape == (0, 1, 1, 4)
    logits, targets = cupy.zeros((0, 9), np.float32), cupy.zeros(0, np.int64)
    assert cross_entropy.cross_entropy(logits, targets, 1.0).item() == 0
    own = cross_entropy.shard_exponentials(logits, targets, 0)
    assert cross_entropy.shard_cross_entropy(logits, targets, own, own[None], 1.0, 0).item() == 0


@pytest.mark.parametrize("target", [9, -2, 2**40])
def test_a_target_in_no_shard_gives_no_loss_that_looks_right(cupy, target):
    logits, targets = np.zeros((2, 8)), np.array([3, target])
    for table, to in ((ops.REFERENCE, np.array), (vars(cross_entropy), cupy.asarray)):
        shards = [to(np.ascontiguousarray(logits[:, at : at + 4])) for at in (0, 4)]
        ids, scale = to(targets), 1.0
        own = [table["shard_exponentials"](s, ids, 4 * n) for n, s in enumerate(shards)]
        everyone = to(np.stack([x if to is np.array else x.get() for x in own]))
        for n, shard in enumerate(shards):
            loss = table["shard_cross_entropy"](shard, ids, own[n], everyone, scale, 4 * n)
            assert not np.isfinite(float(loss))


def test_dropout_at_its_threshold(cupy):
    """Of 65536 equally likely numbers, the one that p itself stands for is kept."""
    key, token, step = (3, 5), 20, 2
    bits = int(philox.philox(np, (0, token, step, 1), key)[0]) & 0xFFFF
    dropout = ops.AttentionDropout(bits / 65536, key, step, token, 0)
    ones = np.ones((1, 1, 1, 1, 8))
    wanted, _ = ops.REFERENCE["attention"](ones, ones[0], ones[0], dropout)
    found, _ = attention.attention(*(cupy.asarray(x) for x in (ones, ones[0], ones[0])), dropout)
    assert wanted.all()
    np.testing.assert_allclose(found.get(), wanted)


def test_target_outside_of_the_vocabulary(cupy):
    """It would read another row's memory; a loss that is not a number stops the run."""
    for target in (7, -2):
        targets = cupy.asarray(np.array([1, target]))
        loss = cross_entropy.cross_entropy(cupy.zeros((2, 7), np.float32), targets, 1.0)
        assert math.isnan(loss.get())


def test_nan_in_the_logits_is_seen(cupy):
    logits = np.zeros((1, 40), np.float32)
    logits[0, 17] = np.nan
    loss = cross_entropy.cross_entropy(cupy.asarray(logits), cupy.asarray(np.array([3])), 1.0)
    assert math.isnan(loss.get())


# what decides about a step


def test_slots_are_the_same_in_both_languages():
    names = re.search(r"enum Control \{([^}]*)\}", loader.source("optimizer"))[1]
    assert [name.strip() for name in names.split(",")] == [slot.name for slot in Control]


def decide(cupy, control, total: float, loss: float = 1.0, **settings) -> dict[str, float]:
    """One step's decision, and the control vector after it by name."""
    optimizer.begin(control)
    optimizer.add_loss(control, cupy.full((), loss, np.float64))
    optimizer.decide(
        control,
        cupy.full(1, total, np.float64),
        **{"scaling": False, "growth_interval": 2, **settings},
    )
    optimizer.finish(control)
    return {slot.name: float(control.get()[slot]) for slot in Control}


def test_losses_add_up_without_the_loss_scale(cupy):
    control = control_of(cupy, LOSS_SCALE=8.0, LOSS=5.0)
    optimizer.begin(control)
    for loss in (2.0, 4.0):
        optimizer.add_loss(control, cupy.full((), loss, np.float64))
    assert control.get()[Control.LOSS] == 0.75


@pytest.mark.parametrize(
    "clip, multiplier", [(0.0, 1.0), (2.5, 0.5), (5.0, 1.0), (6.0, 1.0)], ids=str
)
def test_clipping(cupy, clip, multiplier):
    found = decide(cupy, optimizer.new_control(1.0, clip), 25.0)
    assert found["NORM"] == 5 and found["MULTIPLIER"] == multiplier
    assert found["APPLY"] == 1 and found["STEP"] == 1


def test_clipping_of_scaled_gradients(cupy):
    found = decide(cupy, optimizer.new_control(4.0, 1.0), 64.0, scaling=True)
    assert found["NORM"] == 2  # 8 / 4
    assert found["MULTIPLIER"] == 0.5 / 4


def test_the_loss_scale_falls_and_grows(cupy):
    control = optimizer.new_control(4.0, 0.0)
    found = [decide(cupy, control, total, scaling=True) for total in (1, 1, 1, math.inf, 1, 1)]
    assert [f["LOSS_SCALE"] for f in found] == [4, 8, 8, 4, 4, 8]
    # gradients of a step have been made with the scale that it began with
    assert [f["MULTIPLIER"] for f in found if f["APPLY"]] == [1 / 4, 1 / 4, 1 / 8, 1 / 4, 1 / 4]
    assert [f["GOOD_STEPS"] for f in found] == [1, 0, 1, 0, 1, 0]
    assert [f["APPLY"] for f in found] == [1, 1, 1, 0, 1, 1]
    assert [f["STEP"] for f in found] == [1, 2, 3, 3, 4, 5]
    assert found[-1]["SKIPPED"] == 1 and found[-1]["FAILED"] == 0


def test_the_loss_scale_has_bounds(cupy):
    assert decide(cupy, optimizer.new_control(1.0, 0.0), math.nan, scaling=True)["LOSS_SCALE"] == 1
    high = optimizer.new_control(2.0**24, 0.0)
    assert decide(cupy, high, 1.0, scaling=True, growth_interval=1)["LOSS_SCALE"] == 2.0**24


@pytest.mark.parametrize("total, loss", [(math.inf, 1.0), (math.nan, 1.0), (1.0, math.nan)])
def test_without_scaling_a_failure_lasts(cupy, total, loss):
    control = optimizer.new_control(1.0, 1.0)
    good = decide(cupy, control, 1.0)
    assert good["FAILED"] == 0 and good["STEP"] == 1
    for step in ((total, loss), (1.0, 1.0), (math.inf, 1.0)):
        found = decide(cupy, control, *step)
        assert (found["FAILED"], found["APPLY"], found["STEP"]) == (2, 0, 1)


@pytest.mark.parametrize("name, states", [("adamw", 2), ("sgd", 1)])
def test_a_step_that_is_left_out(cupy, name, states):
    """Weights, state and copy stay as they are; the gradient, whatever is in it, is gone."""
    length = 4099
    rng = np.random.default_rng(0)
    start = rng.normal(size=(1 + states, length)).astype(np.float32)
    weights, *state = (cupy.asarray(x) for x in start)
    copy = cupy.asarray(start[0].astype(np.float16))
    gradient = cupy.asarray(np.full(length, np.nan, np.float32))
    control = control_of(cupy, LR=0.1, APPLY=0.0)
    rest = (0.9, 0.99, 1e-8, 0.1) if name == "adamw" else (0.9, 0.1)
    getattr(optimizer, name)(weights, copy, gradient, *state, length, control, *rest)
    for found, before in zip((weights, *state), start, strict=True):
        assert np.array_equal(found.get(), before)
    assert np.array_equal(copy.get(), start[0].astype(np.float16))
    assert not gradient.get().any()


def test_large_arrays_take_several_turns(cupy):
    """More elements than all threads together take at once."""
    length = optimizer._MOST_BLOCKS * optimizer._THREADS * 4 + 5
    weights = np.arange(length, dtype=np.float32)
    copy = cupy.asarray(np.zeros(length, np.float16))
    optimizer.copy_weights(cupy.asarray(weights), copy)
    with np.errstate(over="ignore"):
        assert np.array_equal(copy.get(), weights.astype(np.float16))


def test_squares_of_long_ranges(cupy):
    """Ranges of several parts, the last one not full."""
    gradient = (
        np.random.default_rng(1).normal(size=(2, optimizer._PART * 2 + 77)).astype(np.float32)
    )
    found = optimizer.squares(cupy.asarray(gradient.reshape(-1)), 2)
    np.testing.assert_allclose(found.get(), (gradient.astype(float) ** 2).sum(axis=1), rtol=1e-13)
    assert np.array_equal(optimizer.squares(cupy.asarray(gradient[1]), 1).get(), found.get()[1:])
    part = re.search(r"PART = 1 << (\d+)", loader.source("optimizer"))[1]
    assert optimizer._PART == 1 << int(part)


def test_everything_can_be_captured(cupy):
    """A step in a graph: replayed with new numbers it does what they ask for, without the host."""
    stream = cupy.cuda.Stream(non_blocking=True)
    weights = cupy.asarray(np.ones(8, np.float32))
    gradient = cupy.asarray(np.full(8, 2.0, np.float32))
    state = cupy.asarray(np.zeros(8, np.float32))
    logits, targets = cupy.zeros((2, 4), np.float32), cupy.asarray(np.array([0, 3]))
    control = control_of(cupy, LR=0.5)
    cupy.cuda.Device().synchronize()
    before = cupy.sim.synchronisations
    pool = (
        cupy.cuda.MemoryPool()
    )  # the graph's own: its temporary arrays have to stay where they are
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        optimizer.begin(control)
        optimizer.add_loss(control, cross_entropy.cross_entropy(logits, targets, 0.5))
        optimizer.decide(control, optimizer.squares(gradient, 1), scaling=False, growth_interval=1)
        optimizer.sgd(weights, None, gradient, state, 0, control, 0.0, 0.0)
        optimizer.finish(control)
        graph = stream.end_capture()
        assert cupy.sim.synchronisations == before
        graph.launch(stream)
        stream.synchronize()
        assert np.array_equal(weights.get(), np.zeros(8)) and control.get()[Control.STEP] == 1
        assert control.get()[Control.LOSS] == pytest.approx(math.log(4))
        gradient.set(np.full(8, 1.0, np.float32))
        control[Control.LR] = 2.0
        graph.launch(stream)
        stream.synchronize()
    assert np.array_equal(weights.get(), np.full(8, -2.0)) and control.get()[Control.STEP] == 2
