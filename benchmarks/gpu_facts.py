"""What CuPy and NVIDIA's libraries do on this machine, where documentation leaves it open.

    python benchmarks/gpu_facts.py [NAME ...] [--out FOLDER] [--simulated]

Each fact is a function that returns figures; it fails if cupytron needs it to be otherwise.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_children import Json, Skipped, hold, run_one, said_with_mpi
from gpu_graph_facts import (
    capture,
    cublaslt_algorithms,
    cublaslt_in_a_graph,
    cudnn_in_a_graph,
    product_inputs,
)
from gpu_nccl import nccl_on_one_gpu
from gpu_report import Gpu, add_options, begin, has_gpu, open_gpu, path_for, save, shown, state
from gpu_timing import BFLOAT16, Recorded, busy, on_stream, random


def device(gpu: Gpu) -> Json:
    """What the driver says of the device."""
    runtime = gpu.cupy.cuda.runtime
    said = runtime.getDeviceProperties(0)
    free, total = runtime.memGetInfo()
    keys = ("multiProcessorCount", "l2CacheSize", "sharedMemPerBlockOptin", "memoryBusWidth")
    return {
        "name": said["name"].decode(),
        "capability": f"{said['major']}.{said['minor']}",
        **{key: int(said[key]) for key in keys if key in said},
        "free_bytes": int(free),
        "total_bytes": int(total),
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        **({} if gpu.simulated else state()),
    }


def libraries(gpu: Gpu) -> Json:
    """Versions that the loaded libraries themselves tell."""
    from cupytron.comm.choice import nccl_version
    from cupytron.kernels import cudnn_attention, products

    found: Json = {
        "cublasLt": products.library_version(),
        "cudnn": cudnn_attention.library().backend_version(),
        "nccl": nccl_version(),
    }
    if not gpu.simulated:
        found["nvrtc"] = ".".join(map(str, gpu.cupy.cuda.nvrtc.getVersion()))
        found["local_runtime"] = gpu.cupy.cuda.get_local_runtime_version()
    return found


def host_costs(gpu: Gpu) -> Json:
    """Microseconds that the host spends to start a product, a kernel, an array operation, a graph."""
    from cupytron.kernels import activation, products

    x, w = product_inputs(gpu, *gpu.size((64, 64, 64), (16, 8, 8)), seed=7)
    out = gpu.cupy.empty((len(x), w.shape[1]), BFLOAT16)
    y = gpu.cupy.empty_like(x)
    gpu.cupy.cuda.Device().synchronize()
    calls: dict[str, Callable[[], Any]] = {
        "cublaslt_product": lambda: products.matmul(x, w, out=out),
        "own_kernel": lambda: activation.gelu(x),
        "array_operation": lambda: gpu.cupy.add(x, x, out=y),
    }
    with on_stream(gpu) as stream:
        for call in calls.values():
            call()
        calls["graph_of_one_product"] = Recorded(gpu, calls["cublaslt_product"]).launch
        return {name: _host_seconds(gpu, stream, call) * 1e6 for name, call in calls.items()}


def _host_seconds(gpu: Gpu, stream: Any, call: Callable[[], Any]) -> float:
    count = gpu.size(200, 2)
    call()
    stream.synchronize()
    busy(gpu, 0.05)  # a full queue, as in a step
    began = time.perf_counter()
    for _ in range(count):
        call()
    took = (time.perf_counter() - began) / count
    stream.synchronize()
    return took


def copies_do_not_wait(gpu: Gpu) -> Json:
    """A copy from pinned memory, and one to it, are only started while the device is busy."""
    import cupyx

    cupy, length = gpu.cupy, 1 << 16
    there, back = cupyx.zeros_pinned(length, np.int64), cupyx.empty_pinned(length, np.int64)
    x = cupy.zeros(length, np.int64)
    found: Json = {}
    # the last one is for comparison: it may wait
    pageable = np.zeros(length, np.int64)
    calls: dict[str, Callable[[], Any]] = {
        "pinned to device": lambda: x.set(there),
        "device to pinned": lambda: x.get(out=back, blocking=False),
        "pageable to device": lambda: x.set(pageable),
    }
    cupy.cuda.Device().synchronize()
    with on_stream(gpu) as stream:
        for name, call in calls.items():
            call()
            stream.synchronize()
            busy(gpu, 0.2)
            began = time.perf_counter()
            call()
            found[name] = (time.perf_counter() - began) * 1e3
            stream.synchronize()
    slow = [name for name in list(calls)[:2] if found[name] > 50]
    hold(not slow, f"the host waits for: {', '.join(slow)} (ms)", found)
    return found


def half_products(gpu: Gpu) -> Json:
    """Whether CuPy's own product of three-dimensional bfloat16 arrays works by now (it is not used)."""
    x = random(gpu, (2, 16, 16))
    try:
        y = (x @ x).get()
    except Exception as error:
        return {"three-dimensional bfloat16 @": f"{type(error).__name__}: {error}"[:200]}
    return {"three-dimensional bfloat16 @": f"works, gives {y.dtype}"}


def cuda_aware_mpi(gpu: Gpu) -> Json:
    """Whether the MPI library here says that it reads device memory; any answer is fine."""
    if gpu.simulated:
        raise Skipped("no process of MPI's is started in a dry run")
    code = (
        "from mpi4py import MPI; from cupytron.comm import cuda_aware; "
        "print(MPI.Get_library_version().splitlines()[0][:60], '|', cuda_aware.says_so())"
    )
    library, _, said = said_with_mpi(code).strip().rpartition(" | ")
    return {"library": library, "cuda_aware": said}


FACTS: dict[str, Callable[[Gpu], Json]] = {
    function.__name__: function
    for function in (
        device,
        libraries,
        cublaslt_in_a_graph,
        cublaslt_algorithms,
        host_costs,
        cudnn_in_a_graph,
        capture,
        copies_do_not_wait,
        half_products,
        cuda_aware_mpi,
        nccl_on_one_gpu,
    )
}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(FACTS))
    add_options(parser)
    arguments = parser.parse_args(words)
    if unknown := set(arguments.names) - set(FACTS):
        parser.error(f"unknown fact {', '.join(sorted(unknown))}; choose from {', '.join(FACTS)}")
    if not has_gpu(arguments.simulated):
        return 1
    record = {**begin(arguments.simulated), "facts": {}}
    with open_gpu(arguments.simulated) as gpu:
        for name in arguments.names or FACTS:
            outcome = run_one(functools.partial(FACTS[name], gpu))
            record["facts"][name] = outcome
            text = outcome.get("why") or shown(outcome["found"])
            print(f"{outcome['status']:7} {name}  {text}", flush=True)
    path = path_for(record, arguments.out, "gpu-facts")
    save(record, path, last=True)
    print(f"written: {path}")
    return int(any(outcome["status"] == "FAILED" for outcome in record["facts"].values()))


if __name__ == "__main__":
    sys.exit(main())
