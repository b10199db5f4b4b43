"""Linear layer."""

from typing import Any

from cupytron import ops
from cupytron.layer import Layer, Parameter, Stash, constant, normal


class Linear(Layer):
    """y = x @ weight + bias, for each token.

    Shapes: x (T, D_in), y (T, D_out), weight (D_in, D_out), bias (D_out,).
    """

    def __init__(self, d_in: int, d_out: int, bias: bool = True, std: float = 0.02) -> None:
        self.weight = Parameter((d_in, d_out), normal(std))
        self.bias = Parameter((d_out,), constant(0.0)) if bias else None

    def forward(self, x: Any, stash: Stash) -> Any:
        stash.push(self, x)
        return ops.linear(x, self.weight.data, self.bias.data if self.bias else None)

    def backward(self, dy: Any, stash: Stash) -> Any:
        (x,) = stash.pop(self)
        stash.weight_grad(self.weight, x, dy)
        if self.bias:
            self.bias.grad += ops.sum_rows(dy)
        return ops.matmul(dy, self.weight.data.T)
