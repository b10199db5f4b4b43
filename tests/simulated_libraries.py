"""cuBLASLt and cuDNN on the simulated GPU, so that products and attention run without a real one.

    with simulated_libraries() as libraries, simulated_gpu() as cupy:
        products.matmul(cupy.asarray(a), cupy.asarray(b))
        libraries.cublaslt.calls, libraries.cudnn.executions

simulated_cublaslt.py and simulated_cudnn.py are the stand-ins.
"""

import contextlib
import math
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import simulated_cublaslt
import simulated_cudnn

from cupytron.kernels import cudnn_attention, product_plans, products, trial


class Libraries(NamedTuple):
    cublaslt: simulated_cublaslt.Library
    cudnn: simulated_cudnn.Library


@contextlib.contextmanager
def simulated_libraries() -> Iterator[Libraries]:
    """nvmath.bindings.cublasLt and cudnn are the stand-ins, and nothing is known of earlier ones."""
    lt, cudnn = simulated_cublaslt.module(), simulated_cudnn.module()
    bindings: Any = types.ModuleType("nvmath.bindings")
    nvmath: Any = types.ModuleType("nvmath")
    bindings.cublasLt, nvmath.bindings = lt, bindings
    with _modules(
        {
            "nvmath": nvmath,
            "nvmath.bindings": bindings,
            "nvmath.bindings.cublasLt": lt,
            "cudnn": cudnn,
        }
    ):
        _forget()
        before = product_plans._COVER, trial.FLUSH, trial.HOPELESS
        # what the device writes before each measurement: a CPU would take its time
        product_plans._COVER = trial.FLUSH = 4096
        trial.HOPELESS = math.inf  # how fast the simulation is says nothing
        try:
            yield Libraries(lt.simulation, cudnn.simulation)
        finally:
            product_plans._COVER, trial.FLUSH, trial.HOPELESS = before
            _forget()


def _forget() -> None:
    products.forget()
    products.set_timing(True)
    products.allow_tf32(False)
    cudnn_attention.forget()
    cudnn_attention.deterministic(False)


@contextlib.contextmanager
def _modules(replacing: dict[str, types.ModuleType]) -> Iterator[None]:
    """Other modules under these names."""
    before = {name: sys.modules.get(name) for name in replacing}
    sys.modules.update(replacing)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
