"""Batches: which tokens make up sample number p, for training and for evaluation.

A training sample is a function of (seed, position in the global order) alone: there is no state to save,
and any split of the order into batches, ranks and runs gives the same samples.
"""

import functools
import hashlib
from collections.abc import Iterator
from numbers import Integral

import numpy as np

from cupytron import progress

from .dataset import Split
from .errors import DataError

# Versions of the global order. A run keeps the version that it began with; its checkpoints name it.
#   1: an epoch begins at one of the first S tokens, so that the last tokens may be in no epoch
#   2: an epoch begins at any token from which all its windows fit
ORDERS = (1, 2)
_ROUNDS = 6
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HALF_WORD = np.uint64(32)


class Loader:
    """Training samples of a split, in an order drawn for each epoch.

    An epoch cuts the stream into n = max(1, (num_tokens - S) // S) windows of S inputs, one after the
    other from an offset in 0 .. num_tokens - 1 - n S, and takes each window once. The offset is drawn
    for each epoch. Targets are the inputs moved on by one token: every token but the first is a target
    in some epochs, and none twice in one. Position p is number p % n of epoch p // n.

    Args:
        split: at least sequence_length + 1 tokens.
        sequence_length: S.
        seed: any integer.
        order: a version of ORDERS; 1 is for runs that began with it.

    Attributes:
        samples_per_epoch: n.

    Raises:
        DataError: the split is too short, or the order is unknown.
    """

    def __init__(
        self, split: Split, sequence_length: int, seed: int, order: int = ORDERS[-1]
    ) -> None:
        if order not in ORDERS:
            raise DataError(
                f"order={order!r} of the samples is none of {ORDERS}, which this version knows; use "
                "the version of cupytron that began the run"
            )
        if sequence_length < 1:
            raise DataError(f"sequence_length={sequence_length} must be at least 1")
        if split.num_tokens < sequence_length + 1:
            raise DataError(
                f"the {split.name} split has {split.num_tokens} tokens, but sequence_length="
                f"{sequence_length} needs {sequence_length + 1}; choose a smaller "
                "train.sequence_length or prepare more text"
            )
        self.split = split
        self.sequence_length = sequence_length
        self.seed = seed
        self.order = order
        self.samples_per_epoch = max(1, (split.num_tokens - sequence_length) // sequence_length)
        num_offsets = split.num_tokens - self.samples_per_epoch * sequence_length
        self._num_offsets = min(sequence_length, num_offsets) if order == 1 else num_offsets

    def batch(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples position .. position + count - 1 of the global order.

        Shapes: inputs, targets (count, S) int64.

        Raises:
            DataError: the tokens have changed since they were opened.
        """
        self.split.check_unchanged()
        tokens, size = self.split.tokens, self.sequence_length + 1
        windows = np.empty((count, size), np.int64)
        for window, start in zip(windows, self.starts(position, count).tolist(), strict=True):
            window[...] = tokens[start : start + size]
        _check_batch(windows, self.split)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def starts(self, position: int, count: int) -> np.ndarray:
        """(count,) int64: the token where each of these samples begins."""
        if position < 0 or count < 1:
            raise DataError(f"position={position} must not be negative, count={count} at least 1")
        n = self.samples_per_epoch
        starts = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, first = divmod(position + done, n)
            size = min(n - first, count - done)
            offset, keys = _epoch_keys(self.seed, epoch, self._num_offsets)
            windows = permute(np.arange(first, first + size, dtype=np.uint64), n, keys)
            starts[done : done + size] = offset + windows.astype(np.int64) * self.sequence_length
            done += size
        return starts


@functools.lru_cache(maxsize=16)
def _epoch_keys(seed: int, epoch: int, num_offsets: int) -> tuple[int, np.ndarray]:
    """The epoch's offset and the keys of its order."""
    digest = hashlib.blake2b(f"cupytron order {seed} {epoch}".encode(), digest_size=64).digest()
    words = np.frombuffer(digest, "<u8").astype(np.uint64)
    return int(words[0]) % num_offsets, words[1 : 1 + _ROUNDS]


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of 0 .. n - 1, computed where it is asked for and stored nowhere.

    A Feistel network on the bits of n - 1, run again on whatever falls outside (cycle walking: Black &
    Rogaway 2002, "Ciphers with arbitrary finite domains"). Each of its rounds can be undone, so that it
    is a bijection whatever the mixing; that must only look random.

    Shapes: index, result (count,) uint64, each below n; keys (rounds,) uint64.
    """
    bits = (n - 1).bit_length()
    result = _feistel(index, bits, keys)
    # the domain is less than twice n, so that few rounds of this are needed
    while (outside := np.flatnonzero(result >= n)).size:
        result[outside] = _feistel(result[outside], bits, keys)
    return result


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    if bits == 0:
        return x.copy()
    low_bits = (bits + 1) // 2
    low_shift, low_mask = np.uint64(low_bits), np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << (bits - low_bits)) - 1)
    high, low = x >> low_shift, x & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            high ^= _mix(low, key) & high_mask
        else:
            low ^= _mix(high, key) & low_mask
    return (high << low_shift) | low


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """Two multiplications, each moving its high bits, which depend on all of x, down to the low ones."""
    y = (x ^ key) * _MULTIPLIER
    y ^= y >> _HALF_WORD
    y *= _MULTIPLIER
    return y >> _HALF_WORD


def _check_batch(ids: np.ndarray, split: Split) -> None:
    """Refuse ids outside the vocabulary, whose lookup would read another row, or none."""
    if split.vocab_size is not None and ids.max() >= split.vocab_size:
        raise DataError(
            f"the {split.name} split has id {ids.max()}, outside the vocabulary of {split.vocab_size}: "
            "the data set was changed while it was in use; prepare the data set again"
        )


def evaluation_batches(
    split: Split, sequence_length: int, batch: int, tokens: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A split in order: each token but the first is a target exactly once.

    Every batch has the same shape; where the split ends, inputs are filled with 0 and targets with -1,
    which the loss ignores.

    Shapes: inputs, targets (batch, S) int64.

    Args:
        tokens: targets at most, the first of the split; None: all of them.

    Raises:
        DataError: the split has fewer than 2 tokens (at the call, not at the first batch), or its tokens
            are no longer those that were opened (at a batch).
    """
    if sequence_length < 1 or batch < 1:
        raise DataError(f"sequence_length={sequence_length} and batch={batch} must be at least 1")
    if split.num_tokens < 2:
        raise DataError(
            f"the {split.name} split has {split.num_tokens} tokens, so there is nothing to evaluate; "
            "prepare the data set with a larger --val-fraction"
        )
    if tokens is not None and not (isinstance(tokens, Integral) and tokens >= 1):
        raise DataError(f"tokens={tokens}: must be a whole number from 1")
    targets = min(split.num_tokens - 1, tokens or split.num_tokens)
    return _evaluation_batches(split, sequence_length, batch, targets)


def _evaluation_batches(
    split: Split, sequence_length: int, batch: int, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    size = batch * sequence_length
    for start in range(0, count, size):
        progress.count(start, count, "tokens")
        split.check_unchanged()
        block = split.tokens[start : min(start + size, count) + 1].astype(np.int64)
        _check_batch(block, split)
        inputs, targets = np.zeros(size, np.int64), np.full(size, -1, np.int64)
        inputs[: len(block) - 1], targets[: len(block) - 1] = block[:-1], block[1:]
        yield inputs.reshape(batch, sequence_length), targets.reshape(batch, sequence_length)
