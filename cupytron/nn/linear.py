"""Linear layer."""

from typing import Any

from cupytron import ops
from cupytron.layer import Layer, Parameter, constant, normal
from cupytron.layer_checks import ShapeError
from cupytron.stash import Stash


class Linear(Layer):
    """y = x @ weight + bias, for each token.

    Shapes: x (T, D_in), y (T, D_out), weight (D_in, D_out), bias (D_out,).
    """

    per_token = True
    of_a_mesh = ""  # added to an error about widths where layers are cut

    def __init__(self, d_in: int, d_out: int, bias: bool = True, std: float = 0.02) -> None:
        self.weight = Parameter((d_in, d_out), normal(std))
        self.bias = Parameter((d_out,), constant(0.0)) if bias else None

    def forward(self, x: Any, stash: Stash) -> Any:
        self.check_width(x, self.weight.data)
        stash.push(self, x)
        return ops.linear(x, self.weight.data, self.bias.data if self.bias else None)

    def check_width(self, x: Any, weight: Any) -> None:
        """Refuse an x of another width."""
        if x.shape[1:] != weight.shape[:1]:
            given = x.shape[1] if len(x.shape) == 2 else f"an x of shape {x.shape}"
            raise ShapeError(
                f"{self.describe()}: takes {weight.shape[0]} features and was given {given}{self.of_a_mesh}"
            )

    def backward(self, dy: Any, stash: Stash) -> Any:
        (x,) = stash.pop(self)
        stash.weight_grad(self.weight, x, dy)
        if self.bias:
            stash.bias_grad(self.bias, dy)
        return ops.matmul(dy, self.weight.data.T)
