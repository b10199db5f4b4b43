"""A thread that ends the job when a rank is stuck: a rank that hangs says nothing by itself.

A rank is stuck if it waits for nobody and does no piece of work (`progress.beat`) for the timeout, or if
its process gives no sign of life (signs.py). A rank that waits for others is not stuck: they may be at
work, however slowly. If all ranks wait, and none has done anything for the timeout, they wait for each
other.
See docs/decisions/0012-watchdog.md.
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
from cupytron.signs import Address, Sign, Signs

STUCK = 66  # exit code: no progress for too long
DEFAULT_TIMEOUT = 600.0  # seconds, until the settings are known
PATIENCE = 10  # timeouts that a call gets which tells nothing meanwhile, such as an fsync
_LATER = 1.0  # seconds that a rank which waits for others leaves them to speak first
_SKEW = 4.0  # more of them at the start, and where MPI begins and ends: ranks come there at different times


class _Other:
    """What is known of another rank, counted in seconds of this process's ticks."""

    def __init__(self, sign: Sign) -> None:
        self.sign = sign
        self.idle = 0.0  # without a beat
        self.silent = 0.0  # without a sign

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
        rank, size: of this process, and how many there are.
    """

    def __init__(self, timeout: float, rank: int, size: int) -> None:
        self.timeout, self.rank, self.size = timeout, rank, size
        self.signs: Signs | None = None
        self.has_met = False  # all ranks of the job, not only those of this machine
        self.quiet = False  # this rank ends the job itself: it is given the time
        self._others: dict[int, _Other] = {}
        self._beats, self._idle = -1, 0.0
        self._over = threading.Event()
        # a daemon: it must not keep a process that ends
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch, at first with the ranks of this machine."""
        self.signs = Signs.of_neighbours(self.rank, self.size)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._over.set()

    def look(self, tick: float, came: list[Sign]) -> str | None:
        """What is known after another `tick` seconds, in which these signs came: who is stuck, or None.

        Ticks are counted, and no clock is read. So time in which this process was stopped, in a debugger or
        by its scheduler, is not held against anybody.
        """
        beats = progress.beats()
        self._idle = self._idle + tick if beats == self._beats else 0.0
        self._beats = beats
        for other in self._others.values():
            other.idle, other.silent = other.idle + tick, other.silent + tick
        for sign in came:
            self._others.setdefault(sign.rank, _Other(sign)).hear(sign)
        return self._stuck() if self.timeout and not self.quiet else None

    def _stuck(self) -> str | None:
        me = f"({progress.where()})"
        # all ranks may find the same: the first of them ends the job, and is the only one that speaks
        patience = min(4.0, _LATER + 0.4 * self.rank)
        if not progress.waits_for():
            limit = self.timeout * (PATIENCE if progress.slow() else 1)
            # while modules are loaded, what they build tells nothing
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
        """Whether this rank has waited too long for others that, as far as is known, are not at work."""
        judges = self.rank == 0 or not (self.signs and self.signs.first_answers)
        if len(self._others) < (self.size - 1 if judges else 1):
            # nothing is known of some, and they may be stopped
            skew = _SKEW if progress.waits_for() in progress.MPI_ITSELF else 0.0
            return self._idle >= self.timeout + patience + skew
        if not judges:
            return False  # rank 0 is there, and knows more
        idle = all(o.sign.waits_for and o.idle >= self.timeout for o in self._others.values())
        return idle and self._idle >= self.timeout + (patience if self.rank else 0.0)

    def _watch(self) -> None:
        host, heard = socket.gethostname(), self.signs
        while not self._over.is_set():
            tick = min(1.0, self.timeout / 8) if self.timeout else 1.0
            signs, came = self.signs, []
            if signs is not heard:
                heard, self._others = signs, {}
            if signs is None:
                self._over.wait(tick)
            else:
                place = progress.waits_for(), progress.where()
                mine = Sign(self.rank, host, progress.beats(), *place)
                try:
                    came = signs.exchange(mine, tick)
                except (OSError, ValueError):  # it has been closed meanwhile
                    self._over.wait(tick)
            if not self._over.is_set() and (stuck := self.look(tick, came)):
                self._bite(stuck)

    def _bite(self, stuck: str) -> None:
        with contextlib.suppress(Exception):
            sys.stderr.write(
                f"error: rank {self.rank}: {stuck}; if it was only slow, give a longer --timeout "
                f"(parallel.timeout={self.timeout:g}); the stacks of this rank's threads follow\n"
            )
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
        """The others are about to end, too: their silence means nothing any more."""
        self._exchange_through(None)

    def _exchange_through(self, signs: Signs | None) -> None:
        before, self.signs = self.signs, signs
        if before is not None:
            before.close()


_dog: Watchdog | None = None  # of this process


def start(timeout: float, rank: int, size: int) -> Watchdog:
    """Watch this process from now on, which a launcher has started; a timeout of 0 may change later."""
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
    """Watch this rank with the others of a job, with this timeout from now on. Collective over `world`.

    The command line has a watchdog from its first moment on, which goes on afterwards; a script has one
    while this lasts.
    """
    global _dog
    found = _dog
    dog = found or start(timeout, world.rank, world.size)
    dog.timeout = timeout
    if not dog.has_met:
        dog.meet(world)
    try:
        yield
    finally:
        if found is None:
            dog.stop()
            dog.part()
            _dog = None
