"""The choice of the next token, on one process or on shards of the vocabulary: the same token.

Nothing here depends on where the vocabulary is cut. Sums that decide are of integers, so that they are
exact in any order; random numbers are addressed by token id; and of scores themselves no rank ever sees
more than a few that another holds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupytron.comm import Communicator, SelfCommunicator
from cupytron.ops import philox

_ONE = 2.0**40  # the likeliest token's mass in fixed point: 2^22 tokens of it fit into 63 bits
_FEW = 1024  # candidates that are gathered and sorted
_FAR = np.finfo(np.float64).max  # the largest cost: infinity fills up shards


def choose(
    logits: Any,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    key: tuple[int, int],
    position: int,
    tp: Communicator | None = None,
    first: int = 0,
) -> int:
    """One token id drawn from softmax(logits / temperature), restricted by top_k, then top_p.

    Of tokens by falling score, equal ones by id, top_k keeps k, and top_p those that come before
    probability p is reached. Each token's score gets Gumbel noise of its own, addressed by position and
    token id, and the largest wins (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): that needs no sum
    over the vocabulary, and shards of it decide among their winners. Ties go to the smaller id.

    Args:
        logits: (V_local,), of this rank's tokens; perhaps none.
        tp: ranks with contiguous shares of the vocabulary, in the order of the ids; collective.
        first: id of this rank's first token.
    """
    tp = tp or SelfCommunicator("tp")
    scores = np.asarray(logits, dtype=np.float64)
    if temperature == 0:
        return _winner(scores, np.arange(first, first + len(scores)), tp)
    mine = np.array([[scores.max(initial=-np.inf), len(scores)]])
    shards = tp.all_gather(mine)
    largest, widest = shards.max(axis=0)
    # the likeliest costs 0: however small the temperature, nothing else overflows
    with np.errstate(over="ignore"):
        costs = np.minimum(np.abs(scores - largest) / temperature, _FAR)
    ids = np.arange(first, first + len(scores))
    sizes = _Sizes(int(shards[:, 1].sum()), int(widest))
    if top_k is not None and top_k < sizes.total:
        kept = _kept(costs, _ones, lambda _: top_k, sizes, tp)
        costs, ids = costs[kept], ids[kept]
        sizes = _Sizes(top_k, min(top_k, sizes.widest))
    if top_p is not None:
        numerator, denominator = float(top_p).as_integer_ratio()
        # exact: a float has 53 bits
        kept = _kept(costs, _mass, lambda mass: -(-numerator * mass // denominator), sizes, tp)
        costs, ids = costs[kept], ids[kept]
    words = philox.philox(np, (ids.astype(np.uint64), position, 0, 0), key)
    uniform = (words[0] + 0.5) * 2.0**-32
    return _winner(-costs - np.log(-np.log(uniform)), ids, tp)


def _winner(values: np.ndarray, ids: np.ndarray, tp: Communicator) -> int:
    """The id of the largest value over all ranks, the smallest id if there are several."""
    mine = np.array([[-np.inf, np.inf]])
    if len(values):
        best = values.argmax()
        mine[0] = values[best], ids[best]
    _, winner = max(tp.all_gather(mine).tolist(), key=lambda pair: (pair[0], -pair[1]))
    return int(winner)


class _Sizes(NamedTuple):
    """How many tokens there are on all ranks, and at most on one."""

    total: int
    widest: int


def _ones(costs: np.ndarray) -> np.ndarray:
    return np.ones(len(costs), np.int64)


def _mass(costs: np.ndarray) -> np.ndarray:
    """Probabilities in fixed point: their sums are exact, in any order."""
    return np.rint(np.exp(-costs) * _ONE).astype(np.int64)


def _kept(
    costs: np.ndarray,
    weigh: Callable[[np.ndarray], np.ndarray],
    limit_of: Callable[[int], int],
    sizes: _Sizes,
    tp: Communicator,
) -> np.ndarray:
    """Which elements to keep: those before which the weights, over all ranks, are below a limit.

    A radix select: histograms of the leading byte, summed over the ranks, tell in which bin the limit is
    reached; then the next byte of what lies in that bin, until few are left to sort, or all are equal.

    Args:
        costs: (n,), finite, 0 or more; the order is by cost, then by rank, then by index.
        weigh: int64 weights of costs.
        limit_of: the limit, by the sum of all weights: from 1 to that sum.
        sizes: of costs over the ranks.

    Returns: (n,) bool.
    """
    total, near, limit, prefix, shift = sizes.total, costs, 0, 0, 64
    while total > _FEW and shift > 0:
        shift -= 8
        # the bits of floats that are not negative are ordered as the floats are
        digits = (near.view(np.int64) >> shift) & 255
        histogram = tp.all_reduce(_histogram(digits, weigh(near)))
        reached = histogram[0].cumsum()
        limit = limit or limit_of(int(reached[-1]))
        digit = int(reached.searchsorted(limit))
        weight, total = (int(n) for n in histogram[:, digit])
        limit -= int(reached[digit]) - weight  # what is left of it for this bin
        near, prefix = near[digits == digit], prefix << 8 | digit
    if shift == 0:
        boundary = np.array(prefix).view(np.float64)
        equals = -(-limit * total // weight)
        earlier = int(tp.all_gather(np.array([len(near)]))[: tp.rank].sum())
    else:
        mine = np.full(min(total, sizes.widest), np.inf)
        mine[: len(near)] = near
        everyone = tp.all_gather(mine)
        rest = np.sort(everyone)
        reached = weigh(rest).cumsum()
        last = int(reached.searchsorted(limit or limit_of(int(reached[-1]))))
        boundary = rest[last]
        equals = last + 1 - int(rest.searchsorted(boundary))
        earlier = int(np.count_nonzero(everyone[: tp.rank * len(mine)] == boundary))
    keep = costs < boundary
    keep[(costs == boundary).nonzero()[0][: max(0, equals - earlier)]] = True
    return keep


def _histogram(digits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum of the weights and number of elements for each of 256 digits: (2, 256) int64."""
    histogram = np.zeros((2, 256), np.int64)
    np.add.at(histogram[0], digits, weights)  # bincount would sum in float64
    np.add.at(histogram[1], digits, 1)
    return histogram
