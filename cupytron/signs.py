"""Signs of life between the watchdogs of a job: each rank tells rank 0 how it is, and rank 0 answers.

The signs are UDP datagrams, not MPI messages: they have to arrive while a rank is stuck inside MPI, and
with any level of thread support. Where a network lets no UDP through, no sign arrives, and each watchdog
knows of its own process only. Before MPI has begun, no rank knows rank 0's address. Then the ranks of one
machine tell each other, through Unix sockets whose names each of them can work out.
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
    """The state of a rank.

    Attributes:
        rank: the rank.
        host: its machine's name.
        beats: pieces of work that it has done.
        waits_for: what it waits for; "": it waits for nobody.
        where: its step and phase, for messages.
    """

    rank: int
    host: str
    beats: int
    waits_for: str
    where: str


class Address(NamedTuple):
    """Where a rank listens.

    Attributes:
        token: a random word in each datagram of this job, which keeps out those of other jobs.
        port: the UDP port.
        node: an identifier of its machine.
        hosts: the machine's name and IPv4 addresses.
    """

    token: str
    port: int
    node: str
    hosts: list[str]


class Signs:
    """This rank's end of an exchange.

    Args:
        rank: this process's rank.
        family: AF_INET for all ranks of a job, AF_UNIX for those of one machine.
        token: the word in this job's datagrams; "": a random one.

    Attributes:
        first_answers: whether the other ranks send to rank 0 only, which answers; else all send to all.
    """

    def __init__(self, rank: int, family: int = socket.AF_INET, token: str = "") -> None:
        self.rank, self.first_answers = rank, family == socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._token = token or secrets.token_hex(8)
        # where signs go: to all of rank 0's addresses, until one answers
        self._places: list[Any] = []
        if self.first_answers:
            self._socket.bind(("", 0))

    @classmethod
    def of_neighbours(cls, rank: int, size: int) -> "Signs | None":
        """An exchange among the ranks of this machine, for the time before MPI has begun.

        Args:
            rank: this process's rank.
            size: ranks of the job.

        Returns: None if the launcher's process is not found, or its sockets cannot be had.
        """
        if (launcher := launcher_pid()) is None:
            return None
        with contextlib.suppress(OSError):
            began = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
            job = f"cupytron-{os.getuid()}-{launcher}-{began}"
            # abstract names (unix(7)) are in no folder, and vanish with their process
            names = [f"\0{job}-{other}" for other in range(size)]
            signs = cls(rank, socket.AF_UNIX, job)
            signs._socket.bind(names[rank])
            signs._places = [name for name in names if name != names[rank]]
            return signs
        return None

    def address(self) -> Address:
        """Where this rank listens; the others need rank 0's."""
        return Address(self._token, self._socket.getsockname()[1], _node(), _hosts())

    def meet(self, first: Address) -> None:
        """Send signs to rank 0 from now on, at this address."""
        if self.rank:
            here = ["127.0.0.1"] if first.node == _node() else []
            self._places = [(host, first.port) for host in [*here, *first.hosts]]
            self._token = first.token

    def exchange(self, mine: Sign, seconds: float) -> list[Sign]:
        """Send this rank's sign, and listen for a while.

        Args:
            mine: this rank's sign.
            seconds: how long to listen.

        Returns: the signs that arrived.

        Raises:
            OSError: this end has been closed meanwhile.
        """
        message = json.dumps([self._token, *mine]).encode()
        for place in self._places:
            self._send(message, place)
        until, signs = time.monotonic() + seconds, []
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            received = self._receive()
            if received is None:
                continue
            sign, sender = received
            signs.append(sign)
            if self.first_answers and self.rank:
                self._places = [sender]
            elif self.first_answers:
                self._send(message, sender)
        return signs

    def close(self) -> None:
        """Close the socket: this end sends and receives no more."""
        self._socket.close()

    def _send(self, message: bytes, place: Any) -> None:
        # A host's name may be unknown here, and a neighbour may not have begun, or may have ended. The
        # queue of a stopped neighbour fills up, and this rank must not wait for it. MSG_DONTWAIT does not
        # help: if a socket has a timeout, Python waits for room in the queue itself.
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):
            self._socket.sendto(message, place)

    def _receive(self) -> tuple[Sign, Any] | None:
        """A sign and its sender; None: nothing arrived in time, or it was not of this job."""
        try:
            message, sender = self._socket.recvfrom(_LARGEST)
            token, *fields = json.loads(message)
            sign = Sign(*fields)
        except (OSError, ValueError, TypeError):
            return None
        return (sign, sender) if token == self._token else None


def _node() -> str:
    """An identifier of this machine, the same for all its processes."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _hosts() -> list[str]:
    """This machine's name, and the IPv4 addresses of its interfaces; loopback is left out."""
    found = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
                found.append(socket.inet_ntoa(answer[20:24]))
    return [host for host in dict.fromkeys(found) if not host.startswith("127.")]
