"""Checks the shapes and the dtypes of the arrays that layers return, and of the gradients that they add.

An error is raised where the mistake is made, and names the layer. Nothing here reads the numbers of an
array. Layers and parameters are those of layer.py, which imports this module.
"""

from typing import Any

from cupytron.errors import CupytronError

_INTEGERS = "iu"  # kinds of dtype: ids, which have no gradient


class ShapeError(CupytronError):
    """A layer was given, or has returned, an array of another shape or dtype than it should."""

    origin = ""  # which layer made its x


class NoGradient(UserWarning):
    """Parameters got no gradient in the first step."""


def check_output(layer: Any, x: Any, y: Any, rows: bool = True) -> None:
    """Refuse the result of a layer's forward for x, unless the next layer can use it.

    Args:
        rows: whether y has a row for each token, unless the layer's class says that its rows are no tokens.
    """
    if not (hasattr(y, "shape") and hasattr(y, "dtype")):
        raise ShapeError(f"{layer.describe()}: forward returned {_kind(y)}; return one array")
    if rows and layer.row_for_row and (len(y.shape) != 2 or y.shape[0] != x.shape[0]):
        raise ShapeError(
            f"{layer.describe()}: forward returned shape {y.shape} for x of shape {x.shape}; return "
            f"({x.shape[0]}, features), a row for each token, or set row_for_row = False in the class if "
            "its rows are not tokens"
        )
    if y.dtype != x.dtype and x.dtype.kind not in _INTEGERS:
        raise ShapeError(
            f"{layer.describe()}: forward returned {y.dtype} for x of {x.dtype}; the model computes in "
            "one dtype, so make arrays with dtype=x.dtype, or return y.astype(x.dtype)"
        )


def check_input_gradient(layer: Any, shape: Any, dtype: Any, dx: Any) -> None:
    """Refuse the result of a layer's backward, unless it has the shape and the dtype of its x."""
    if dtype.kind in _INTEGERS:
        return
    if not (hasattr(dx, "shape") and hasattr(dx, "dtype")):
        raise ShapeError(
            f"{layer.describe()}: backward returned {_kind(dx)}; return the gradient of x, an array of "
            f"shape {shape}"
        )
    if dx.shape != shape:
        raise ShapeError(
            f"{layer.describe()}: backward returned shape {dx.shape}; the gradient of x has the shape of "
            f"x, {shape}"
        )
    if dx.dtype != dtype:
        raise ShapeError(
            f"{layer.describe()}: backward returned {dx.dtype} for x of {dtype}; return "
            "dx.astype(dy.dtype)"
        )


def check_gradient_shape(parameter: Any, gradient: Any) -> None:
    """Refuse to add a gradient of another shape, which NumPy might broadcast to the parameter's."""
    shape = getattr(gradient, "shape", None)
    if shape != parameter.held_shape:
        what = _kind(gradient) if shape is None else f"shape {shape}"
        raise ShapeError(
            f"{parameter.name}: its gradient was given as {what}; it must have the parameter's shape, "
            f"{parameter.held_shape}"
        )


def check_product(parameter: Any, x: Any, dy: Any) -> None:
    """Refuse to add x.T @ dy to a gradient of another shape."""
    if x.shape[1:] + dy.shape[1:] != parameter.held_shape or x.shape[0] != dy.shape[0]:
        raise ShapeError(
            f"{parameter.name}: weight_grad was given x {x.shape} and dy {dy.shape}; x.T @ dy has to have "
            f"the parameter's shape, {parameter.held_shape}, and x and dy need a row for each token"
        )


def check_sum(parameter: Any, dy: Any) -> None:
    """Refuse to add the sum of dy's rows to a gradient of another shape."""
    if dy.shape[1:] != parameter.held_shape:
        raise ShapeError(
            f"{parameter.name}: bias_grad was given dy {dy.shape}; the sum of its rows has to have the "
            f"parameter's shape, {parameter.held_shape}"
        )


def tell_origin(error: Exception, layer: Any, x: Any, giver: Any) -> None:
    """Add to an error in a layer's forward which layer made its x."""
    if giver is None:
        return
    origin = f"{layer.describe()} was given its x, of shape {x.shape}, by {giver.describe()}"
    if isinstance(error, ShapeError):
        if not error.origin:  # a chain inside this one knows better
            error.origin, error.args = origin, (f"{error}; {origin}",)
    elif not isinstance(error, CupytronError):
        error.add_note(origin)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
