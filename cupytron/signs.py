"""Signs of life between the watchdogs of a job: each rank tells rank 0 how it is, and rank 0 answers.

They are UDP datagrams, not MPI messages: they have to come through while a rank is stuck inside MPI, and
whatever threads the MPI library allows. Where a network lets none through, nothing comes, and the watchdog
knows of its own process only. Before MPI has begun no rank knows rank 0's address: then all ranks of one
machine tell each other, through sockets with names that they can guess.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

from cupytron.launcher import launcher_pid

_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address
_LARGEST = 4096  # bytes of a datagram


class Sign(NamedTuple):
    """How a rank is: pieces of work done, what it waits for ("": nobody), and where it is, for messages."""

    rank: int
    host: str
    beats: int
    waits_for: str
    where: str


class Address(NamedTuple):
    """Where rank 0 listens. token: what this job's datagrams begin with."""

    token: str
    port: int
    node: str
    hosts: list[str]


class Signs:
    """This rank's end of an exchange.

    Attributes:
        first_answers: whether the others talk to rank 0 alone, which answers; else all talk to all.
    """

    def __init__(self, rank: int, family: int = socket.AF_INET, token: str = "") -> None:
        self.rank, self.first_answers = rank, family == socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._token = token or secrets.token_hex(8)
        self._places: list[Any] = []  # where signs are sent; of rank 0 all, until one has answered
        if self.first_answers:
            self._socket.bind(("", 0))

    @classmethod
    def of_neighbours(cls, rank: int, size: int) -> "Signs | None":
        """Among the ranks of this machine, before MPI is there; None: no launcher's process is found."""
        if (launcher := launcher_pid()) is None:
            return None
        with contextlib.suppress(OSError):
            began = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
            job = f"cupytron-{os.getuid()}-{launcher}-{began}"
            # a name that begins with a zero byte is in no folder, and goes with its process
            names = [f"\0{job}-{other}" for other in range(size)]
            signs = cls(rank, socket.AF_UNIX, job)
            signs._socket.bind(names[rank])
            signs._places = [name for name in names if name != names[rank]]
            return signs
        return None

    def address(self) -> Address:
        """Where this rank listens, for all others if it is rank 0."""
        return Address(self._token, self._socket.getsockname()[1], _node(), _hosts())

    def meet(self, first: Address) -> None:
        """Learn rank 0's address."""
        if self.rank:
            here = ["127.0.0.1"] if first.node == _node() else []
            self._places = [(host, first.port) for host in [*here, *first.hosts]]
            self._token = first.token

    def exchange(self, mine: Sign, seconds: float) -> list[Sign]:
        """Send this rank's sign, listen for so long, and return the signs that came.

        Raises:
            OSError: this end has been closed meanwhile.
        """
        message = json.dumps([self._token, *mine]).encode()
        for place in self._places:
            self._send(message, place)
        until, signs = time.monotonic() + seconds, []
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            came = self._receive()
            if came is None:
                continue
            sign, sender = came
            signs.append(sign)
            if self.first_answers and self.rank:
                self._places = [sender]
            elif self.first_answers:
                self._send(message, sender)
        return signs

    def close(self) -> None:
        """Send and hear nothing any more."""
        self._socket.close()

    def _send(self, message: bytes, place: Any) -> None:
        # a host name may be unknown here, and a neighbour not there yet, or not any more; one that is
        # stopped takes no more at some time, and must not be waited for
        with contextlib.suppress(OSError):
            self._socket.sendto(message, socket.MSG_DONTWAIT, place)

    def _receive(self) -> tuple[Sign, Any] | None:
        """A sign and its sender; None: it was not of this job."""
        try:
            message, sender = self._socket.recvfrom(_LARGEST)
            token, *fields = json.loads(message)
            sign = Sign(*fields)
        except (OSError, ValueError, TypeError):
            return None
        return (sign, sender) if token == self._token else None


def _node() -> str:
    """The same for all processes of a machine."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _hosts() -> list[str]:
    """This machine's name, and the addresses of its interfaces."""
    found = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
                found.append(socket.inet_ntoa(answer[20:24]))
    return [host for host in dict.fromkeys(found) if not host.startswith("127.")]
