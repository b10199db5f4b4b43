"""Reading on a file system that may fail for a moment, and beside a run that removes its checkpoints."""

import contextlib
import errno
import time
from collections.abc import Callable
from typing import TypeVar

from cupytron.errors import GoneCheckpoint

T = TypeVar("T")

# Errors that may pass, above all on a network file system: the file was replaced on the server, or the
# server did not answer.
_PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR)
_TRIES = 3
_PAUSE = 0.2  # seconds before the second try; each later pause is twice as long

CHOICES = 20  # checkpoints that are chosen in turn, since each may be removed before it is read
_BETWEEN = 0.05  # seconds between two choices


def again(work: Callable[[], T]) -> T:
    """Return work(), which is called up to three times if it raises an error that may pass.

    Raises:
        OSError: of the last call, or one that does not pass.
    """
    pause = _PAUSE
    for _ in range(_TRIES - 1):
        try:
            return work()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
        time.sleep(pause)
        pause *= 2
    return work()


def choosing_again(work: Callable[[], T]) -> T:
    """Return work(), which is called again if a run removes the checkpoint that it has chosen.

    Raises:
        GoneCheckpoint: of the last call; as many checkpoints as CHOICES were removed in turn.
    """
    for _ in range(CHOICES - 1):
        with contextlib.suppress(GoneCheckpoint):
            return work()
        time.sleep(_BETWEEN)
    return work()
