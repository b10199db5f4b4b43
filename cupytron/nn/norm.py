"""LayerNorm and RMSNorm.

Beside forward and backward each has forward_add(x, delta, stash) -> (x + delta, its norm), which writes
the sum over delta, and backward's `residual`, which is added to dx: what a residual stream does around a
norm, in one pass.
"""

from typing import Any

from cupytron import ops
from cupytron.layer import Layer, Parameter, constant
from cupytron.stash import Stash


class LayerNorm(Layer):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over each token's features.

    Shapes: x, y (T, D); weight, bias (D,).
    """

    per_token = True

    def __init__(self, d: int, eps: float = 1e-5, bias: bool = True) -> None:
        self.weight = Parameter((d,), constant(1.0))
        self.bias = Parameter((d,), constant(0.0)) if bias else None
        self.eps = eps

    def forward(self, x: Any, stash: Stash) -> Any:
        bias = self.bias.data if self.bias else None
        y, saved = ops.layer_norm(x, self.weight.data, bias, self.eps)
        stash.push(self, *saved)
        return y

    def forward_add(self, x: Any, delta: Any, stash: Stash) -> tuple[Any, Any]:
        bias = self.bias.data if self.bias else None
        total, y, saved = ops.add_layer_norm(x, delta, self.weight.data, bias, self.eps)
        stash.push(self, *saved)
        return total, y

    def backward(self, dy: Any, stash: Stash, residual: Any = None) -> Any:
        saved = stash.pop(self)
        dx, dweight, dbias = ops.layer_norm_backward(dy, saved, self.weight.data, residual)
        stash.add_grad(self.weight, dweight)
        if self.bias:
            stash.add_grad(self.bias, dbias)
        return dx


class RMSNorm(Layer):
    """y = x / sqrt(mean(x^2) + eps) * weight, over each token's features.

    Shapes: x, y (T, D); weight (D,).
    """

    per_token = True

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        self.weight = Parameter((d,), constant(1.0))
        self.eps = eps

    def forward(self, x: Any, stash: Stash) -> Any:
        y, saved = ops.rms_norm(x, self.weight.data, self.eps)
        stash.push(self, *saved)
        return y

    def forward_add(self, x: Any, delta: Any, stash: Stash) -> tuple[Any, Any]:
        total, y, saved = ops.add_rms_norm(x, delta, self.weight.data, self.eps)
        stash.push(self, *saved)
        return total, y

    def backward(self, dy: Any, stash: Stash, residual: Any = None) -> Any:
        saved = stash.pop(self)
        dx, dweight = ops.rms_norm_backward(dy, saved, self.weight.data, residual)
        stash.add_grad(self.weight, dweight)
        return dx
