"""Token table, positions, and the head that may share the table."""

from typing import Any

import numpy as np

from cupytron import ops
from cupytron.errors import CupytronError
from cupytron.layer import Layer, Parameter, normal
from cupytron.stash import Stash


class Embedding(Layer):
    """y[t] = weight[ids[t]]. Shapes: ids (T,) integers, y (T, D), weight (V, D)."""

    per_token = True
    backward_reads_weights = False

    def __init__(self, vocab_size: int, d: int, std: float = 0.02) -> None:
        self.weight = Parameter((vocab_size, d), normal(std))

    def forward(self, ids: Any, stash: Stash) -> Any:
        stash.push(self, ids)
        return ops.embedding(ids, self.weight.data)

    def backward(self, dy: Any, stash: Stash) -> None:
        (ids,) = stash.pop(self)
        stash.then(lambda: ops.embedding_backward(dy, ids, self.weight.grad), ids, dy)


class _Positions(Layer):
    """y = x + a row for each token's position. Shapes: x, y (T, D)."""

    per_token = True
    backward_reads_weights = False
    token_shard = 0  # x is this share, of shares of its length, of the micro-batch's tokens

    def _positions(self, x: Any, stash: Stash) -> Any:
        """Position of each token of x; (S,) where x holds whole sequences."""
        batch = stash.batch
        if len(x) == batch.batch_size * batch.sequence_length:
            return batch.positions
        first = self.token_shard * len(x)
        return batch.positions[np.arange(first, first + len(x)) % batch.sequence_length]

    def _add(self, x: Any, rows: Any) -> Any:
        return (x.reshape(-1, *rows.shape) + rows).reshape(x.shape)


class LearnedPositions(_Positions):
    """y = x + weight[position of the token]. Shapes: x, y (T, D); weight (context_length, D)."""

    def __init__(self, context_length: int, d: int, std: float = 0.02) -> None:
        self.weight = Parameter((context_length, d), normal(std))

    def forward(self, x: Any, stash: Stash) -> Any:
        last = stash.batch.positions[-1]
        if last >= len(self.weight.data):
            raise CupytronError(
                f"position {last} is beyond the model's context_length="
                f"{len(self.weight.data)}; use shorter sequences or raise model.context_length"
            )
        return self._add(x, self.weight.data[self._positions(x, stash)])

    def backward(self, dy: Any, stash: Stash) -> Any:
        positions = self._positions(dy, stash)
        rows = dy.reshape(-1, len(positions), dy.shape[1]).sum(axis=0)
        # positions of one sequence differ, so no row of the table is written twice
        distinct = len(dy) == stash.batch.batch_size * stash.batch.sequence_length

        def add() -> None:
            if distinct:
                self.weight.grad[positions] += rows
            else:
                ops.embedding_backward(rows, positions, self.weight.grad)

        stash.then(add, rows)
        return dy


class SinusoidalPositions(_Positions):
    """y = x + sines and cosines of the token's position. Shapes: x, y (T, D)."""

    def forward(self, x: Any, stash: Stash) -> Any:
        positions = self._positions(x, stash)
        return self._add(x, ops.sinusoidal_positions(positions, x.shape[1], x.dtype))

    def backward(self, dy: Any, stash: Stash) -> Any:
        return dy


class Head(Layer):
    """logits = x @ weight.T. Shapes: x (T, D), logits (T, V), weight (V, D).

    `weight` is the embedding's table when the two are tied.
    """

    per_token = True

    def __init__(self, weight: Parameter) -> None:
        self.weight = weight

    def forward(self, x: Any, stash: Stash) -> Any:
        stash.push(self, x)
        return ops.matmul(x, self.weight.data.T)

    def backward(self, dlogits: Any, stash: Stash) -> Any:
        (x,) = stash.pop(self)
        stash.weight_grad(self.weight, dlogits, x)
        return ops.matmul(dlogits, self.weight.data)

    def loss(self, logits: Any, targets: Any, scale: float) -> float:
        """scale * the sum of the cross-entropies; its gradient overwrites the logits.

        Shapes: logits (T, V); targets (T,), ops.IGNORE where a token does not count.
        """
        return ops.cross_entropy(logits, targets, scale)
