"""Token table, positions, and the head that may share the table."""

from typing import Any

from cupytron import ops
from cupytron.errors import CupytronError
from cupytron.layer import Layer, Parameter, Stash, normal


class Embedding(Layer):
    """y[t] = weight[ids[t]]. Shapes: ids (T,) integers, y (T, D), weight (V, D)."""

    def __init__(self, vocab_size: int, d: int, std: float = 0.02) -> None:
        self.weight = Parameter((vocab_size, d), normal(std))

    def forward(self, ids: Any, stash: Stash) -> Any:
        stash.push(self, ids)
        return ops.embedding(ids, self.weight.data)

    def backward(self, dy: Any, stash: Stash) -> None:
        (ids,) = stash.pop(self)
        ops.embedding_backward(dy, ids, self.weight.grad)


class LearnedPositions(Layer):
    """y = x + weight[position of the token]. Shapes: x, y (T, D); weight (context_length, D)."""

    def __init__(self, context_length: int, d: int, std: float = 0.02) -> None:
        self.weight = Parameter((context_length, d), normal(std))

    def forward(self, x: Any, stash: Stash) -> Any:
        batch = stash.batch
        if batch.positions[-1] >= len(self.weight.data):
            raise CupytronError(
                f"position {batch.positions[-1]} is beyond the model's context_length="
                f"{len(self.weight.data)}; use shorter sequences or raise model.context_length"
            )
        rows = self.weight.data[batch.positions]
        return (x.reshape(batch.batch_size, -1, x.shape[1]) + rows).reshape(x.shape)

    def backward(self, dy: Any, stash: Stash) -> Any:
        batch = stash.batch
        rows = dy.reshape(batch.batch_size, -1, dy.shape[1]).sum(axis=0)
        # positions of one sequence differ, so no row of the table is written twice
        self.weight.grad[batch.positions] += rows
        return dy


class SinusoidalPositions(Layer):
    """y = x + sines and cosines of the token's position. Shapes: x, y (T, D)."""

    def forward(self, x: Any, stash: Stash) -> Any:
        batch = stash.batch
        rows = ops.sinusoidal_positions(batch.positions, x.shape[1], x.dtype)
        return (x.reshape(batch.batch_size, -1, x.shape[1]) + rows).reshape(x.shape)

    def backward(self, dy: Any, stash: Stash) -> Any:
        return dy


class Head(Layer):
    """logits = x @ weight.T. Shapes: x (T, D), logits (T, V), weight (V, D).

    `weight` is the embedding's table when the two are tied.
    """

    def __init__(self, weight: Parameter) -> None:
        self.weight = weight

    def forward(self, x: Any, stash: Stash) -> Any:
        stash.push(self, x)
        return ops.matmul(x, self.weight.data.T)

    def backward(self, dlogits: Any, stash: Stash) -> Any:
        (x,) = stash.pop(self)
        stash.weight_grad(self.weight, dlogits, x)
        return ops.matmul(dlogits, self.weight.data)
