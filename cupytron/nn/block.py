"""A transformer block, and the wrapper that recomputes one."""

from typing import Any

from cupytron import ops
from cupytron.layer import Layer, Wrapper
from cupytron.nn.dropout import Dropout
from cupytron.stash import Stash


class Block(Layer):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), with dropout on both branches.

    Shapes: x, y (T, D).
    """

    per_token = True

    def __init__(
        self, norm1: Any, attention: Layer, norm2: Any, mlp: Layer, dropout: float = 0.0
    ) -> None:
        self.norm1, self.attention, self.dropout1 = norm1, attention, Dropout(dropout)
        self.norm2, self.mlp, self.dropout2 = norm2, mlp, Dropout(dropout)

    def forward(self, x: Any, stash: Stash) -> Any:
        delta = self.attention.forward(self.norm1.forward(x, stash), stash)
        delta = self.dropout1.forward(delta, stash)
        x, normed = self.norm2.forward_add(x, delta, stash)
        delta = self.dropout2.forward(self.mlp.forward(normed, stash), stash)
        return ops.add_to(delta, x)  # a branch's result is new: the sum may be written over it

    def backward(self, dy: Any, stash: Stash) -> Any:  # the lines above, upside down
        ddelta = self.mlp.backward(self.dropout2.backward(dy, stash), stash)
        dy = self.norm2.backward(ddelta, stash, residual=dy)
        ddelta = self.attention.backward(self.dropout1.backward(dy, stash), stash)
        return self.norm1.backward(ddelta, stash, residual=dy)


class Recompute(Wrapper):
    """The layer inside, which keeps only its input and runs forward again in backward.

    Reference: Chen et al. 2016, arXiv:1604.06174.
    """

    def forward(self, x: Any, stash: Stash) -> Any:
        stash.push(self, x)
        return self.inner.forward(x, stash.discarding())

    def backward(self, dy: Any, stash: Stash) -> Any:
        (x,) = stash.pop(self)
        # the same batch, so the same dropout masks
        again = stash.fresh()
        self.inner.forward(x, again)
        return self.inner.backward(dy, again)
