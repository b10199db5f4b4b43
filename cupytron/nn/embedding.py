"""Token table, positions, and the head that may share the table."""

from typing import Any

import numpy as np

from cupytron import backend, ops
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

    def _positions(self, x: Any, stash: Stash) -> np.ndarray:
        """Position of each token of x, on the host; (S,) where x holds whole sequences."""
        batch = stash.batch
        if len(x) == batch.batch_size * batch.sequence_length:
            return batch.positions
        first = self.token_shard * len(x)
        return batch.positions[np.arange(first, first + len(x)) % batch.sequence_length]

    def _positions_like(self, x: Any, stash: Stash) -> Any:
        """The same, where x is."""
        xp = backend.array_module(x)
        key = ("positions of tokens", xp, len(x), self.token_shard)
        return stash.batch.once(key, lambda: xp.asarray(self._positions(x, stash)))

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
        return self._add(x, ops.embedding(self._positions_like(x, stash), self.weight.data))

    def backward(self, dy: Any, stash: Stash) -> Any:
        positions = self._positions(dy, stash)
        first, count = int(positions[0]), len(positions)
        rows = dy.reshape(-1, count, dy.shape[1])
        # the same positions in every sequence
        rows = ops.sum_rows(rows.reshape(len(rows), -1)).reshape(rows.shape[1:])

        def add() -> None:
            if (np.diff(positions) == 1).all():
                ops.add_to(self.weight.grad[first : first + count], rows)
            else:
                where = self._positions_like(dy, stash)
                ops.embedding_backward(rows, where, self.weight.grad)

        stash.then(add, rows)
        return dy


class SinusoidalPositions(_Positions):
    """y = x + sines and cosines of the token's position. Shapes: x, y (T, D)."""

    def forward(self, x: Any, stash: Stash) -> Any:
        key = ("sines", x.shape, x.dtype, self.token_shard)
        positions = self._positions_like(x, stash)
        return self._add(
            x,
            stash.batch.once(key, lambda: ops.sinusoidal_positions(positions, x.shape[1], x.dtype)),
        )

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
