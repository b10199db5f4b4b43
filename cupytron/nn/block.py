"""A transformer block, and the wrapper that recomputes one."""

from typing import Any

from cupytron.layer import Layer, Wrapper
from cupytron.nn.dropout import Dropout
from cupytron.stash import Stash, add_to


class Block(Layer):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), with dropout on both branches.

    Shapes: x, y (T, D).
    """

    per_token = True

    def __init__(
        self, norm1: Layer, attention: Layer, norm2: Layer, mlp: Layer, dropout: float = 0.0
    ) -> None:
        self.norm1, self.attention, self.dropout1 = norm1, attention, Dropout(dropout)
        self.norm2, self.mlp, self.dropout2 = norm2, mlp, Dropout(dropout)

    def forward(self, x: Any, stash: Stash) -> Any:
        # a branch's result is new, so the sum may be written over it
        x = add_to(self._branch1(x, stash), x)
        return add_to(self._branch2(x, stash), x)

    def backward(self, dy: Any, stash: Stash) -> Any:  # the two lines above, upside down
        dy = add_to(self._branch2_backward(dy, stash), dy)
        return add_to(self._branch1_backward(dy, stash), dy)

    def _branch1(self, x: Any, stash: Stash) -> Any:
        y = self.attention.forward(self.norm1.forward(x, stash), stash)
        return self.dropout1.forward(y, stash)

    def _branch1_backward(self, dy: Any, stash: Stash) -> Any:
        dy = self.attention.backward(self.dropout1.backward(dy, stash), stash)
        return self.norm1.backward(dy, stash)

    def _branch2(self, x: Any, stash: Stash) -> Any:
        y = self.mlp.forward(self.norm2.forward(x, stash), stash)
        return self.dropout2.forward(y, stash)

    def _branch2_backward(self, dy: Any, stash: Stash) -> Any:
        dy = self.mlp.backward(self.dropout2.backward(dy, stash), stash)
        return self.norm2.backward(dy, stash)


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
