"""Reading files of a folder that anybody may have changed, on a file system that may fail for a moment."""

import errno
import os
import stat
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Errors that may pass, above all on a network file system: the file was replaced on the server, or the
# server did not answer.
_PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR)
_TRIES = 3
_PAUSE = 0.2  # seconds before the second try; each later pause is twice as long


class NotAFile(OSError):
    """A folder, a pipe or a device stands where a file should."""


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; a pipe or a device is not opened, since that may wait for ever.

    Raises:
        NotAFile: it is something else.
        OSError: it is not there, or cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NotAFile(errno.EINVAL, "is not a file", str(path))
    return open(path, "rb", opener=_without_waiting)


def _without_waiting(path: str, flags: int) -> int:
    # a pipe may have taken the name since the check; for files O_NONBLOCK changes nothing
    return os.open(path, flags | os.O_NONBLOCK)


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
