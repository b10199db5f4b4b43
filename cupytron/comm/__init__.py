"""Communicators and the mesh that they form."""

from cupytron.comm.alone import SelfCommunicator
from cupytron.comm.bookkeeping import CommunicationError, Handle
from cupytron.comm.choice import choose
from cupytron.comm.communicator import Communicator
from cupytron.comm.gpu import GPUCommunicator
from cupytron.comm.mesh import ParallelContext
from cupytron.comm.thread import ThreadCommunicator, run_ranks
from cupytron.comm.world import open_world

__all__ = [
    "CommunicationError",
    "Communicator",
    "GPUCommunicator",
    "Handle",
    "ParallelContext",
    "SelfCommunicator",
    "ThreadCommunicator",
    "choose",
    "open_world",
    "run_ranks",
]
