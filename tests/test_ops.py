"""Each function of ops against a plain definition of the same mathematics."""

import math

import numpy as np
import pytest

from cupytron import ops
from cupytron.ops import philox
from cupytron.ops.activation import erf


def test_matmul_and_linear_are_products(rng):
    for m, k, n in ((1, 1, 1), (5, 3, 2), (300, 70, 129), (1100, 40, 60)):
        a, b, bias = rng.normal(size=(m, k)), rng.normal(size=(k, n)), rng.normal(size=n)
        np.testing.assert_allclose(ops.matmul(a, b), a @ b, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(ops.linear(a, b, bias), a @ b + bias, rtol=1e-12, atol=1e-12)
        total = rng.normal(size=(k, n))
        want = total + a.T @ (a @ b)
        ops.add_product(total, a, a @ b)
        np.testing.assert_allclose(total, want, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(ops.sum_rows(a), a.sum(axis=0), rtol=1e-12, atol=1e-12)


def test_matmul_writes_where_it_is_told(rng):
    a, b = rng.normal(size=(6, 4)), rng.normal(size=(4, 3))
    out = np.full((6, 3), np.nan)
    assert ops.matmul(a, b, out=out) is out
    np.testing.assert_allclose(out, a @ b)


def test_norms(rng):
    # enough rows for several slices
    x = rng.normal(size=(3000, 33)) * 3 + 1
    weight, bias = rng.normal(size=33), rng.normal(size=33)
    y, (_, rstd) = ops.layer_norm(x, weight, bias, 1e-5)
    centred = x - x.mean(axis=1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, want * weight + bias, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ops.layer_norm(x, weight, None, 1e-5)[0], want * weight, rtol=1e-10)
    assert rstd.shape == (3000, 1)
    y, _ = ops.rms_norm(x, weight, 1e-5)
    want = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(y, want, rtol=1e-10)


def test_eps_counts_for_rows_of_zeros():
    zeros, ones = np.zeros((2, 4)), np.ones(4)
    for y, (_, rstd) in (ops.rms_norm(zeros, ones, 1e-5), ops.layer_norm(zeros, ones, None, 1e-5)):
        assert not y.any()
        np.testing.assert_allclose(rstd, 1 / math.sqrt(1e-5))


def test_activations(rng):
    x = rng.normal(size=(700, 150)) * 4
    x[0, :3] = (0.0, 40.0, -40.0)
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    exact = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    np.testing.assert_allclose(ops.gelu(x.copy())[0], tanh, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ops.gelu_exact(x.copy())[0], exact, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(ops.relu(x.copy())[0], np.maximum(x, 0))
    gate, up = x, rng.normal(size=x.shape)
    with np.errstate(over="ignore"):
        silu = gate / (1 + np.exp(-gate))
    np.testing.assert_allclose(ops.swiglu(gate, up), silu * up, rtol=1e-12, atol=1e-12)


def test_erf_is_the_c_library_s():
    x = np.concatenate([np.linspace(-7, 7, 4001), [0.0, 1e-300, 0.46875, 4.0, -4.0, 30.0, -np.inf]])
    want = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(erf(x), want, rtol=1e-15, atol=3e-16)


@pytest.mark.parametrize("bad", [1e4, -1e4])
def test_activations_do_not_overflow_in_float32(bad):
    x = np.full((2, 2), bad, np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(ops.swiglu(x, x)).all()
        assert all(np.isfinite(g).all() for g in ops.swiglu_backward(x * 0 + 1, x, x))
        assert np.isfinite(ops.gelu(x.copy())[0]).all()


def test_cross_entropy_and_its_gradient(rng):
    logits, targets = rng.normal(size=(900, 130)) * 5, rng.integers(0, 130, 900)
    targets[::7] = ops.IGNORE
    counted = targets != ops.IGNORE
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    losses = -np.log(probabilities[np.arange(900), targets])[counted]
    want = probabilities.copy()
    want[np.arange(900), targets] -= 1
    want[~counted] = 0
    loss = ops.cross_entropy(logits, targets, scale=0.25)
    assert loss == pytest.approx(0.25 * losses.sum(), rel=1e-12)
    np.testing.assert_allclose(logits, want * 0.25, rtol=1e-10, atol=1e-15)


def test_cross_entropy_is_stable_for_large_logits():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    loss = ops.cross_entropy(logits, np.array([0, 0]), 1.0)
    assert loss == pytest.approx(2e4)
    np.testing.assert_array_equal(logits, [[0, 0], [-1, 1]])


def test_cross_entropy_of_ignored_targets_alone_is_zero():
    logits = np.ones((3, 4))
    assert ops.cross_entropy(logits, np.full(3, ops.IGNORE), 1.0) == 0
    assert not logits.any()


@pytest.mark.parametrize("vocab", [9, 2000])  # one-hot product, and sorting
def test_embedding_gradient_sums_over_equal_ids(rng, vocab):
    ids, dy = rng.integers(0, vocab // 2, 150), rng.normal(size=(150, 6))
    start = rng.normal(size=(vocab, 6))
    want = start.copy()
    np.add.at(want, ids, dy)
    ops.embedding_backward(dy, ids, start)
    np.testing.assert_allclose(start, want, rtol=1e-12)
    np.testing.assert_array_equal(ops.embedding(ids, start), start[ids])


def test_sinusoidal_positions_are_the_paper_s():
    table = ops.sinusoidal_positions(np.arange(5), 6, np.float64)
    for position in range(5):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert table[position, 2 * i] == pytest.approx(math.sin(angle))
            assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle))


def test_rotary_turns_pairs_and_keeps_relative_positions(rng):
    positions = np.arange(10)
    cos, sin = ops.rotary_table(positions, 8, 10000.0, np.float64)
    x = rng.normal(size=(2, 10, 3, 8))
    y = x.copy()
    ops.rotary(y, cos, sin)
    for i in range(4):
        angle = positions * 10000.0 ** (-2 * i / 8)
        z = (x[..., i] + 1j * x[..., i + 4]) * np.exp(1j * angle)[:, None]
        np.testing.assert_allclose(y[..., i] + 1j * y[..., i + 4], z, rtol=1e-12)
    ops.rotary(y, cos, -sin)
    np.testing.assert_allclose(y, x, rtol=1e-12, atol=1e-12)


# --- Philox


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, want):
    """The known-answer vectors of Random123, the authors' library."""
    words = philox.philox(np, counter, key)
    assert " ".join(f"{int(w):08x}" for w in words) == want


def test_a_part_of_the_initial_values_is_a_part_of_the_whole():
    key = philox.key_of(1, "init", "some.weight")
    whole = philox.normal((7, 13), (slice(0, 7), slice(0, 13)), key)
    for rows, columns in (
        ((0, 7), (3, 9)),
        ((2, 5), (0, 13)),
        ((6, 7), (12, 13)),
        ((0, 7), (0, 1)),
    ):
        box = (slice(*rows), slice(*columns))
        np.testing.assert_array_equal(philox.normal((7, 13), box, key), whole[box])
    line = philox.normal((91,), (slice(0, 91),), key)
    np.testing.assert_array_equal(line, whole.reshape(-1))
    np.testing.assert_array_equal(philox.normal((91,), (slice(30, 77),), key), line[30:77])


def test_initial_values_are_normal():
    x = philox.normal((400, 500), (slice(0, 400), slice(0, 500)), philox.key_of(2, "init", "w"))
    n = x.size
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    below = (x < -1).mean()
    assert abs(below - 0.158655) < 5 * math.sqrt(0.1335 / n)
    # neighbours, which share a block, are independent
    flat = x.reshape(-1)
    assert all(abs((flat[d:] * flat[:-d]).mean()) < 5 / math.sqrt(n) for d in (1, 2, 3, 4))


def test_dropout_masks_depend_on_global_indices_only(rng):
    x, key = rng.normal(size=(40, 19)), philox.key_of(1, "dropout", "layer")
    y, mask = ops.dropout(x, 0.3, key, step=5, first_token=100)
    part, part_mask = ops.dropout(x[10:25], 0.3, key, step=5, first_token=110)
    np.testing.assert_array_equal(mask[10:25], part_mask)
    np.testing.assert_array_equal(y[10:25], part)
    for other in (
        ops.dropout(x, 0.3, key, step=6, first_token=100)[1],
        ops.dropout(x, 0.3, philox.key_of(2, "dropout", "layer"), step=5, first_token=100)[1],
        ops.dropout(x, 0.3, philox.key_of(1, "dropout", "other"), step=5, first_token=100)[1],
    ):
        assert 0.3 < (other == mask).mean() < 0.75  # independent masks agree in 0.58
    np.testing.assert_allclose(y, np.where(mask, x / 0.7, 0), rtol=1e-4)
    np.testing.assert_array_equal(ops.dropout_backward(x, mask, 0.3), y)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p):
    x = np.ones((2000, 100))
    y, mask = ops.dropout(x, p, philox.key_of(1, "dropout", "a"), 0, 0)
    assert abs(mask.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / x.size)
    assert abs(y.mean() - 1) < 5 * math.sqrt(p / (1 - p) / x.size)
    assert mask.mean(axis=0).std() < 2 * math.sqrt(p * (1 - p) / 2000)
