"""Knows which launcher belongs to which MPI library, and makes the messages about it."""

import os
import re

_SRUN = "srun --mpi=pmi2 for MPICH, srun --mpi=pmix for Open MPI"


def remedy(open_mpi: bool) -> str:
    """How to start processes that have loaded this library.

    Args:
        open_mpi: whether it is Open MPI; if not, MPICH or one of its relatives.
    """
    if "SLURM_STEP_ID" not in os.environ:
        return (
            "start with that library's own mpirun, or name the launcher's library in MPI4PY_LIBMPI"
        )
    kind, name = ("pmix", "Open MPI") if open_mpi else ("pmi2", "MPICH")
    return (
        f"under Slurm {name} is started by srun --mpi={kind} (srun --mpi=list shows the choices), or by "
        "its own mpirun inside sbatch; or name another library in MPI4PY_LIBMPI"
    )


def is_pmix_without_support(library: str) -> bool:
    """Whether the launcher speaks PMIx only, and MPICH was built without PMIx. Then MPI_Init aborts.

    Args:
        library: what MPI.Get_library_version() says; for MPICH it has the options that it was built with.
    """
    speaks_pmi = any(name in os.environ for name in ("PMI_RANK", "PMI_FD", "PMI_PORT"))
    is_mpich = library.startswith("MPICH")
    return (
        is_mpich and "PMIX_RANK" in os.environ and not speaks_pmi and "pmix" not in library.lower()
    )


def takes_plugins_of_open_mpi_5(library: str) -> bool:
    """Whether the launcher, Open MPI 5 or later, points an older library to its own plugins.

    Then MPI_Init aborts, since there are no plugins of the library's version. A launcher that does not know
    where it is installed does not set OPAL_PREFIX. Then MPI_Init makes each process a world of its own.

    Args:
        library: what MPI.Get_library_version() says.
    """
    launcher, own = os.environ.get("OMPI_VERSION", ""), re.match(r"Open MPI v([0-4])\.", library)
    return own is not None and bool(launcher) and "OPAL_PREFIX" in os.environ


def lone_process_in_allocation() -> str | None:
    """A warning where Slurm has given several tasks, and no launcher has started this process."""
    tasks = os.environ.get("SLURM_NTASKS", "")
    started_by_srun = "SLURM_STEP_NUM_TASKS" in os.environ  # srun -n1 was asked for
    if started_by_srun or not tasks.isdecimal() or int(tasks) < 2:
        return None
    return (
        f"Slurm has given this job {tasks} tasks, and this is one process on one of them; to use all, "
        f"put srun before the command ({_SRUN}), or the library's own mpirun"
    )
