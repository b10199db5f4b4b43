"""Ranks as threads of one process: any mesh in a test, a notebook or a debugger, without mpirun.

Collectives are non-blocking underneath: a rank leaves a copy of its part and goes on; whoever waits takes
the parts of all ranks when the last one is there, and adds them in the order of the ranks.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from cupytron.comm.bookkeeping import CommunicationError
from cupytron.comm.communicator import Communicator
from cupytron.comm.half import ordered_sum
from cupytron.errors import CupytronError

TIMEOUT = 60.0  # seconds; a test's deadlock becomes a sentence


_SAME_SHAPE = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}


class _World:
    """What all groups of one run share: one lock, and the news that a rank has failed."""

    def __init__(self, timeout: float) -> None:
        self.changed = threading.Condition()
        self.failed: str | None = None
        self.timeout = timeout
        self.groups: dict[Any, _Group] = {}

    def wait_for(self, ready: Callable[[], object], what: Callable[[], str]) -> None:
        """Wait under the lock until ready(), a failure, or too long."""
        came = self.changed.wait_for(lambda: self.failed is not None or bool(ready()), self.timeout)
        if self.failed is not None and not ready():
            raise CommunicationError(f"{what()} ended because {self.failed}")
        if not came:
            raise CommunicationError(f"{what()} has waited {self.timeout:g} seconds")


class _Group:
    def __init__(self, world: _World, size: int) -> None:
        self.world, self.size = world, size
        # call number -> rank -> the operation that it called, and its part
        self.parts: dict[int, dict[int, tuple[str, Any]]] = {}
        self.taken: dict[int, int] = {}
        self.mail: dict[tuple[int, int], deque[Any]] = {}


class ThreadCommunicator(Communicator):
    """One rank of a group of threads; `run_ranks` makes them."""

    def __init__(self, group: _Group, rank: int, axis: str = "world") -> None:
        super().__init__(rank, group.size, axis)
        self._group = group
        self._number = 0  # of collective calls so far: all ranks count alike

    def split(self, color: int, key: int, axis: str) -> Communicator:
        number = self._number
        said = self._meet("split", (color, key, self.rank))()
        members = [rank for c, _, rank in sorted(said, key=lambda s: (s[1], s[2])) if c == color]
        world = self._group.world
        with world.changed:
            name = (id(self._group), number, color)
            group = world.groups.setdefault(name, _Group(world, len(members)))
        return ThreadCommunicator(group, members.index(self.rank), axis)

    def _meet(self, what: str, part: Any) -> Callable[[], list[Any]]:
        """Leave a part; the function returned waits for those of all ranks."""
        group, number = self._group, self._number
        self._number += 1
        world = group.world
        if what in _SAME_SHAPE:
            what = f"{what} of {part.shape} {part.dtype}"
        with world.changed:
            group.parts.setdefault(number, {})[self.rank] = what, part
            world.changed.notify_all()

        def others() -> list[int]:
            """Ranks that called something else."""
            return [r for r, (name, _) in group.parts[number].items() if name != what]

        def missing() -> str:
            absent = [r for r in range(self.size) if r not in group.parts[number]]
            return f"{what} on {self.axis}, waiting for rank {', '.join(map(str, absent))},"

        def wait() -> list[Any]:
            with world.changed:
                world.wait_for(lambda: len(group.parts[number]) == self.size or others(), missing)
                if different := others():
                    raise CommunicationError(
                        f"ranks of {self.axis} disagree: rank {self.rank} calls {what}, "
                        f"rank {min(different)} {group.parts[number][min(different)][0]}"
                    )
                parts = [group.parts[number][rank][1] for rank in range(self.size)]
                group.taken[number] = group.taken.get(number, 0) + 1
                if group.taken[number] == self.size:
                    del group.parts[number], group.taken[number]
            return parts

        return wait

    def _all_reduce(self, x: Any) -> Callable[[], None]:
        wait = self._meet("all_reduce", x.copy())

        return lambda: ordered_sum(wait(), x)

    def _all_gather(self, x: Any, out: Any, in_place: bool) -> Callable[[], None]:
        wait = self._meet("all_gather", x.copy())

        def finish() -> None:
            for rank, part in enumerate(wait()):
                out[rank * len(x) : (rank + 1) * len(x)] = part

        return finish

    def _reduce_scatter(self, x: Any, out: Any) -> Callable[[], None]:
        wait = self._meet("reduce_scatter", x.copy())
        mine = slice(self.rank * len(out), (self.rank + 1) * len(out))

        return lambda: ordered_sum([part[mine] for part in wait()], out)

    def _all_to_all(self, x: Any, out: Any) -> Callable[[], None]:
        wait = self._meet("all_to_all", x.copy())
        n = len(x) // self.size

        def finish() -> None:
            for rank, part in enumerate(wait()):
                out[rank * n : (rank + 1) * n] = part[self.rank * n : (self.rank + 1) * n]

        return finish

    def _broadcast(self, x: Any, root: int) -> None:
        parts = self._meet("broadcast", x.copy() if self.rank == root else None)()
        x[...] = parts[root]

    def _barrier(self) -> None:
        self._meet("barrier", None)()

    def _gather_objects(self, value: Any) -> list[Any]:
        return self._meet("gather_objects", value)()

    def _send(self, x: Any, to: int, buffered: bool) -> Callable[[], None]:
        world = self._group.world
        with world.changed:
            self._group.mail.setdefault((self.rank, to), deque()).append(x.copy())
            world.changed.notify_all()
        return lambda: None

    def _recv(self, out: Any, source: int) -> Callable[[], None]:
        world, mail = self._group.world, self._group.mail

        def wait() -> None:
            with world.changed:
                world.wait_for(
                    lambda: bool(mail.get((source, self.rank))),
                    lambda: f"recv on {self.axis}, waiting for rank {source},",
                )
                came = mail[source, self.rank].popleft()
            self._take(came, out, source)

        return wait


def run_ranks(
    size: int, body: Callable[[Communicator], Any], timeout: float = TIMEOUT
) -> list[Any]:
    """Run body(communicator) on `size` ranks, each a thread; returns their results.

    Raises:
        CupytronError: size is not at least 1.
        the first error of a rank; the others are ended.
    """
    if size < 1:
        raise CupytronError(f"{size} ranks: give at least 1")
    world = _World(timeout)
    group = _Group(world, size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(ThreadCommunicator(group, rank))
        except BaseException as error:
            with world.changed:
                errors.append(error)
                if world.failed is None:
                    world.failed = f"rank {rank} failed: {type(error).__name__}: {error}"
                world.changed.notify_all()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
