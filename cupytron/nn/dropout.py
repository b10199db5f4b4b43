"""Dropout with masks by global index."""

from typing import Any

from cupytron import ops
from cupytron.layer import Layer
from cupytron.ops import philox
from cupytron.stash import Stash


class Dropout(Layer):
    """y = x * mask / (1 - p) in training, y = x otherwise. Shapes: x, y (T, D)."""

    per_token = True

    def __init__(self, p: float) -> None:
        self.p = p
        self.token_shard = (
            0  # x is this share, of shares of its length, of the micro-batch's tokens
        )

    def forward(self, x: Any, stash: Stash) -> Any:
        batch = stash.batch
        if not self.p or not batch.training:
            return x
        key = philox.key_of(batch.seed, "dropout", self.name)
        first = batch.first_token
        if self.token_shard:  # on a GPU a kernel of its own
            first = first + self.token_shard * len(x)
        y, mask = ops.dropout(x, self.p, key, batch.step, first)
        stash.push(self, mask)
        return y

    def backward(self, dy: Any, stash: Stash) -> Any:
        if not self.p or not stash.batch.training:
            return dy
        (mask,) = stash.pop(self)
        return ops.dropout_backward(dy, mask, self.p)
