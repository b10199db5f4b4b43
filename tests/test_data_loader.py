"""The loader: each window once an epoch, the same order whatever the batches; evaluation batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupytron.data import DataError, Loader, Split, evaluation_batches
from cupytron.data.loader import permute

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 97, 1000, 1009]


def split(num_tokens):
    """Tokens that are their own index, so that a sample says where it was taken."""
    return Split(np.arange(num_tokens, dtype=np.uint32), None, "train")


def keys(seed):
    return np.random.default_rng(seed).integers(0, 1 << 64, 6, dtype=np.uint64)


@given(st.integers(1, 3000), st.integers(0, 1 << 32))
@settings(max_examples=80, deadline=None)
def test_permutation_is_a_bijection(n, seed):
    order = permute(np.arange(n, dtype=np.uint64), n, keys(seed))
    assert sorted(order.tolist()) == list(range(n))


def test_permutation_of_one_index_is_that_of_all():
    n = 12345
    whole = permute(np.arange(n, dtype=np.uint64), n, keys(1))
    for i in (0, 1, 777, n - 1):
        assert permute(np.array([i], np.uint64), n, keys(1))[0] == whole[i]
    # far beyond what could be stored
    n = 10**15
    some = permute(np.arange(5, dtype=np.uint64), n, keys(1))
    assert len(set(some.tolist())) == 5 and (some < n).all()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("sequence_length", [1, 2, 7])
def test_an_epoch_takes_each_window_once(n, sequence_length):
    extra = (n * 5) % sequence_length
    loader = Loader(split((n + 1) * sequence_length + extra), sequence_length, seed=3)
    assert loader.samples_per_epoch == n
    for epoch in (0, 1, 5):
        inputs, targets = loader.batch(epoch * n, n)
        starts = np.sort(inputs[:, 0])
        assert (np.diff(starts) == sequence_length).all()
        assert 0 <= starts[0] and starts[-1] + sequence_length < (n + 1) * sequence_length + extra
        assert (inputs == inputs[:, :1] + np.arange(sequence_length)).all()
        assert (targets == inputs + 1).all()


@pytest.mark.parametrize("num_tokens", [9, 10, 15, 16, 17])
def test_short_splits_make_one_window(num_tokens):
    loader = Loader(split(num_tokens), 8, seed=1)
    assert loader.samples_per_epoch == 1
    inputs, targets = loader.batch(0, 400)
    assert targets.max() <= num_tokens - 1
    # every alignment that fits is drawn sooner or later
    assert set(inputs[:, 0].tolist()) == set(range(num_tokens - 8))


def test_batches_do_not_depend_on_how_they_are_split():
    loader = Loader(split(1003), 10, seed=5)
    inputs, targets = loader.batch(0, 350)
    assert inputs.shape == targets.shape == (350, 10)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.flags.c_contiguous and targets.flags.c_contiguous
    for size in (1, 3, 64, 101):
        parts = [loader.batch(p, min(size, 350 - p)) for p in range(0, 350, size)]
        assert (np.concatenate([x for x, _ in parts]) == inputs).all()
        assert (np.concatenate([y for _, y in parts]) == targets).all()
    again = Loader(split(1003), 10, seed=5).batch(17, 20)
    assert (again[0] == inputs[17:37]).all()


def test_seeds_and_epochs_differ_in_order_and_alignment():
    n = 200
    orders, offsets = set(), set()
    for seed in (-1, 0, 1, 1 << 70):
        loader = Loader(split((n + 1) * 50), 50, seed)
        for epoch in range(10):
            starts = loader.starts(epoch * n, n)
            orders.add(tuple((starts // 50).tolist()))
            offsets.add(int(starts.min()))
    assert len(orders) == 40 and len(offsets) > 20


def test_order_looks_random():
    """Correlations of n shuffled numbers have a deviation of 1 / sqrt(n): none is beyond 5 of them."""
    n = 5003
    previous = None
    for seed in range(5):
        order = permute(np.arange(n, dtype=np.uint64), n, keys(seed)).astype(np.float64)
        pairs = [(order, np.arange(n))] + [
            (order[lag:], order[:-lag]) for lag in (1, 2, 64, 4096 // 2)
        ]
        pairs += [] if previous is None else [(order, previous)]
        for a, b in pairs:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))
        # differences between neighbours are spread over all values
        steps = np.bincount((np.diff(order) % n).astype(int), minlength=n)
        assert steps.max() < 12
        # the first tenth takes a tenth of each tenth
        share = np.histogram(order[: n // 10], 10, (0, n))[0]
        assert share.min() > 20 and share.max() < 90
        previous = order


def test_wrong_settings_are_named():
    with pytest.raises(DataError, match=r"train split has 8 tokens, but sequence_length=8 needs 9"):
        Loader(split(8), 8, 1)
    with pytest.raises(DataError, match="sequence_length=0"):
        Loader(split(8), 0, 1)
    for position, count in ((-1, 1), (0, 0)):
        with pytest.raises(DataError, match=f"position={position}"):
            Loader(split(20), 8, 1).batch(position, count)


@given(st.integers(2, 200), st.integers(1, 20), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_evaluation_takes_each_target_once(num_tokens, sequence_length, batch):
    seen = []
    for inputs, targets in evaluation_batches(split(num_tokens), sequence_length, batch):
        assert inputs.shape == targets.shape == (batch, sequence_length)
        assert inputs.dtype == targets.dtype == np.int64
        valid = targets >= 0
        assert valid.any()
        assert (inputs[valid] + 1 == targets[valid]).all()
        assert (inputs[~valid] == 0).all() and (targets[~valid] == -1).all()
        seen += targets[valid].tolist()
    assert seen == list(range(1, num_tokens))


def test_evaluation_of_nothing_is_refused_at_the_call():
    for num_tokens in (0, 1):
        with pytest.raises(DataError, match=f"has {num_tokens} tokens.*--val-fraction"):
            evaluation_batches(split(num_tokens), 4, 2)
    with pytest.raises(DataError, match="batch=0"):
        evaluation_batches(split(9), 4, 0)


# starts of samples 0 .. 5, and of the four around the beginning of epoch 3, as order 1 began: (N, S, seed)
FIRST_ORDER = {
    (191, 64, 0): ([62, 27, 30, 9, 22, 36], [27, 30, 9, 22]),
    (1000, 10, 5): ([326, 926, 446, 746, 766, 566], [363, 313, 298, 178]),
    (1009, 16, 7): ([252, 636, 92, 348, 780, 716], [647, 407, 197, 837]),
}


@pytest.mark.parametrize(("num_tokens", "sequence_length", "seed"), FIRST_ORDER)
def test_the_first_order_stays_as_it_was(num_tokens, sequence_length, seed):
    """Runs that began with order 1 go on with the same samples."""
    loader = Loader(split(num_tokens), sequence_length, seed, order=1)
    first, later = FIRST_ORDER[num_tokens, sequence_length, seed]
    assert loader.starts(0, 6).tolist() == first
    assert loader.starts(3 * loader.samples_per_epoch - 2, 4).tolist() == later


def test_the_last_tokens_are_learned_too():
    """In order 1, the last 63 of 191 characters were a target in no epoch."""
    text = ("abcdefgh" * 100)[:128] + ("STUVWXYZ" * 100)[:63]
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
    learned = Loader(Split(tokens, None, "train"), 64, seed=1).batch(0, 2000)[1]
    assert set(learned.ravel().tolist()) == set(text.encode())
    starts = Loader(split(191), 64, seed=1).starts(0, 5000)
    assert set(starts.tolist()) == set(range(127))
    assert Loader(split(191), 64, seed=1, order=1).batch(0, 2000)[1].max() == 127


@given(st.integers(1, 9), st.integers(0, 60), st.integers(-5, 1 << 70))
@settings(max_examples=60, deadline=None)
def test_each_token_but_the_first_is_a_target_and_none_twice_an_epoch(length, more, seed):
    num_tokens = length + 1 + more
    loader = Loader(split(num_tokens), length, seed)
    n = loader.samples_per_epoch
    assert n == max(1, (num_tokens - length) // length)
    # one of at most 2 S offsets an epoch: 60 S epochs miss a given one with probability e^-30
    targets = loader.batch(0, 60 * length * n)[1].reshape(60 * length, n * length)
    assert all(len(set(epoch)) == n * length for epoch in targets.tolist())
    assert set(targets.ravel().tolist()) == set(range(1, num_tokens))


def test_an_unknown_order_is_refused():
    for order in (0, 3, None, "1"):
        with pytest.raises(DataError, match=r"order=.* is none of \(1, 2\).*version of cupytron"):
            Loader(split(20), 8, 1, order)


@pytest.mark.parametrize("tokens", [1, 4, 7, 8, 9, 18, 19, 100])
def test_evaluation_of_the_first_tokens(tokens):
    whole = [t for _, targets in evaluation_batches(split(20), 4, 2) for t in targets.reshape(-1)]
    found = list(evaluation_batches(split(20), 4, 2, tokens))
    assert all(inputs.shape == targets.shape == (2, 4) for inputs, targets in found)
    counted = [t for _, targets in found for t in targets.reshape(-1) if t >= 0]
    assert counted == [t for t in whole if t >= 0][:tokens]
    with pytest.raises(DataError, match="tokens=0"):
        evaluation_batches(split(20), 4, 2, 0)
