"""Activation functions: y, and what backward needs. GELU and ReLU save their derivative.

These own what they are given and overwrite it: the widest arrays of a model pass here, and memory that
is in the cache already is the fastest to write.
"""

import math
from typing import Any

from cupytron import backend

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def _elementwise(x: Any, body: Any) -> tuple[Any, Any]:
    """Run body(x, slope) over flat slices: x becomes y. Returns x and slope."""
    xp = backend.array_module(x)
    slope = xp.empty_like(x)
    flat_x, flat_slope = x.reshape(-1), slope.reshape(-1)
    backend.for_slices(xp, lambda s: body(xp, flat_x[s], flat_slope[s]), x.size, backend.BLOCK)
    return x, slope


def gelu(x: Any) -> tuple[Any, Any]:
    """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the form that GPT-2 uses; overwrites x.

    Returns: y, and what gelu_backward needs: here dy/dx, shaped like x.
    Reference: Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    return _elementwise(x, _gelu)


def _gelu(xp: Any, x: Any, slope: Any) -> None:
    # u = k x + k c x^3, cdf = (1 + tanh(u)) / 2;  y = x cdf
    # dy/dx = cdf (1 + 2 x du/dx (1 - cdf)), with 2 x du/dx = 6 u - 4 k x
    k = _GELU_SCALE
    u = x * x
    u *= k * _GELU_CUBIC
    u += k
    u *= x
    cdf = xp.tanh(u)
    cdf *= 0.5
    cdf += 0.5
    u *= 6
    xp.multiply(x, 4 * k, out=slope)
    u -= slope
    xp.subtract(1, cdf, out=slope)
    slope *= u
    slope += 1
    slope *= cdf
    x *= cdf


def gelu_exact(x: Any) -> tuple[Any, Any]:
    """y = x/2 (1 + erf(x / sqrt(2))), the form that PyTorch uses by default; overwrites x.

    Returns: y, and what gelu_exact_backward needs: here dy/dx, shaped like x.
    Reference: Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    return _elementwise(x, _gelu_exact)


def _gelu_exact(xp: Any, x: Any, slope: Any) -> None:
    # dy/dx = cdf + x pdf
    xp.multiply(x, x, out=slope)
    slope *= -0.5
    xp.exp(slope, out=slope)
    slope *= 1 / math.sqrt(2 * math.pi)
    slope *= x
    cdf = erf(x * math.sqrt(0.5))
    cdf += 1
    cdf *= 0.5
    slope += cdf
    x *= cdf


def relu(x: Any) -> tuple[Any, Any]:
    """y = max(x, 0); overwrites x.

    Returns: y, and what relu_backward needs: here dy/dx (0 or 1; 0 at 0), shaped like x.
    """
    return _elementwise(x, _relu)


def _relu(xp: Any, x: Any, slope: Any) -> None:
    slope[...] = x > 0
    x *= slope


def gelu_backward(dy: Any, saved: Any) -> Any:
    """dx = dy * dy/dx, given what gelu has saved; overwrites dy with dx and returns it."""
    dy *= saved
    return dy


def gelu_exact_backward(dy: Any, saved: Any) -> Any:
    """dx = dy * dy/dx, given what gelu_exact has saved; overwrites dy with dx and returns it."""
    dy *= saved
    return dy


def relu_backward(dy: Any, saved: Any) -> Any:
    """dx = dy * dy/dx, given what relu has saved; overwrites dy with dx and returns it."""
    dy *= saved
    return dy


def _sigmoid(xp: Any, x: Any) -> Any:
    # by tanh, which cannot overflow
    s = x * 0.5
    xp.tanh(s, out=s)
    s *= 0.5
    s += 0.5
    return s


def swiglu(gate: Any, up: Any) -> Any:
    """y = silu(gate) * up, with silu(g) = g / (1 + exp(-g)).

    Shapes: gate, up, y (T, F); y is new.
    Reference: Shazeer 2020, arXiv:2002.05202.
    """
    xp = backend.array_module(gate)
    y = xp.empty_like(gate)
    flat_gate, flat_up, flat_y = gate.reshape(-1), up.reshape(-1), y.reshape(-1)

    def body(s: slice) -> None:
        silu = _sigmoid(xp, flat_gate[s])
        silu *= flat_gate[s]
        xp.multiply(silu, flat_up[s], out=flat_y[s])

    backend.for_slices(xp, body, y.size, backend.BLOCK)
    return y


def swiglu_backward(dy: Any, gate: Any, up: Any) -> tuple[Any, Any]:
    """Gradient of swiglu. Shapes: dy, gate, up, dgate, dup (T, F). Returns: dgate, dup."""
    xp = backend.array_module(gate)
    dgate, dup = xp.empty_like(gate), xp.empty_like(gate)
    flat_dy, flat_gate, flat_up = dy.reshape(-1), gate.reshape(-1), up.reshape(-1)
    flat_dgate, flat_dup = dgate.reshape(-1), dup.reshape(-1)

    def body(s: slice) -> None:
        sigmoid = _sigmoid(xp, flat_gate[s])
        silu = sigmoid * flat_gate[s]
        xp.multiply(flat_dy[s], silu, out=flat_dup[s])
        # d silu / dg = sigmoid (1 + g - silu) = sigmoid + silu (1 - sigmoid)
        xp.subtract(flat_gate[s], silu, out=silu)
        silu += 1
        silu *= sigmoid
        silu *= flat_up[s]
        xp.multiply(flat_dy[s], silu, out=flat_dgate[s])

    backend.for_slices(xp, body, dy.size, backend.BLOCK)
    return dgate, dup


# Rational approximations to erf and erfc, each (numerator, denominator) with the highest power last.
# Source: Cody 1969, "Rational Chebyshev approximations for the error function", Math. Comp. 23.
_ERF_NEAR = (
    (3.20937758913846947e03, 3.77485237685302021e02, 1.13864154151050156e02,
     3.16112374387056560e00, 1.85777706184603153e-1),
    (2.84423683343917062e03, 1.28261652607737228e03, 2.44024637934444173e02,
     2.36012909523441209e01, 1.0),
)  # fmt: skip
_ERFC_MIDDLE = (
    (1.23033935479799725e03, 2.05107837782607147e03, 1.71204761263407058e03,
     8.81952221241769090e02, 2.98635138197400131e02, 6.61191906371416295e01,
     8.88314979438837594e00, 5.64188496988670089e-1, 2.15311535474403846e-8),
    (1.23033935480374942e03, 3.43936767414372164e03, 4.36261909014324716e03,
     3.29079923573345963e03, 1.62138957456669019e03, 5.37181101862009858e02,
     1.17693950891312499e02, 1.57449261107098347e01, 1.0),
)  # fmt: skip
_ERFC_FAR = (
    (6.58749161529837803e-4, 1.60837851487422766e-2, 1.25781726111229246e-1,
     3.60344899949804439e-1, 3.05326634961232344e-1, 1.63153871373020978e-2),
    (2.33520497626869185e-3, 6.05183413124413191e-2, 5.27905102951428412e-1,
     1.87295284992346725e00, 2.56852019228982242e00, 1.0),
)  # fmt: skip


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Any) -> Any:
    top, bottom = coefficients
    p, q = x * 0 + top[-1], x * 0 + bottom[-1]
    for a in top[-2::-1]:
        p *= x
        p += a
    for b in bottom[-2::-1]:
        q *= x
        q += b
    p /= q
    return p


def erf(x: Any) -> Any:
    """The error function, to the last few bits in float64; NumPy has none.

    Reference: Cody 1969, Math. Comp. 23, 631-637.
    """
    xp = backend.array_module(x)
    size = xp.abs(x)
    near = xp.minimum(size, 0.46875)
    near_value = near * _ratio(_ERF_NEAR, near * near)
    # clamped on both sides, so that no branch computes what it will not use with overflow or 0/0
    middle = xp.clip(size, 0.46875, 4.0)
    far = xp.clip(size, 4.0, 6.0)
    inverse = 1 / (far * far)
    tail = far * 0 + 1 / math.sqrt(math.pi)
    tail -= inverse * _ratio(_ERFC_FAR, inverse)
    tail /= far
    tail *= xp.exp(-far * far)
    body = _ratio(_ERFC_MIDDLE, middle) * xp.exp(-middle * middle)
    value = xp.where(size > 0.46875, 1 - xp.where(size > 4.0, tail, body), near_value)
    return xp.copysign(value, x)
