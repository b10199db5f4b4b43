"""The fast CUDA versions of ops: the same names and signatures, for arrays on a GPU."""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from cupytron import ops

# those whose functions have names of ops; attention has two, and is chosen between
_MODULES = (
    "activation",
    "cross_entropy",
    "dropout",
    "embedding",
    "norm",
    "products",
    "rotary",
    "sums",
)


def install(config: Any = None) -> None:
    """Put the kernels in their places in ops, as a run's settings want them.

    Args:
        config: tf32 and deterministic are read; None: neither.
    """
    from cupytron.kernels import cudnn_attention, loader, products

    loader.prepare()
    products.allow_tf32(config is not None and config.train.tf32)
    cudnn_attention.deterministic(config is not None and config.train.deterministic)
    # algorithms are chosen by their times only where the tuner asks for it, for all ranks alike
    products.set_timing(False)
    ops.use(table())


def table() -> dict[str, Any]:
    """The kernels by their names in ops."""
    modules = [importlib.import_module(f"cupytron.kernels.{name}") for name in _MODULES]
    found = {
        name: function
        for module in modules
        for name, function in vars(module).items()
        if name in ops.REFERENCE and function.__module__ == module.__name__
    }
    table = {**found, **_attention()}
    return {name: _of_either(kernel, ops.REFERENCE[name]) for name, kernel in table.items()}


def _of_either(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel for arrays of a GPU; a process may have models on both."""

    @functools.wraps(kernel)
    def function(first: Any, *others: Any, **named: Any) -> Any:
        chosen = reference if isinstance(first, np.ndarray) else kernel
        return chosen(first, *others, **named)

    return function


_refusals: dict[str, None] = {}  # reasons, in their order


def refusals() -> list[str]:
    """Why attention in 16 bits has run on our own kernel in this process; nothing if it has not."""
    return list(_refusals)


def _warn_of_refusal(reason: str) -> None:
    """Warn, once in a process: in 16 bits our own kernel is slower, since it uses no tensor cores."""
    if reason in _refusals:
        return
    _refusals[reason] = None
    warnings.warn(
        f"attention runs on cupytron's own kernel, which is slower in 16 bits: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _attention() -> dict[str, Callable[..., Any]]:
    """cuDNN's attention where it can do the problem, else our own; forward and backward alike."""
    from cupytron.kernels import attention as own
    from cupytron.kernels import cudnn_attention as cudnn

    def module_for(q: Any, k: Any, v: Any, dropout: Any) -> Any:
        reason = cudnn.supports(q, k, v, dropout)
        if reason is not None and q.dtype.itemsize == 2:
            _warn_of_refusal(reason)
        return cudnn if reason is None else own

    @functools.wraps(own.attention)
    def attention(q: Any, k: Any, v: Any, dropout: Any = None) -> Any:
        return module_for(q, k, v, dropout).attention(q, k, v, dropout)

    @functools.wraps(own.attention_backward)
    def attention_backward(
        do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, out: Any, dropout: Any = None
    ) -> None:
        module_for(q, k, v, dropout).attention_backward(do, q, k, v, o, lse, out, dropout)

    def cached_attention(q: Any, k: Any, v: Any) -> Any:
        # the number of keys grows with each token, and cuDNN would make a plan for each
        return own.attention(q, k, v)[0]

    return {
        "attention": attention,
        "attention_backward": attention_backward,
        "cached_attention": cached_attention,
    }
