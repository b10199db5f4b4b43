"""Threads: every slice once, errors come through, nothing hangs, bits do not depend on their number."""

import threading

import numpy as np
import pytest

from cupytron import backend, ops


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    yield
    backend.set_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("length", [0, 1, 7, 100])
def test_slices_cover_everything_once(threads, length):
    backend.set_threads(threads)
    seen = np.zeros(length, int)

    def body(s):
        seen[s] += 1

    backend.for_slices(np, body, length, 7)
    assert (seen == 1).all()


def test_an_error_in_a_worker_reaches_the_caller_and_the_workers_go_on():
    backend.set_threads(3)

    def body(index):
        if index == 5:
            raise ValueError("slice 5")

    for _ in range(20):
        with pytest.raises(ValueError, match="slice 5"):
            backend.for_tasks(np, body, 10)
    done = []
    backend.for_tasks(np, done.append, 10)
    assert sorted(done) == list(range(10))


def test_a_loop_inside_a_loop_does_not_hang():
    backend.set_threads(2)
    total = []
    backend.for_tasks(np, lambda i: backend.for_tasks(np, lambda j: total.append((i, j)), 4), 4)
    assert sorted(total) == [(i, j) for i in range(4) for j in range(4)]


def test_loops_from_several_threads_at_once():
    """Ranks as threads of one process share the workers."""
    backend.set_threads(2)
    results = {}

    def rank(r):
        x = np.random.default_rng(r).normal(size=(400, 300))
        results[r] = [ops.gelu(x)[0].sum() for _ in range(5)]

    ranks = [threading.Thread(target=rank, args=(r,)) for r in range(4)]
    [t.start() for t in ranks]
    [t.join() for t in ranks]
    for r, sums in results.items():
        assert sums == [ops.gelu(np.random.default_rng(r).normal(size=(400, 300)))[0].sum()] * 5


def test_elementwise_bits_do_not_depend_on_the_number_of_threads(rng):
    x = rng.normal(size=(3000, 70)).astype(np.float32)
    weight, targets = x[0].copy(), rng.integers(0, 70, 3000)
    results = []
    for threads in (1, 2, 4):
        backend.set_threads(threads)
        logits = x.copy()
        results.append(
            [
                *ops.gelu(x),
                *ops.layer_norm(x, weight, weight, 1e-5),
                *ops.layer_norm_backward(x, x, x[:, :1], weight),
                *ops.swiglu_backward(x, x, x),
                np.float64(ops.cross_entropy(logits, targets, 1.0)),
                logits,
            ]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
