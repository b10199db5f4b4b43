"""A thread that ends the job when a rank is stuck: a rank that hangs says nothing by itself.

A rank is stuck if it waits for nobody and does no piece of work (`progress.beat`) for the timeout, or if
its process gives no sign of life (signs.py). A rank that waits for others is not stuck: they may be at
work, however slowly. If all ranks wait, and none has done a piece of work for the timeout, they wait for
each other. See docs/decisions/0012-watchdog.md.
"""

import contextlib
import faulthandler
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from cupytron import progress
from cupytron.failing import abort
from cupytron.launcher import named
from cupytron.printable import printable
from cupytron.signs import Address, Sign, Signs

STUCK = 66  # exit code: no progress for too long
DEFAULT_TIMEOUT = 600.0  # seconds, until the settings are known
PATIENCE = 10  # timeouts that a single call without beats, such as an fsync, may take
_LATER = 1.0  # seconds that a waiting rank leaves the others, so that they report first
_SKEW = (
    4.0  # more seconds at the start, in MPI_Init and in MPI_Finalize: not all ranks come at once
)


class _Other:
    """What this rank knows of another one; times are sums of this process's ticks."""

    def __init__(self, sign: Sign) -> None:
        self.sign = sign
        self.idle = 0.0  # seconds without a beat
        self.silent = 0.0  # seconds without a sign

    def hear(self, sign: Sign) -> None:
        self.silent = 0.0
        if sign.beats != self.sign.beats:
            self.idle = 0.0
        self.sign = sign

    def __str__(self) -> str:
        return f"rank {self.sign.rank} on {self.sign.host} ({self.sign.where})"


class Watchdog:
    """Ends the job with exit code 66 if a rank is stuck.

    Args:
        timeout: seconds without progress; 0: never. It may be changed while the watchdog is at work.
        rank: this process's rank.
        size: ranks of the job.

    Attributes:
        has_met: whether signs are exchanged with all ranks, not only with those of this machine.
        quiet: set while this rank ends the job for another reason, which may take its time.
    """

    def __init__(self, timeout: float, rank: int, size: int) -> None:
        self.timeout, self.rank, self.size = timeout, rank, size
        self.signs: Signs | None = None
        self.has_met = False
        self.quiet = False
        self._others: dict[int, _Other] = {}
        self._beats, self._idle = -1, 0.0
        self._over = threading.Event()
        # a daemon thread does not keep the process from ending
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch, at first with the ranks of this machine."""
        self.signs = Signs.of_neighbours(self.rank, self.size)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()

    def look(self, tick: float, received: list[Sign]) -> str | None:
        """Count the last `tick` seconds, and look for a stuck rank.

        Ticks are counted, and no clock is read. So the time in which this process was itself stopped, by a
        debugger or the scheduler, does not count as silence of others.

        Args:
            tick: seconds since the last call.
            received: the signs that arrived in them.

        Returns: why the job has to end; None if no rank is stuck.
        """
        beats = progress.beats()
        self._idle = self._idle + tick if beats == self._beats else 0.0
        self._beats = beats
        for other in self._others.values():
            other.idle, other.silent = other.idle + tick, other.silent + tick
        for sign in received:
            self._others.setdefault(sign.rank, _Other(sign)).hear(sign)
        return self._stuck() if self.timeout and not self.quiet else None

    def _stuck(self) -> str | None:
        me = f"({progress.where()})"
        # all ranks may see the same: lower ranks wait less, so that one speaks and ends the job
        patience = min(4.0, _LATER + 0.4 * self.rank)
        if not progress.waits_for():
            limit = self.timeout * (PATIENCE if progress.slow() else 1)
            # while a module is imported, its own code gives no beats
            if self._idle >= limit + (0.0 if self.has_met else _SKEW):
                return f"no progress for {limit:g} seconds {me}"
        for other in self._others.values():
            if other.silent >= self.timeout + (patience if self.rank else 0.0):
                return (
                    f"no progress for {self.timeout:g} seconds {me}: no sign of life from {other}; it is "
                    "stopped, or cannot be reached"
                )
        if progress.waits_for() and self._waits_in_vain(patience):
            others = ", ".join(map(str, self._others.values()))
            all_wait = f": all ranks wait: {others}" if others else ""
            return f"no progress for {self.timeout:g} seconds {me}{all_wait}"
        return None

    def _waits_in_vain(self, patience: float) -> bool:
        """Whether this rank has waited too long, and no other rank is known to be at work."""
        judges = self.rank == 0 or not (self.signs and self.signs.first_answers)
        if len(self._others) < (self.size - 1 if judges else 1):
            # some ranks have given no sign yet, and may be stopped
            skew = _SKEW if progress.waits_for() in progress.MPI_ITSELF else 0.0
            return self._idle >= self.timeout + patience + skew
        if not judges:
            return False  # rank 0 answers, and has the signs of all ranks
        idle = all(o.sign.waits_for and o.idle >= self.timeout for o in self._others.values())
        return idle and self._idle >= self.timeout + (patience if self.rank else 0.0)

    def _watch(self) -> None:
        host, heard = socket.gethostname(), self.signs
        while not self._over.is_set():
            tick = min(1.0, self.timeout / 8) if self.timeout else 1.0
            signs, received = self.signs, []
            if signs is not heard:
                heard, self._others = signs, {}
            if signs is None:
                self._over.wait(tick)
            else:
                place = progress.waits_for(), progress.where()
                own_sign = Sign(self.rank, host, progress.beats(), *place)
                try:
                    received = signs.exchange(own_sign, tick)
                except (OSError, ValueError):  # the main thread has closed it
                    self._over.wait(tick)
            if not self._over.is_set() and (stuck := self.look(tick, received)):
                self._bite(stuck)

    def _bite(self, stuck: str) -> None:
        with contextlib.suppress(Exception):
            line = (
                f"error: {named(self.rank)}: {stuck}; if it was only slow, give a longer --timeout "
                f"(parallel.timeout={self.timeout:g}); the stacks of this rank's threads follow"
            )
            sys.stderr.write(printable(line) + "\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        abort(STUCK)

    def meet(self, world: Any) -> None:
        """Begin to exchange signs of life with the other ranks. Collective."""
        self.has_met = True
        progress.follow(world)
        signs = Signs(self.rank)
        first = world.gather_objects(tuple(signs.address()))[0]
        signs.meet(Address(*first))
        self._exchange_through(signs)

    def part(self) -> None:
        """Exchange no more signs: all ranks are about to end, and silence means nothing now."""
        self._exchange_through(None)

    def _exchange_through(self, signs: Signs | None) -> None:
        before, self.signs = self.signs, signs
        if before is not None:
            before.close()


_dog: Watchdog | None = None  # of this process


def start(timeout: float, rank: int, size: int) -> Watchdog:
    """Watch this process, which a launcher has started, from now on; returns its watchdog.

    Args:
        timeout: seconds without progress; 0: never. A command may change it later.
        rank: this process's rank.
        size: ranks of the job.
    """
    global _dog
    _dog = Watchdog(timeout, rank, size)
    progress.count_files()
    _dog.start()
    return _dog


def here() -> Watchdog | None:
    """This process's watchdog, if it has one."""
    return _dog


@contextlib.contextmanager
def watching(timeout: float, world: Any) -> Iterator[None]:
    """Watch this rank and the others of its job inside this context. Collective over `world`.

    A process of the command line has a watchdog from its first moment on: it gets this timeout, and goes
    on watching after the context. A script has a watchdog inside the context only.

    Args:
        timeout: seconds without progress; 0: never.
        world: all ranks of the job.
    """
    global _dog
    running = _dog
    dog = running or start(timeout, world.rank, world.size)
    dog.timeout = timeout
    if not dog.has_met:
        dog.meet(world)
    try:
        yield
    finally:
        if running is None:
            dog.stop()
            dog.part()
            _dog = None
