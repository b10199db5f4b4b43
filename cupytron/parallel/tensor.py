"""Tensor and sequence parallelism: layers cut along their features, and the region between them.

A column-parallel layer has a share of its outputs on each rank, a row-parallel layer a share of its inputs;
between the two no rank needs what another has. Where activations enter and leave such a region, ranks talk.

Reference: Shoeybi et al. 2019, arXiv:1909.08053, section 3 (f and g); Korthikanti et al. 2022,
arXiv:2205.05198, section 4.2 (g and g bar, sequence parallelism).
"""

from typing import Any

from cupytron import backend, ops
from cupytron.comm import Communicator
from cupytron.layer import Layer, Parameter
from cupytron.nn import Linear
from cupytron.stash import Stash

MISPLACED = (
    "; a row-parallel layer belongs behind a column-parallel one, and no other does; see the patterns "
    "given to parallelize"
)


class Region:
    """The border of a tensor-parallel region; outside it every rank has all tokens' activations.

    Shapes: outside and inside (T, D), inside as partial sums where a row-parallel layer made them.
    Communication: enter forward none, backward one all-reduce of (T, D); leave the other way round.
    """

    def __init__(self, tp: Communicator) -> None:
        self.tp = tp

    def enter(self, x: Any) -> Any:
        return x

    def enter_backward(self, dx: Any) -> Any:
        return self.tp.all_reduce(dx)

    def leave(self, y: Any) -> Any:
        return self.tp.all_reduce(y)

    def leave_backward(self, dy: Any) -> Any:
        return dy

    def tokens_outside(self, inside: int) -> int:
        return inside


class SequenceRegion(Region):
    """The border under sequence parallelism: outside it each rank has its share of the tokens.

    Shapes: outside (T / tp, D), inside (T, D).
    Communication: enter forward one all-gather of (T, D), backward one reduce-scatter; leave the other
    way round.
    """

    def enter(self, x: Any) -> Any:
        return self.tp.all_gather(x)

    def enter_backward(self, dx: Any) -> Any:
        return self.tp.reduce_scatter(dx)

    def leave(self, y: Any) -> Any:
        return self.tp.reduce_scatter(y)

    def leave_backward(self, dy: Any) -> Any:
        # an all-gather sends contiguous arrays only
        return self.tp.all_gather(backend.array_module(dy).ascontiguousarray(dy))

    def tokens_outside(self, inside: int) -> int:
        return inside // self.tp.size


class Entry:
    """The way into a region, one for all column-parallel layers that share an input.

    The layer that comes first lets x in. The others, given the same array, find it inside; in backward
    they leave their part of its gradient here, return zeros, and the first one sends the sum out.

    Args:
        region: the border. members: how many column-parallel layers may share an input.
        keep: stash x as it is inside; otherwise as it is outside, and let it in again in backward.
    """

    def __init__(self, region: Region, members: int, keep: bool) -> None:
        self.region, self.members, self.keep = region, members, keep
        self._x: Any = None  # let in last, until all members have had it
        self._inside: Any = None
        self._asked = 0
        self._again: Any = None  # let in again in backward
        self._dx: Any = None  # sum of the members' gradients

    def forward(self, x: Any, layer: Layer, stash: Stash) -> Any:
        """x inside the region; what backward needs goes into the stash."""
        first = x is not self._x
        if first:
            self._x, self._inside, self._asked = x, self.region.enter(x), 0
            self._again = self._dx = None  # whatever a backward that failed has left
        inside = self._inside
        self._asked += 1
        if self._asked == self.members:
            self._x = self._inside = None
        stash.push(layer, inside if self.keep else x, first)
        return inside

    def saved(self, layer: Layer, stash: Stash) -> tuple[Any, bool]:
        """For backward: x inside the region, and whether this layer let it in."""
        x, first = stash.pop(layer)
        if self.keep:
            return x, first
        inside = self.region.enter(x) if self._again is None else self._again
        self._again = None if first else inside
        return inside, first

    def backward(self, dx: Any, first: bool) -> Any:
        """The gradient outside, given this layer's part of it inside."""
        if self._dx is not None:
            dx += self._dx
        self._dx = None if first else dx
        if first:
            return self.region.enter_backward(dx)
        xp = backend.array_module(dx)
        return xp.zeros((self.region.tokens_outside(len(dx)), dx.shape[1]), dx.dtype)


class ColumnLinear(Layer):
    """y = x @ weight + bias with a share of the columns on each rank.

    Shapes: x as outside the region; y (T, D_out / tp); weight (D_in, D_out / tp), bias (D_out / tp,).
    Communication: forward and backward as its entry's region.
    """

    row_for_row = False  # under sequence parallelism x has a share of the rows

    def __init__(self, weight: Parameter, bias: Parameter | None, entry: Entry) -> None:
        self.weight, self.bias, self.entry = weight, bias, entry

    def forward(self, x: Any, stash: Stash) -> Any:
        inside = self.entry.forward(x, self, stash)
        return ops.linear(inside, self.weight.data, self.bias.data if self.bias else None)

    def backward(self, dy: Any, stash: Stash) -> Any:
        x, first = self.entry.saved(self, stash)
        stash.weight_grad(self.weight, x, dy)
        if self.bias:
            stash.bias_grad(self.bias, dy)
        return self.entry.backward(ops.matmul(dy, self.weight.data.T), first)


class RowLinear(Linear):
    """y = x @ weight + bias with a share of the rows on each rank, and of x's features.

    Shapes: x (T, D_in / tp); y as outside the region; weight (D_in / tp, D_out), bias (D_out,).
    Communication: forward and backward as its region.
    """

    row_for_row = False  # under sequence parallelism y has a share of the rows
    of_a_mesh = MISPLACED

    def __init__(self, weight: Parameter, bias: Parameter | None, region: Region) -> None:
        self.weight, self.bias, self.region = weight, bias, region

    def forward(self, x: Any, stash: Stash) -> Any:
        self.check_width(x, self.weight.data)
        stash.push(self, x)
        y = self.region.leave(ops.matmul(x, self.weight.data))
        if self.bias:
            y += self.bias.data  # once, after the sum over the ranks
        return y

    def backward(self, dy: Any, stash: Stash) -> Any:
        (x,) = stash.pop(self)
        if self.bias:
            stash.bias_grad(self.bias, dy)
        dy = self.region.leave_backward(dy)
        stash.weight_grad(self.weight, x, dy)
        return ops.matmul(dy, self.weight.data.T)


class VocabularyEmbedding(Layer):
    """y[t] = weight[ids[t]] with a share of the rows on each rank.

    Shapes: ids (T,), y as outside the region, weight (ceil(V / tp), D).
    Communication: forward as leaving the region, of (T, D); backward as its adjoint.
    """

    backward_reads_weights = False
    row_for_row = False  # as a RowLinear's

    def __init__(self, weight: Parameter, region: Region) -> None:
        self.weight, self.region = weight, region

    def forward(self, ids: Any, stash: Stash) -> Any:
        stash.push(self, ids)
        return self.region.leave(ops.embedding(ids, self.weight.data, self._first))

    def backward(self, dy: Any, stash: Stash) -> None:
        (ids,) = stash.pop(self)
        dy = self.region.leave_backward(dy)
        stash.then(lambda: ops.embedding_backward(dy, ids, self.weight.grad, self._first), ids, dy)

    @property
    def _first(self) -> int:
        return self.weight.box[0].start


class VocabularyHead(Layer):
    """logits = x @ weight.T with a share of the vocabulary on each rank; the logits are never gathered.

    Shapes: x as outside the region; logits (T, rows) with this rank's rows of the vocabulary, without
    padding; weight (ceil(V / tp), D).
    Communication: as its entry's region; the loss one all-gather of (3, T) float64.
    """

    row_for_row = False  # as a ColumnLinear's

    def __init__(self, weight: Parameter, entry: Entry) -> None:
        self.weight, self.entry = weight, entry

    def forward(self, x: Any, stash: Stash) -> Any:
        return ops.matmul(self.entry.forward(x, self, stash), self._rows().T)

    def backward(self, dlogits: Any, stash: Stash) -> Any:
        x, first = self.entry.saved(self, stash)
        stash.weight_grad(self.weight, dlogits, x)
        return self.entry.backward(ops.matmul(dlogits, self._rows()), first)

    def _rows(self) -> Any:
        rows = self.weight.box[0]
        return self.weight.data[: rows.stop - rows.start]  # padding never gets probability

    def loss(self, logits: Any, targets: Any, scale: float) -> float:
        """As nn.Head.loss; the same on every rank."""
        first = self.weight.box[0].start
        return vocabulary_cross_entropy(logits, targets, scale, first, self.entry.region.tp)


def vocabulary_cross_entropy(
    logits: Any, targets: Any, scale: float, first: int, tp: Communicator
) -> float:
    """ops.cross_entropy on shards of the vocabulary.

    Shapes: logits (T, rows), this rank's, overwritten with their gradient; targets (T,) global ids.
    Args:
        first: global id of the first row. tp: the ranks that hold the others.
    Communication: one all-gather of (3, T) float64: each rank's largest logit, its sum of exponentials
        relative to that, and the target's logit where it has it.
    """
    own = ops.shard_exponentials(logits, targets, first)
    everyone = tp.all_gather(own[None])
    return ops.shard_cross_entropy(logits, targets, own, everyone, scale, first)
