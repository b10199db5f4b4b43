"""LayerNorm and RMSNorm."""

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
        y, xhat, rstd = ops.layer_norm(x, self.weight.data, bias, self.eps)
        stash.push(self, xhat, rstd)
        return y

    def backward(self, dy: Any, stash: Stash) -> Any:
        xhat, rstd = stash.pop(self)
        dx, dweight, dbias = ops.layer_norm_backward(dy, xhat, rstd, self.weight.data)
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
        y, xhat, rstd = ops.rms_norm(x, self.weight.data, self.eps)
        stash.push(self, xhat, rstd)
        return y

    def backward(self, dy: Any, stash: Stash) -> Any:
        xhat, rstd = stash.pop(self)
        dx, dweight = ops.rms_norm_backward(dy, xhat, rstd, self.weight.data)
        stash.add_grad(self.weight, dweight)
        return dx
