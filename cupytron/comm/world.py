"""All processes that a launcher started together."""

from cupytron.comm.alone import SelfCommunicator
from cupytron.comm.communicator import Communicator
from cupytron.errors import CupytronError
from cupytron.launcher import begin_mpi, launched_tasks
from cupytron.process import share_cores
from cupytron.versions import Program, host, running


def open_world() -> Communicator:
    """The communicator of all processes; alone without a launcher, and then without MPI.

    In a script: `with open_world() as world:`, so that a rank that fails ends the others. Unless
    process.prepare or the environment has said how many threads BLAS may use, each rank of a node gets its
    share of the cores.

    Raises:
        CupytronError: MPI cannot be loaded, or does not know of the processes that were started; or a rank
            runs another version of cupytron or NumPy.
    """
    if launched_tasks() == 1:
        return SelfCommunicator("world")
    begin_mpi()
    share_cores()
    from cupytron.comm.mpi import MPICommunicator

    world = MPICommunicator()
    check_same_program(world)
    return world


def check_same_program(world: Communicator) -> None:
    """Refuse ranks with another cupytron or NumPy than rank 0: they compute other numbers. Collective.

    Raises:
        CupytronError: a rank differs; it names the first such rank and its machine, the same on every rank.
    """
    own = Program(host(), running())
    said = world.gather_objects(own)
    # a version that compares nothing says something else here
    strange = [rank for rank, other in enumerate(said) if not isinstance(other, Program)]
    if strange:
        raise CupytronError(
            f"rank {strange[0]} runs another version of cupytron than rank {world.rank} on {own.host}, "
            f"which has {own.versions['cupytron']}; install the same version on every machine"
        )
    (first_host, first), *others = said
    for rank, (other_host, other) in enumerate(others, start=1):
        lines = [
            f"{name} {other[name]}, rank 0 has {first[name]}"
            for name in first
            if other[name] != first[name]
        ]
        if lines:
            raise CupytronError(
                f"rank {rank} on {other_host} has {'; '.join(lines)} on {first_host}; install the same "
                "version on every machine"
            )
