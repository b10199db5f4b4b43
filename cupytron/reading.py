"""Reading on a file system that may fail for a moment."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Errors that may pass, above all on a network file system: the file was replaced on the server, or the
# server did not answer.
_PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR)
_TRIES = 3
_PAUSE = 0.2  # seconds before the second try; each later pause is twice as long


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
