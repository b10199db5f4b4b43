"""Communicators and the mesh that they form."""

from cupytron.comm.communicator import (
    CommunicationError,
    Communicator,
    Handle,
    SelfCommunicator,
)
from cupytron.comm.mesh import ParallelContext
from cupytron.comm.thread import ThreadCommunicator, run_ranks

__all__ = [
    "CommunicationError",
    "Communicator",
    "Handle",
    "ParallelContext",
    "SelfCommunicator",
    "ThreadCommunicator",
    "run_ranks",
]
