"""Matrix products. BLAS runs them on all of the process's threads."""

from typing import Any

from cupytron import backend


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    """a @ b.

    Shapes: a (M, K), b (K, N), either may be a transposed view; returns (M, N), in `out` if given.
    """
    return backend.array_module(a).matmul(a, b, out=out)


def add_product(total: Any, x: Any, dy: Any) -> None:
    """total += x.T @ dy: how a matrix gets its gradient.

    Shapes: total (D_in, D_out), x (T, D_in), dy (T, D_out).
    """
    total += backend.array_module(x).matmul(x.T, dy)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """y = x @ weight + bias.

    Shapes: x (T, D_in), weight (D_in, D_out), bias (D_out,); y (T, D_out), new.
    """
    y = matmul(x, weight)
    if bias is not None:
        y += bias
    return y


def add_to(total: Any, x: Any) -> Any:
    """total += x, of the same shape; returns total."""
    total += x
    return total


def sum_rows(dy: Any) -> Any:
    """Sum over tokens, the gradient of a bias: (T, D) -> (D,)."""
    xp = backend.array_module(dy)
    # a product with ones is several times faster than .sum(axis=0), and sums in BLAS's order
    return xp.ones(dy.shape[0], dtype=dy.dtype) @ dy
