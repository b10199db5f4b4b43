"""Rotary position embedding, in place on queries and keys."""

from typing import Any

from cupytron import backend


def rotary_table(positions: Any, head_size: int, theta: float, dtype: Any) -> tuple[Any, Any]:
    """cos and sin of position * theta^(-2i/H).

    Shapes: positions (S,) integers; cos, sin (S, H/2).
    Reference: Su et al. 2021, arXiv:2104.09864.
    """
    xp = backend.array_module(positions)
    half = head_size // 2
    frequency = theta ** (-xp.arange(half, dtype=xp.float64) / half)
    angle = positions[:, None] * frequency
    return xp.cos(angle).astype(dtype), xp.sin(angle).astype(dtype)


def rotary(x: Any, cos: Any, sin: Any) -> None:
    """Turn the pairs (x[i], x[i + H/2]) by their position's angle, in place.

    Shapes: x (B, S, ..., H), cos, sin (S, H/2). The gradient turns back: rotary(dx, cos, -sin).
    """
    cos, sin = (t.reshape(len(t), *[1] * (x.ndim - 3), -1) for t in (cos, sin))
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    turned = a * sin
    a *= cos
    a -= b * sin
    b *= cos
    b += turned
