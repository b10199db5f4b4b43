"""The two feed-forward networks: one activation, or a gated one."""

from typing import Any

from cupytron import ops
from cupytron.layer import Layer, Stash
from cupytron.nn.linear import Linear

_ACTIVATIONS = {
    "gelu": lambda x: ops.gelu(x),
    "gelu_exact": lambda x: ops.gelu_exact(x),
    "relu": lambda x: ops.relu(x),
}


class MLP(Layer):
    """y = down(activation(up(x))). Shapes: x, y (T, D); inside (T, F)."""

    per_token = True

    def __init__(
        self, d: int, d_ff: int, activation: str, bias: bool, std: float, out_std: float
    ) -> None:
        self.activation = _ACTIVATIONS[activation]
        self.up = Linear(d, d_ff, bias, std)
        self.down = Linear(d_ff, d, bias, out_std)

    def forward(self, x: Any, stash: Stash) -> Any:
        y, slope = self.activation(self.up.forward(x, stash))
        stash.push(self, slope)
        return self.down.forward(y, stash)

    def backward(self, dy: Any, stash: Stash) -> Any:
        dy = self.down.backward(dy, stash)
        (slope,) = stash.pop(self)
        return self.up.backward(ops.activation_backward(dy, slope), stash)


class SwiGLU(Layer):
    """y = down(silu(gate(x)) * up(x)). Shapes: x, y (T, D); inside (T, F)."""

    per_token = True

    def __init__(self, d: int, d_ff: int, bias: bool, std: float, out_std: float) -> None:
        self.gate = Linear(d, d_ff, bias, std)
        self.up = Linear(d, d_ff, bias, std)
        self.down = Linear(d_ff, d, bias, out_std)

    def forward(self, x: Any, stash: Stash) -> Any:
        gate = self.gate.forward(x, stash)
        up = self.up.forward(x, stash)
        stash.push(self, gate, up)
        return self.down.forward(ops.swiglu(gate, up), stash)

    def backward(self, dy: Any, stash: Stash) -> Any:
        dy = self.down.backward(dy, stash)
        gate, up = stash.pop(self)
        dgate, dup = ops.swiglu_backward(dy, gate, up)
        dx = self.up.backward(dup, stash)
        dx += self.gate.backward(dgate, stash)
        return dx
