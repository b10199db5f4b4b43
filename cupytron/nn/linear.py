"""Linear layer."""

from typing import Any

from cupytron import ops
from cupytron.errors import CupytronError
from cupytron.layer import Layer, Parameter, constant, normal
from cupytron.stash import Stash


class Linear(Layer):
    """y = x @ weight + bias, for each token.

    Shapes: x (T, D_in), y (T, D_out), weight (D_in, D_out), bias (D_out,).
    """

    per_token = True

    def __init__(self, d_in: int, d_out: int, bias: bool = True, std: float = 0.02) -> None:
        self.weight = Parameter((d_in, d_out), normal(std))
        self.bias = Parameter((d_out,), constant(0.0)) if bias else None

    def forward(self, x: Any, stash: Stash) -> Any:
        self.check_width(x, self.weight.data)
        stash.push(self, x)
        return ops.linear(x, self.weight.data, self.bias.data if self.bias else None)

    def check_width(self, x: Any, weight: Any) -> None:
        """Refuse an x of another width: a layer before this one may be cut, and this one not."""
        if x.shape[1] != weight.shape[0]:
            raise CupytronError(
                f"{self.describe()}: takes {weight.shape[0]} features and was given {x.shape[1]}; a "
                "row-parallel layer belongs behind a column-parallel one, and no other does"
            )

    def backward(self, dy: Any, stash: Stash) -> Any:
        (x,) = stash.pop(self)
        stash.weight_grad(self.weight, x, dy)
        if self.bias:
            stash.bias_grad(self.bias, dy)
        return ops.matmul(dy, self.weight.data.T)
