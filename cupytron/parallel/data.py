"""Data parallelism: how the replicas' gradients of a bucket become one sum, while backward still runs.

Plain: each replica adds up its micro-batches; the sum over the replicas is one collective. Deterministic:
micro-batches are added in a fixed binary tree of neighbours, m with m + 1 first. Micro-batch m is number
m // dp of replica m % dp, so the replicas are the tree's lowest levels, and any number of them (a power
of two) gives the same bits.
"""

import math
from typing import Any

import numpy as np

from cupytron import ops
from cupytron.comm import Communicator, Handle


class TreeSum:
    """Sums arrays that come one after the other, in a binary tree of neighbours."""

    def __init__(self) -> None:
        self._sums: list[Any] = []  # of 2^k arrays each, larger ones first
        self._count = 0

    def add(self, x: Any) -> None:
        """The next array; it is overwritten."""
        count = self._count
        while count & 1:  # two sums of equally many arrays become one
            x += self._sums.pop()
            count >>= 1
        self._sums.append(x)
        self._count += 1

    def take(self) -> Any:
        """The sum of all arrays (None if there were none); counting starts again."""
        if not self._sums:
            return None
        total = self._sums.pop()
        while self._sums:
            total += self._sums.pop()
        self._count = 0
        return total


def tree_reduce_scatter(dp: Communicator, flat: Any) -> Handle:
    """Start the sum over the replicas in a tree of neighbours; each gets its share.

    Shapes: flat (dp n,); the handle's result (n,), new.
    Communication: one all-to-all: (dp - 1) / dp of the array sent by each rank.
    """
    handle = dp.all_to_all(flat, async_op=True)

    def wait() -> Any:
        parts = list(handle.wait().reshape(dp.size, -1))
        while len(parts) > 1:
            for a, b in zip(parts[::2], parts[1::2], strict=True):
                a += b
            parts = parts[::2]
        return parts[0].copy()  # lets go of the others

    return Handle(wait)


def count_targets(dp: Communicator, targets: Any) -> int:
    """How many targets count, on all replicas together."""
    return int(dp.all_reduce(np.array([(targets != ops.IGNORE).sum()], np.int64))[0])


def sum_exactly(dp: Communicator, losses: list[float]) -> float:
    """Sum over the replicas, rounded once: the same bits however the terms are spread."""
    return math.fsum(dp.all_gather(np.array(losses)))
