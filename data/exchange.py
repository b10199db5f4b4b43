"""Two names exchange what they stand for, in one step that nothing can cut in two."""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100  # paths are relative to the working folder
_RENAME_EXCHANGE = 2
# EPERM: a filter of system calls, as of containers; where it is a real one, a plain rename meets it too
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def exchange(a: Path, b: Path) -> bool:
    """Let two files or folders exchange their names; at every moment both names exist.

    Reference: renameat2(2) with RENAME_EXCHANGE, Linux 3.15.

    Returns: False where the system or the file system cannot do it; nothing has changed then.

    Raises:
        OSError: one of them is missing, or may not be renamed.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False  # a C library without it
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p) * 2 + (ctypes.c_uint,)
    names = os.fsencode(a), os.fsencode(b)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))
