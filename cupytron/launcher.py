"""What a launcher's environment variables say of this process, and the begin of MPI under one."""

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cupytron import progress
from cupytron.errors import WrongLauncher
from cupytron.launch_advice import (
    is_pmix_without_support,
    remedy,
    takes_plugins_of_open_mpi_5,
)
from cupytron.versions import host

_LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun", "prte", "srun", "hydra")
_DAEMONS = ("hydra_", "prted", "orted")  # a launcher's helpers on a node, which pass on no signal


# Open MPI, MPICH and its relatives, then srun. The first that is there counts: mpirun inside a Slurm job
# starts its own helpers by srun, whose variables they pass on.
def launched_tasks() -> int:
    """How many processes a launcher (mpirun, mpiexec, srun) started together with this one."""
    return _said("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS") or 1


def launched_rank() -> int:
    """Which of the processes that a launcher started this one is; known without MPI."""
    if launched_tasks() == 1:
        return 0  # a batch script is SLURM_PROCID 0 of no step
    return _said("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID") or 0


def local_ranks() -> int:
    """How many of them run on this node."""
    if (tasks := launched_tasks()) == 1:
        return 1
    if local := _said("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        return local
    # such as 4(x2),3: the tasks of each node
    nodes = [
        int(count)
        for count, _, times in re.findall(
            r"(\d+)(\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
        )
        for _ in range(int(times or 1))
    ]
    node = _said("SLURM_NODEID") or 0
    return nodes[node] if node < len(nodes) else max(nodes, default=tasks)


def local_rank() -> int:
    """Which of its node's processes this one is, for the choice of a GPU; known without MPI.

    Launchers that do not say put neighbouring ranks on one node.
    """
    if launched_tasks() == 1:
        return 0
    said = _said(
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",  # MPICH, Intel MPI, MVAPICH
        "PALS_LOCAL_RANKID",  # Cray
        "PMI_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "SLURM_LOCALID",
    )
    return launched_rank() % local_ranks() if said is None else said


def named(rank: int) -> str:
    """This process's rank, for messages: with its machine, if the job has several."""
    return f"rank {rank}" if local_ranks() == launched_tasks() else f"rank {rank} on {host()}"


class Ancestor(NamedTuple):
    """A process above this one: its id, its name (15 characters at most) and its command line."""

    pid: int
    name: str
    words: Sequence[str] = ()


def ancestors() -> Iterator[Ancestor]:
    """This process's parent, the parent of that, and so on, as far as they can be seen."""
    pid = os.getppid()
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:
            return
        yield Ancestor(pid, stat.rpartition(")")[0].partition("(")[2], words)
        pid = int(stat.rpartition(")")[2].split()[1])


def launcher_pid() -> int | None:
    """The launcher's process, or its helper on this node, where it is an ancestor of this one."""
    found = [above.pid for above in ancestors() if above.name.startswith(_LAUNCHERS)]
    return found[-1] if found else None  # the outermost


def how_to_stop(environment: Mapping[str, str], above: Sequence[Ancestor], host: str) -> str:
    """The command that makes all ranks of this job save and stop.

    Args:
        environment: of a rank.
        above: that rank's ancestors, its parent first.
        host: the rank's machine.
    """
    daemons = [a for a in above if a.name.startswith(_DAEMONS)]
    launchers = [a for a in above if a.name.startswith(_LAUNCHERS) and a not in daemons]
    if launchers:
        return f"kill -USR1 {launchers[-1].pid}, on {host}"
    # PRRTE names its jobs after the machine and the process that started them
    if started := re.match(r"prterun-(.+)-(\d+)@", environment.get("PMIX_NAMESPACE", "")):
        return f"kill -USR1 {started[2]}, on {started[1]}"
    job = environment.get("SLURM_JOB_ID")
    if job and "SLURM_STEP_ID" in environment and not daemons:
        return f"scancel --signal=USR1 {job}"
    where = "the machine where it was started"
    for daemon in daemons:
        if "--control-port" in daemon.words[:-1]:  # hydra's proxies know mpirun's HOST:PORT
            at = daemon.words[daemon.words.index("--control-port") + 1]
            where = at.rpartition(":")[0] or where
    return f"kill -USR1 PID-OF-MPIRUN, on {where}"


def under_open_mpi() -> bool:
    """Whether Open MPI's launcher started this process."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ


def _said(*names: str) -> int | None:
    """The number in the first of these environment variables that holds one."""
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), None)


def mpi_has_begun() -> bool:
    """Whether MPI runs in this process: it has begun, and has not ended."""
    MPI = sys.modules.get("mpi4py.MPI")
    return MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized()


def begin_mpi() -> Any:
    """Import mpi4py's MPI, and begin with it where it is not begun; returns the module.

    Raises:
        WrongLauncher: MPI cannot be loaded, or is not the launcher's: N silent worlds of one process
            would be N runs that write the same files.
    """
    tasks = launched_tasks()
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # it is looked at first
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise WrongLauncher(
            f"a launcher started {tasks} processes, and MPI cannot be loaded: {reason}; install the "
            "launcher's MPI library, or name it in MPI4PY_LIBMPI"
        ) from error
    version = MPI.Get_library_version()
    library = " ".join(version.split(",")[0].splitlines()[0].split())
    ours = "Open MPI" in library
    if is_pmix_without_support(version):
        raise WrongLauncher(
            f"a launcher started {tasks} processes by PMIx, which {library} does not speak; {remedy(ours)}"
        )
    if takes_plugins_of_open_mpi_5(version):
        raise WrongLauncher(
            f"a launcher of Open MPI {os.environ['OMPI_VERSION']} started {tasks} processes, and mpi4py "
            f"has loaded {library}; {remedy(ours)}"
        )
    # its launchers leave marks; on anybody else's, beginning with MPI may end the process
    belongs = ours if under_open_mpi() else not ours or not _said("PMI_SIZE")
    if belongs and not MPI.Is_initialized():
        with progress.waiting("MPI_Init"):
            _init(MPI)
    known = MPI.COMM_WORLD.size if MPI.Is_initialized() else 1
    if known != tasks:
        raise WrongLauncher(
            f"a launcher started {tasks} processes, and MPI knows {known}: mpi4py has loaded "
            f"{library}, which this launcher does not belong to; {remedy(ours)}"
        )
    return MPI


def end_mpi(all_here: Callable[[], None]) -> None:
    """Wait for all ranks, and end MPI, if it has begun.

    mpi4py would end MPI after Python is gone. Then the watchdog's thread is gone, too, and nobody would see
    a rank that waits there.

    Args:
        all_here: called once all ranks have come to this place.
    """
    if not mpi_has_begun():
        return
    from mpi4py import MPI

    with progress.waiting("MPI_Finalize"):
        MPI.COMM_WORLD.Barrier()
        all_here()
        ctypes.CDLL(MPI.__file__).MPI_Finalize()


def _init(MPI: Any) -> None:
    """Begin with MPI, as mpi4py's Init_thread() does.

    Init_thread() holds Python's lock all the time. So the watchdog's thread could not see that this rank
    waits there for another one.
    """
    given = ctypes.c_int()
    ctypes.CDLL(MPI.__file__).MPI_Init_thread(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(given))
    for communicator in (MPI.COMM_SELF, MPI.COMM_WORLD):
        communicator.Set_errhandler(MPI.ERRORS_RETURN)  # errors become exceptions
