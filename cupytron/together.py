"""Work that succeeds on all ranks or fails on all, and finding the ranks that see the same thing.

A failure on one rank becomes the same error on each.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from cupytron.comm import CommunicationError, Communicator
from cupytron.errors import CupytronError
from cupytron.launcher import named

T = TypeVar("T")


class _Failure(NamedTuple):
    """What a rank tells of its error: an exception itself may not travel between processes."""

    rank: str  # as it is named in messages
    kind: type[CupytronError] | None  # None: OSError if there is an errno, else a bug
    errno: int | None
    text: str
    filename: str | None

    def everywhere(self) -> Exception:
        if self.kind is not None:
            return self.kind(f"{self.rank}: {self.text}")
        if self.errno is not None:
            return OSError(self.errno, f"{self.rank}: {self.text}", self.filename)
        return CommunicationError(f"ended because {self.rank} failed: {self.text}")


def together(world: Communicator, work: Callable[[], T]) -> T:
    """This rank's work(); returns once all ranks' have returned. Collective.

    A rank that fails would leave the others waiting in their next collective. So errors are exchanged
    first, and every rank raises that of the first rank that failed. With one rank it is work() alone.

    Raises:
        CupytronError, OSError: of the same kind and with the same message on every rank; the message
            names the rank that failed. A bug keeps its traceback on its own rank.
    """
    if world.size == 1:
        return work()
    mine: Exception | None = None
    try:
        result = work()
    except CommunicationError:
        raise  # there is nobody to tell
    except Exception as error:
        mine = error
    failures = world.gather_objects(None if mine is None else _told(world.rank, mine))
    for rank, failure in enumerate(failures):
        if failure is None:
            continue
        if rank == world.rank and failure.kind is None and failure.errno is None:
            assert mine is not None
            raise mine
        raise failure.everywhere() from mine
    return result


def alike(world: Communicator, key: object) -> list[int]:
    """The ranks that have this rank's key, in order. Collective.

    Such ranks can share work that is to be done once for each key, such as hashing a file they all see.

    Args:
        world: the ranks.
        key: a value that is compared with ==, and can be pickled.
    """
    return [rank for rank, other in enumerate(world.gather_objects(key)) if other == key]


def _told(rank: int, error: Exception) -> _Failure:
    name = named(rank)
    if isinstance(error, CupytronError):
        return _Failure(name, type(error), None, str(error), None)
    if isinstance(error, OSError) and error.errno is not None:
        filename = None if error.filename is None else str(error.filename)
        return _Failure(name, None, error.errno, error.strerror or str(error), filename)
    return _Failure(name, None, None, f"{type(error).__name__}: {error}", None)
