"""The two feed-forward networks: one activation, or a gated one."""

from typing import Any

from cupytron import ops
from cupytron.layer import Layer
from cupytron.nn.linear import Linear
from cupytron.stash import Stash


class MLP(Layer):
    """y = down(activation(up(x))). Shapes: x, y (T, D); inside (T, F).

    With `recompute`, the activation is run again in backward, and one (T, F) is kept in place of two.
    """

    per_token = True
    recompute = False

    def __init__(
        self, d: int, d_ff: int, activation: str, bias: bool, std: float, out_std: float
    ) -> None:
        self.activation = activation  # a pair of functions in ops
        self.up = Linear(d, d_ff, bias, std)
        self.down = Linear(d_ff, d, bias, out_std)

    def forward(self, x: Any, stash: Stash) -> Any:
        h = self.up.forward(x, stash)
        kept = h.copy() if self.recompute else None  # the activation overwrites h
        activate = getattr(ops, self.activation)
        y, saved = activate(h)
        with stash.remaking(self.recompute, (y, saved), activate, kept):
            stash.push(self, saved)
            return self.down.forward(y, stash)

    def backward(self, dy: Any, stash: Stash) -> Any:
        dy = self.down.backward(dy, stash)
        (saved,) = stash.pop(self)
        return self.up.backward(getattr(ops, f"{self.activation}_backward")(dy, saved), stash)


class SwiGLU(Layer):
    """y = down(silu(gate(x)) * up(x)). Shapes: x, y (T, D); inside (T, F).

    With `recompute`, the product is made again in backward, and one of three (T, F) is not kept.
    """

    per_token = True
    recompute = False

    def __init__(self, d: int, d_ff: int, bias: bool, std: float, out_std: float) -> None:
        self.gate = Linear(d, d_ff, bias, std)
        self.up = Linear(d, d_ff, bias, std)
        self.down = Linear(d_ff, d, bias, out_std)

    def forward(self, x: Any, stash: Stash) -> Any:
        gate = self.gate.forward(x, stash)
        up = self.up.forward(x, stash)
        stash.push(self, gate, up)
        y = ops.swiglu(gate, up)
        with stash.remaking(self.recompute, (y,), lambda *saved: (ops.swiglu(*saved),), gate, up):
            return self.down.forward(y, stash)

    def backward(self, dy: Any, stash: Stash) -> Any:
        dy = self.down.backward(dy, stash)
        gate, up = stash.pop(self)
        dgate, dup = ops.swiglu_backward(dy, gate, up)
        dx = self.up.backward(dup, stash)
        return ops.add_to(dx, self.gate.backward(dgate, stash))
