"""All processes that a launcher started together."""

from cupytron.comm.alone import SelfCommunicator
from cupytron.comm.communicator import Communicator
from cupytron.launcher import begin_mpi, launched_tasks


def open_world() -> Communicator:
    """The communicator of all processes; alone without a launcher, and then without MPI.

    Raises:
        CupytronError: MPI cannot be loaded, or does not know of the processes that were started.
    """
    if launched_tasks() == 1:
        return SelfCommunicator("world")
    begin_mpi()
    from cupytron.comm.mpi import MPICommunicator

    return MPICommunicator()
