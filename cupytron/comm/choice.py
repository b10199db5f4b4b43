"""Which way arrays on GPUs take between ranks: --comm auto, nccl, mpi or mpi-staged."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from cupytron.comm import cuda_aware
from cupytron.comm.communicator import Communicator
from cupytron.comm.gpu import GPUCommunicator
from cupytron.comm.nccl import NCCL
from cupytron.comm.staged import Staged
from cupytron.errors import CupytronError
from cupytron.launcher import local_rank, named

WISHES = ("auto", "nccl", "mpi", "mpi-staged")
_STAGED = "or choose --comm mpi-staged"


class _Rank(NamedTuple):
    """What a rank tells the others of itself."""

    node: str
    gpu: str  # its place on the node's bus: numbers depend on CUDA_VISIBLE_DEVICES
    nccl: str | None  # version


def choose(world: Communicator, wish: str, device: Any) -> tuple[Communicator, str]:
    """A communicator for arrays of the host and of GPUs, and what was chosen, for the user. Collective.

    auto: NCCL where it is installed and every rank has a GPU of its own; else a CUDA-aware MPI, likewise;
    else through the host's memory. All ranks choose alike.

    Args:
        world: all ranks, by threads or MPI. wish: one of WISHES.
        device: where this rank computes; of a GPU, `number` is CUDA's.

    Returns: the communicator, world itself where no array is sent between GPUs; one line.

    Raises:
        CupytronError: the wish cannot be met; on all ranks.
    """
    if wish not in WISHES:
        raise CupytronError(f"--comm {wish}: choose from {', '.join(WISHES)}")
    if not device.gpu:
        return world, "device arrays: none, the ranks compute on CPUs"
    if world.size == 1:
        return world, "device arrays: one process, which sends nothing"
    ranks: list[_Rank] = world.gather_objects(_myself(device.number))
    shared = len({(rank.node, rank.gpu) for rank in ranks}) < len(ranks)
    why = []  # not NCCL, not MPI
    if wish in ("auto", "nccl"):
        absent = ", ".join(str(i) for i, rank in enumerate(ranks) if rank.nccl is None)
        if not absent and not (shared and wish == "auto"):
            return GPUCommunicator(world, _nccl(world, shared)), _said_of_nccl(ranks, shared)
        problem = f"NCCL cannot be loaded on rank {absent}" if absent else "ranks share a GPU"
        why.append(problem)
        if wish == "nccl":
            raise CupytronError(
                f"--comm nccl: {problem}; pip install nvidia-nccl-cu13 (nvidia-nccl-cu12 for CUDA 12), "
                f"{_STAGED}"
            )
    if wish == "mpi" or (wish == "auto" and not shared):
        mpi_problem = _mpi_problem(world, device.number, wish == "mpi")
        if mpi_problem is None:
            line = "device arrays: CUDA-aware MPI"
            return GPUCommunicator(world, cuda_aware.CUDAAware(world)), line
        if wish == "mpi":
            raise CupytronError(f"--comm mpi: {mpi_problem}; use a CUDA-aware MPI, {_STAGED}")
        why.append(mpi_problem)
    reason = f" ({'; '.join(why)})" if why else ""
    line = f"device arrays: through the host's memory{reason}"
    return GPUCommunicator(world, Staged(world)), line


def _myself(number: int) -> _Rank:
    import cupy

    boot = Path("/proc/sys/kernel/random/boot_id")  # containers of one machine have several names
    node = boot.read_text().strip() if boot.exists() else os.uname().nodename
    return _Rank(node, cupy.cuda.Device(number).pci_bus_id, nccl_version())


def nccl_version() -> str | None:
    """NCCL's version, such as "2.28.9"; None if it cannot be loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns at length of what is not installed
        try:
            from cupy.cuda import nccl
        except ImportError:
            return None
    if not nccl.available:
        return None
    code = nccl.get_version()
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def _nccl(world: Communicator, shared: bool) -> NCCL:
    if shared:
        # NCCL refuses two ranks on one GPU of one machine; so they say that they are on several, which talk
        # by sockets. NCCL reads these when it makes its first communicator.
        os.environ.setdefault("NCCL_HOSTID", f"rank-{world.rank}")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    return NCCL(world)


def _said_of_nccl(ranks: list[_Rank], shared: bool) -> str:
    versions = " and ".join(sorted({str(rank.nccl) for rank in ranks}))
    text = f"device arrays: NCCL {versions}"
    return f"{text}, over sockets, since ranks share a GPU" if shared else text


def _mpi_problem(world: Communicator, number: int, asked_for: bool) -> str | None:
    """Why MPI cannot be given device memory, on all ranks alike; None: it can.

    Args:
        asked_for: whether the user wants it: then a library that does not say anything, as some do, is
            tried nevertheless.
    """
    if not _is_mpi(world):
        return "the ranks are threads, not processes of MPI"
    silent = not cuda_aware.says_so()
    said = world.gather_objects(silent)
    if any(said) and not asked_for:
        return "the MPI library does not say that it is CUDA-aware"
    problem = cuda_aware.trial(number) if local_rank() == 0 else None  # one for each node
    for name, found in world.gather_objects((named(world.rank), problem)):
        if found is not None:
            return f"device memory could not be sent through MPI ({name}: {found})"
    return None


def _is_mpi(world: Any) -> bool:
    # mpi4py may not be imported to find out
    mpi = sys.modules.get("cupytron.comm.mpi")
    return mpi is not None and isinstance(world, mpi.MPICommunicator)
