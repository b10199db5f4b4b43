"""Facts about libraries and CUDA graphs: products, attention, and what a capture takes."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_children import Json, hold
from gpu_report import Gpu
from gpu_timing import BFLOAT16, Recorded, on_stream, random

# (features out, features in) of GPT-2 124M's products
PRODUCTS = {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)}


def product_inputs(gpu: Gpu, tokens: int, d_in: int, d_out: int, seed: int) -> tuple[Any, Any]:
    return (
        random(gpu, (tokens, d_in), seed=seed),
        random(gpu, (d_in, d_out), spread=0.1, seed=seed + 1),
    )


def cublaslt_in_a_graph(gpu: Gpu) -> Json:
    """A product is right, and a replayed one gives new inputs' product, bit for bit the eager one."""
    from cupytron.kernels import products

    shape = gpu.size((512, 768, 3072), (16, 24, 32))
    (x, w), (other, _) = product_inputs(gpu, *shape, seed=1), product_inputs(gpu, *shape, seed=3)
    gpu.cupy.cuda.Device().synchronize()
    with on_stream(gpu) as stream:
        y = products.matmul(x, w)
        wanted = x.get().astype(np.float64) @ w.get().astype(np.float64)
        error = float(np.abs(y.get().astype(np.float64) - wanted).max() / np.abs(wanted).max())
        eager = products.matmul(other, w).get()
        recorded = Recorded(gpu, lambda: products.matmul(x, w))
        x[...] = other
        recorded.launch()
        stream.synchronize()
        replayed = recorded.results.get()
    found = {"error": error, "replay_equals_eager": replayed.tobytes() == eager.tobytes()}
    hold(
        error <= 1e-2 and found["replay_equals_eager"], "the product or its replay is wrong", found
    )
    return found


def cublaslt_algorithms(gpu: Gpu) -> Json:
    """How many algorithms the heuristics offer for GPT-2's products, forward and of the weight."""
    from cupytron.kernels import products

    found: Json = {}
    tokens = gpu.size(8192, 16)
    for name, (d_out, d_in) in PRODUCTS.items():
        d_out, d_in = gpu.size((d_out, d_in), (d_out // 96, d_in // 96))
        x, w = product_inputs(gpu, tokens, d_in, d_out, seed=5)
        y, gradient = gpu.cupy.empty((tokens, d_out), BFLOAT16), gpu.cupy.zeros((d_in, d_out), "f4")
        found[name] = len(products.candidates(x, w, y).runs)
        found[f"{name} weight"] = len(products.candidates(x.T, y, gradient, add=True).runs)
    hold(min(found.values()) >= 1, "a product has no algorithm", found)
    return found


def _attention_arrays(gpu: Gpu, seed: int) -> tuple[Any, Any]:
    """Packed qkv (B, S, N_kv, 3, H) and the gradient of o."""
    batch, length, heads, size = gpu.size((4, 1024, 12, 64), (1, 8, 2, 8))
    qkv = random(gpu, (batch, length, heads, 3, size), seed=seed)
    return qkv, random(gpu, (batch, length, heads, 1, size), seed=seed + 1)


def _attention(cudnn: Any, gpu: Gpu, qkv: Any, d_out: Any) -> tuple[Any, Any]:
    views = qkv[..., :1, :], qkv[..., 1, :], qkv[..., 2, :]
    gradient = gpu.cupy.empty_like(qkv)
    into = gradient[..., :1, :], gradient[..., 1, :], gradient[..., 2, :]
    o, lse = cudnn.attention(*views)
    cudnn.attention_backward(d_out, *views, o, lse, into)
    return o, gradient


def cudnn_in_a_graph(gpu: Gpu) -> Json:
    """Attention forward and backward agree with our own kernel, and replay to the eager call's bits."""
    from cupytron.kernels import attention as own
    from cupytron.kernels import cudnn_attention as cudnn

    qkv, d_out = _attention_arrays(gpu, seed=11)
    other, _ = _attention_arrays(gpu, seed=13)
    gpu.cupy.cuda.Device().synchronize()
    cudnn.deterministic(True)
    try:
        with on_stream(gpu) as stream:
            began = time.perf_counter()
            o, gradient = _attention(cudnn, gpu, qkv, d_out)
            stream.synchronize()
            seconds = time.perf_counter() - began
            pairs = zip((o, gradient), _attention(own, gpu, qkv, d_out), strict=True)
            errors = [_distance(mine, theirs) for mine, theirs in pairs]
            eager = [x.get().tobytes() for x in _attention(cudnn, gpu, other, d_out)]
            again = [x.get().tobytes() for x in _attention(cudnn, gpu, other, d_out)]
            recorded = Recorded(gpu, lambda: _attention(cudnn, gpu, qkv, d_out))
            qkv[...] = other
            recorded.launch()
            stream.synchronize()
            replayed = [x.get().tobytes() for x in recorded.results]
    finally:
        cudnn.deterministic(False)
    found = {
        "seconds_of_first_call": seconds,
        "distance_of_o": errors[0],
        "distance_of_gradient": errors[1],
        "deterministic": eager == again,
        "replay_equals_eager": replayed == eager,
    }
    right = max(errors) <= 2e-2 and found["deterministic"] and found["replay_equals_eager"]
    hold(right, "cuDNN's attention or its replay is wrong", found)
    return found


def _distance(a: Any, b: Any) -> float:
    """Norm of a - b over that of b."""
    x, y = (v.get().astype(np.float64) for v in (a, b))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def capture(gpu: Gpu) -> Json:
    """Which array operations a capture takes; those that a step uses have to be among them."""
    cupy = gpu.cupy
    x = random(gpu, (64, 64), np.float32)
    half, ids = random(gpu, (64, 64)), cupy.arange(64)
    total, scalar = cupy.zeros((64, 64), np.float32), cupy.zeros(1)
    needed: dict[str, Callable[[], Any]] = {
        "add in place": lambda: cupy.add(total, x, out=total),
        "sum of an axis": lambda: x.sum(axis=0),
        "sum of all": lambda: x.sum(keepdims=True),
        "cast": lambda: half.astype(np.float32),
        "fill": lambda: total.fill(0),
        "slice to slice": lambda: cupy.copyto(total[1:3], x[5:7]),
        "set a slice": lambda: scalar.__setitem__(slice(0, 1), 2.0),
        "divide into a slice": lambda: cupy.divide(x[0], 3.0, out=total[0]),
    }
    wanted: dict[str, Callable[[], Any]] = {
        "concatenate": lambda: cupy.concatenate([x, x]),
        "take rows": lambda: x[ids],
        "float32 matmul": lambda: x @ x,
        "bfloat16 matmul": lambda: half @ half,
        "sort": lambda: cupy.argsort(ids),
    }
    cupy.cuda.Device().synchronize()
    found: Json = {}
    for name, call in {**needed, **wanted}.items():
        with on_stream(gpu) as stream:
            with contextlib.suppress(Exception):
                call()  # compiled
            stream.synchronize()
            try:
                recorded = Recorded(gpu, call)
                recorded.launch()
                stream.synchronize()
                found[name] = "yes"
            except Exception as error:
                found[name] = f"no: {type(error).__name__}: {error}"[:200]
    missing = [name for name in needed if found[name] != "yes"]
    hold(not missing, f"not captured: {', '.join(missing)}", found)
    return found
