"""All processes that a launcher started together."""

import warnings

from cupytron.comm.alone import SelfCommunicator
from cupytron.comm.communicator import Communicator
from cupytron.errors import CupytronError
from cupytron.launcher import launched_tasks


def open_world() -> Communicator:
    """The communicator of all processes; alone without a launcher, and then without MPI.

    Raises:
        CupytronError: MPI cannot be loaded, or does not know of the processes that were started.
    """
    tasks = launched_tasks()
    if tasks == 1:
        return SelfCommunicator("world")
    try:
        with warnings.catch_warnings():
            # of another library's launcher: said below, and not once a process
            warnings.simplefilter("ignore", RuntimeWarning)
            from mpi4py import MPI

            from cupytron.comm.mpi import MPICommunicator
    except (ImportError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise CupytronError(
            f"a launcher started {tasks} processes, and MPI cannot be loaded: {reason}; install the "
            "launcher's MPI library, or name it in MPI4PY_LIBMPI"
        ) from error
    world = MPICommunicator()
    if world.size != tasks:
        library = MPI.Get_library_version().split(",")[0].splitlines()[0].strip()
        raise CupytronError(
            f"a launcher started {tasks} processes, and MPI knows {world.size}: mpi4py has loaded "
            f"{library}, which this launcher does not belong to; start with that library's own "
            "mpirun, or name the launcher's library in MPI4PY_LIBMPI"
        )
    return world
