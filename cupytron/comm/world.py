"""All processes that a launcher started together."""

from cupytron.comm.alone import SelfCommunicator
from cupytron.comm.communicator import Communicator
from cupytron.launcher import begin_mpi, launched_tasks
from cupytron.process import share_cores


def open_world() -> Communicator:
    """The communicator of all processes; alone without a launcher, and then without MPI.

    In a script: `with open_world() as world:`, so that a rank that fails ends the others. Unless
    process.prepare or the environment has said how many threads BLAS may use, each rank of a node gets its
    share of the cores.

    Raises:
        CupytronError: MPI cannot be loaded, or does not know of the processes that were started.
    """
    if launched_tasks() == 1:
        return SelfCommunicator("world")
    begin_mpi()
    share_cores()
    from cupytron.comm.mpi import MPICommunicator

    return MPICommunicator()
