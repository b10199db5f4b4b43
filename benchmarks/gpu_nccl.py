"""NCCL between two processes on one GPU, which it refuses unless they say that they are two machines.

python benchmarks/gpu_nccl.py RANK FOLDER       one of them; gpu_facts.py starts both
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gpu_children import Failed, Json, Skipped
from gpu_report import Gpu
from gpu_timing import BFLOAT16


def nccl_on_one_gpu(gpu: Gpu) -> Json:
    """Two processes on one GPU, which say that they are two machines: NCCL by sockets, and in a graph."""
    if gpu.simulated:
        raise Skipped("there is no simulated NCCL that processes could share")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__]
        children = [
            subprocess.Popen(
                [*command, str(rank), folder],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            outputs = [child.communicate(timeout=90)[0] for child in children]
        except subprocess.TimeoutExpired:
            raise Failed("no end within 90 s") from None
        finally:
            for child in children:
                child.kill()
    lines = [output.strip().splitlines() or ["no output"] for output in outputs]
    if any(child.returncode for child in children):
        raise Failed(" / ".join(said[-1][:300] for said in lines), {"output": outputs[0][-1500:]})
    return json.loads(lines[0][-1])


def nccl_rank(rank: int, folder: Path) -> Json:
    """One of the two processes of nccl_on_one_gpu."""
    os.environ |= {
        "NCCL_HOSTID": f"rank-{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_DEBUG": "WARN",
    }
    import cupy
    from cupy.cuda import nccl

    file = folder / "identity"
    if rank == 0:
        (folder / "writing").write_bytes(pickle.dumps(nccl.get_unique_id()))
        (folder / "writing").rename(file)
    while not file.exists():
        time.sleep(0.01)
    began = time.perf_counter()
    comm = nccl.NcclCommunicator(2, pickle.loads(file.read_bytes()), rank)
    connected = time.perf_counter() - began
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.full(1 << 20, rank + 1, np.float32)

        def reduce() -> None:
            kind = nccl.NCCL_FLOAT32
            comm.allReduce(x.data.ptr, x.data.ptr, x.size, kind, nccl.NCCL_SUM, stream.ptr)

        def answer(name: str, wanted: float) -> None:
            stream.synchronize()
            value = float(x[-1])
            assert value == wanted, f"{name}: {value} in the place of {wanted}"

        began = time.perf_counter()
        reduce()
        answer("all-reduce", 3)
        took = time.perf_counter() - began
        half = cupy.full(8, rank + 1, BFLOAT16)
        both = cupy.zeros(16, BFLOAT16)
        comm.allGather(half.data.ptr, both.data.ptr, half.nbytes, nccl.NCCL_UINT8, stream.ptr)
        stream.synchronize()
        assert both.get().astype(np.float32).tolist() == [1.0] * 8 + [2.0] * 8, "all-gather"
        stream.begin_capture()
        reduce()
        graph = stream.end_capture()
        graph.launch(stream)
        answer("all-reduce in a graph", 6)
    return {
        "version": nccl.get_version(),
        "seconds_to_connect": connected,
        "ms_of_4_MiB_all_reduce": took * 1e3,
        "in_a_graph": True,
    }


if __name__ == "__main__":
    print(json.dumps(nccl_rank(int(sys.argv[1]), Path(sys.argv[2]))))
