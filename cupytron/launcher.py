"""What a launcher's environment variables say of this process, before and without MPI."""

import os
import re


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


def _said(*names: str) -> int | None:
    """The number in the first of these environment variables that holds one."""
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), None)
