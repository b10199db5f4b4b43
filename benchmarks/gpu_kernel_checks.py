"""Every kernel against its definition in float64: the cases of tests/kernel_cases*.py, on this GPU.

Each case runs twice on memory that is poisoned with NaN, and has to give the same bits both times, but for
those that add in any order. A problem that a library refuses is skipped with its reason; in 16 bits, at the
sizes of a GPT-2 and a Llama, a refusal is a failure.
"""

import functools
import hashlib
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gpu_children import Json, Skipped, hold
from gpu_report import Gpu

from cupytron.kernels import trial

MODULES = ("kernel_cases", "kernel_cases_2", "kernel_cases_3")
# the largest error that rounding explains: a few units in the last place of sums, rounded once at the end;
# half precision has 8 and 11 bits
LIMITS = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
# odd sizes fit neither a warp nor a wide access; the others are a GPT-2's and a Llama's, shortened where a
# product in float64 on the host would take too long
SIZES: dict[str, dict[str, int]] = {
    "odd": {
        "tokens": 37, "width": 67, "rows": 131, "batch": 3, "length": 29, "kv_heads": 2, "groups": 3,
        "head_size": 24,
    },
    "gpt2": {
        "tokens": 1024, "width": 768, "rows": 3072, "batch": 2, "length": 320, "kv_heads": 6,
        "groups": 1, "head_size": 64,
    },
    "unaligned": {
        "tokens": 64, "width": 128, "rows": 192, "batch": 1, "length": 33, "kv_heads": 1, "groups": 2,
        "head_size": 40, "shift": 1,
    },
    "llama": {
        "tokens": 256, "width": 2048, "rows": 1032, "batch": 1, "length": 512, "kv_heads": 2,
        "groups": 4, "head_size": 128,
    },
}  # fmt: skip
TINY: dict[str, dict[str, int]] = {
    "odd": {"tokens": 9, "width": 7, "rows": 11, "batch": 1, "length": 9, "kv_heads": 1},
    "wide": {"tokens": 8, "width": 16, "rows": 16, "length": 8, "groups": 1, "shift": 1},
}
# sizes at which cuDNN has to do the attention of 16 bits: without it a step has no tensor cores there
REQUIRED = ("gpt2", "llama", "wide")
# a whole vocabulary, where it costs the host little
WIDE_ROWS = {"cross_entropy": 50304, "embedding": 5003, "embedding_backward": 5003}
_TOKENS_OF_WIDE = 128


def checks(gpu: Gpu, dtype: str, module: str) -> dict[str, Callable[[], Json]]:
    """The cases of a module for one dtype, by name."""
    cases = importlib.import_module(module)
    return {name: functools.partial(check, gpu, cases, name, dtype) for name in cases.CASES}


def check(gpu: Gpu, module: Any, name: str, dtype: str) -> Json:
    """Run a case at all sizes, and hold its errors against the dtype's limit.

    Returns: the worst error, where it is, its limit, and, if a library refused sizes, the reasons by size.

    Raises:
        Failed: an error is too large, bits differ, or a size that is required is refused.
        Skipped: all sizes are refused.
    """
    kernel_cases = importlib.import_module("kernel_cases")
    case = module.CASES[name]
    worst, figures, different = 0.0, (0.0, "", 0.0), []
    refused: dict[str, str] = {}
    all_sizes = TINY if gpu.tiny else SIZES
    for size, values in all_sizes.items():
        sizes = kernel_cases.Sizes(**_fitting(name, size, values))
        digests = []
        for _ in range(2):
            with _hashing(module) as digest, _poisoned(gpu):
                try:
                    errors = case(gpu.cupy, kernel_cases.DTYPES[dtype], sizes)
                except kernel_cases.Refused as reason:
                    refused[size] = str(reason)
                    break
            digests.append(digest.hexdigest())
            for output, error in errors.items():
                limit = _limit(module, dtype, output)
                share = error / limit if error == error else math.inf
                if share >= worst:
                    worst, figures = share, (error, f"{output} ({size})", limit)
        if len(set(digests)) > 1 and name not in getattr(module, "ANY_ORDER", ()):
            different.append(size)
    error, where, limit = figures
    found = {"error": error, "at": where, "limit": limit}
    if refused:
        found["refused"] = refused
    if kernel_cases.DTYPES[dtype].itemsize == 2:
        needed = [f"{size}: {refused[size]}" for size in REQUIRED if size in refused]
        hold(not needed, f"refused at sizes that need it: {'; '.join(needed)}", found)
    if len(refused) == len(all_sizes):
        raise Skipped("; ".join(dict.fromkeys(refused.values())))
    hold(worst <= 1, f"error {error:.2e} of {where}, limit {limit:.0e}", found)
    hold(not different, f"other bits the second time: sizes {', '.join(different)}", found)
    return found


def _limit(module: Any, dtype: str, output: str) -> float:
    """Sums and statistics are float32 also where activations have 16 bits."""
    sums = getattr(module, "SUMS", ())
    wide = dtype != "float64" and sums and output.startswith(sums)
    return LIMITS["float32" if wide else dtype]


def _fitting(name: str, size: str, values: dict[str, int]) -> dict[str, int]:
    if size == "gpt2" and name in WIDE_ROWS:
        return {**values, "rows": WIDE_ROWS[name], "tokens": _TOKENS_OF_WIDE}
    return values


@contextmanager
def _hashing(module: Any) -> Iterator[Any]:
    """Hash every array that a case compares, through the functions that compare it."""
    digest = hashlib.sha256()
    kept = {n: getattr(module, n) for n in ("relative_error", "inequality") if hasattr(module, n)}

    def noting(function: Callable[..., float]) -> Callable[..., float]:
        def compare(found: Any, *others: Any) -> float:
            host = found.get() if hasattr(found, "get") else np.asarray(found)
            digest.update(host.tobytes())
            return function(found, *others)

        return compare

    for name, function in kept.items():
        setattr(module, name, noting(function))
    try:
        yield digest
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


@contextmanager
def _poisoned(gpu: Gpu) -> Iterator[None]:
    """Whatever is allocated holds NaN in every floating-point type, and -1 in every integer."""
    cuda = gpu.cupy.cuda
    with trial.apart(gpu.cupy):
        allocate = cuda.get_allocator()

        def malloc(size: int) -> Any:
            memory = allocate(size)
            if size:
                memory.memset_async(0xFF, size)
            return memory

        try:
            with cuda.using_allocator(malloc):
                yield
        finally:
            cuda.Device().synchronize()
