"""16-bit floats in the reference: computed in float32, rounded once.

A kernel reads 16 bits, computes in float32 and rounds what it writes; so does the reference here, whatever
its array module makes of such numbers.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupytron import backend


def _half(x: Any) -> bool:
    return hasattr(x, "dtype") and backend.is_half(x.dtype)


def in_float32(
    function: Callable[..., Any], written: str = "", wide: Sequence[int] = ()
) -> Callable[..., Any]:
    """The function, with float32 in the place of 16-bit floats.

    Args:
        function: of the reference; its first two arguments tell whether there are any.
        written: name of an argument that it writes into, an array or a tuple of arrays.
        wide: which of its results stay float32: statistics, gradients of parameters.
    """
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def rounded(*arguments: Any, **named: Any) -> Any:
        for x in arguments[:2]:
            if _half(x):
                dtype = x.dtype
                break
        else:  # as nearly always; a small model has thousands of these calls a second
            return function(*arguments, **named)
        given = {**dict(zip(names, arguments, strict=False)), **named}
        widened = {name: _widen(x) for name, x in given.items()}
        result = function(**widened)
        if written in given:
            _copy_back(given[written], widened[written])
        if isinstance(result, tuple):
            return tuple(x if i in wide else _round(x, dtype) for i, x in enumerate(result))
        return result if 0 in wide else _round(result, dtype)

    return rounded


def _widen(x: Any) -> Any:
    if isinstance(x, tuple) and type(x) is tuple:
        return tuple(_widen(part) for part in x)
    return x.astype(np.float32) if _half(x) else x


def _round(x: Any, dtype: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_round(part, dtype) for part in x)
    return x.astype(dtype) if getattr(x, "dtype", None) == np.float32 else x


def _copy_back(target: Any, values: Any) -> None:
    if isinstance(target, tuple):
        for one, value in zip(target, values, strict=True):
            _copy_back(one, value)
    elif target is not values:
        target[...] = values
