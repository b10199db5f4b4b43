"""Arrays on GPUs through an MPI library that reads and writes device memory itself, a CUDA-aware one.

MPI knows nothing of streams: the host waits for the current stream before each of its calls, and for MPI in
each `wait`. MPI only moves data. Sums are made here, in the order of the ranks: one library copies arrays
to the host to add them, and its non-blocking sums on device memory have crashed.

A library that cannot do it ends the process with a segmentation fault, so it is asked, and then tried in a
process that may crash.
"""

import ctypes
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cupytron import backend
from cupytron.comm.communicator import Communicator
from cupytron.comm.gpu import Transport
from cupytron.comm.half import ordered_sum
from cupytron.process import CHILD


class CUDAAware(Transport):
    """Through the host's MPI, which gets pointers to device memory.

    Args:
        host: an MPICommunicator.
    """

    host: Any

    def split(self, host: Communicator) -> "CUDAAware":
        return CUDAAware(host)

    def _ready(self) -> None:
        """Let all that is enqueued be done: MPI is about to read or write its arrays."""
        import cupy

        self._refuse_capture("MPI cannot send arrays: switch graphs off, or choose --comm nccl")
        cupy.cuda.get_current_stream().synchronize()

    def _all_reduce(self, x: Any) -> Callable[[], None]:
        # the sums are made before this returns: a collective that `wait` began could come in another order
        # on each rank
        xp, flat = backend.array_module(x), x.reshape(-1)
        n = -(-x.size // self.size)  # of the part that each rank sums, padded
        padded = flat
        if n * self.size > x.size:
            padded = xp.zeros(n * self.size, x.dtype)
            padded[: x.size] = flat
        mine = xp.empty(n, x.dtype)
        self._reduce_scatter(padded, mine)()
        gathered = self._all_gather(mine, padded, False)

        def finish() -> None:
            gathered()
            if padded is not flat:
                flat[...] = padded[: x.size]

        return finish

    def _all_gather(self, x: Any, out: Any, in_place: bool) -> Callable[[], None]:
        self._ready()
        return self.host._all_gather(x, out, in_place)

    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], None]:
        parts = backend.array_module(x).empty_like(x)
        came = self._all_to_all(x, parts)

        def finish() -> None:
            came()
            ordered_sum(parts.reshape(self.size, *out.shape), out)

        return finish

    def _all_to_all(self, x: Any, out: Any) -> Callable[[], None]:
        self._ready()
        return self.host._all_to_all(x, out)

    def _broadcast(self, x: Any, root: int) -> None:
        self._ready()
        self.host._broadcast(x, root)

    def _send(self, x: Any, to: int, buffered: bool) -> Callable[[], None]:
        x = x.copy() if buffered else x
        self._ready()
        return self.host._post_send(x, to, buffered)

    def _recv(self, out: Any, source: int) -> Callable[[], None]:
        self._ready()
        return self.host._recv(out, source)


def says_so() -> bool:
    """Whether the MPI library of this process says that it can read and write device memory."""
    return any(_asked(path) for path in _libraries())


def _libraries() -> list[str]:
    """Files of MPI libraries that are loaded: their symbols are not visible to the whole process."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[5] for line in lines if "libmpi" in line}
    return sorted(path for path in paths if Path(path).name.startswith("libmpi"))


def _asked(path: str) -> bool:
    """The answer of one library: Open MPI's question, then MPICH's."""
    library = ctypes.CDLL(path)
    if (query := getattr(library, "MPIX_Query_cuda_support", None)) and query() == 1:
        return True
    if query := getattr(library, "MPIX_GPU_query_support", None):
        yes = ctypes.c_int(0)
        return query(0, ctypes.byref(yes)) == 0 and yes.value == 1  # 0: of all GPUs, CUDA's
    return False


# A few bytes to itself, with the two ways to send that are used.
_TRIAL = """
import sys
import {module} as xp
from mpi4py import MPI
if {gpu}:
    xp.cuda.Device(int(sys.argv[1])).use()
x, y, z = xp.arange(1000, dtype="uint8"), xp.zeros(1000, "uint8"), xp.zeros(1000, "uint8")
if {gpu}:
    xp.cuda.Stream.null.synchronize()
assert MPI.COMM_WORLD.size == 1
MPI.Request.Waitall([MPI.COMM_SELF.Irecv(y, 0), MPI.COMM_SELF.Isend(x, 0)])
MPI.COMM_SELF.Ialltoall(x, z).Wait()
assert (x == y).all() and (x == z).all()
"""
_SECONDS = 120.0  # importing CuPy and starting CUDA takes some on a slow file system


def trial(number: int, module: str = "cupy", seconds: float = _SECONDS) -> str | None:
    """Send a few bytes of device memory in a child process of one rank.

    Args:
        number: of the GPU, as CUDA counts. module: "numpy" tries the same with host memory.

    Returns: None if they arrived, else what went wrong.
    """
    code = _TRIAL.format(module=module, gpu=module == "cupy")
    command = [*CHILD, code, str(number)]
    try:
        done = subprocess.run(
            command,
            env=without_launcher(os.environ),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {seconds:g} seconds"
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    if done.returncode > 0:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        return f"exit code {done.returncode}: {said[-1]}"
    return None


# what makes MPI take a process for a rank of its launcher's job
_MARKS = (
    *("PMI_", "PMIX_", "PRTE_", "PALS_", "HYDRA_", "HYDI_", "MPI_LOCAL"),
    *("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "SLURM_"),
)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is to be alone."""
    return {name: text for name, text in environment.items() if not name.startswith(_MARKS)}
