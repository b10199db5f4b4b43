"""Files and names that survive a crash: content and folders written through to the disk, names exchanged.

It imports the standard library and progress.py alone, so that `data/` may use it too.
"""

import ctypes
import errno
import os
from pathlib import Path
from typing import IO, Any

from cupytron import progress

_AT_FDCWD = -100  # a path that is not absolute begins at the working directory
_RENAME_EXCHANGE = 2
# EPERM: a container's filter of system calls answers so to calls that it does not know. If permission is
# really missing, the ordinary renames that follow fail with the same error.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file through to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        sync(file)


def sync(file: IO[Any]) -> None:
    """Write an open file's content through to the disk."""
    file.flush()
    with progress.patiently(f"in the fsync of {file.name}"):
        os.fsync(file.fileno())


def synced(path: Path) -> None:
    """Write a file's content, or a folder's list of names, through to the disk.

    Raises:
        OSError: with the path, which the error of fsync lacks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with progress.patiently(f"in the fsync of {path}"):
            os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Write a folder's list of names through to the disk, where the file system syncs folders at all."""
    try:
        synced(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def sync_parents(path: Path) -> None:
    """Write the names of a folder and of the folders above it through to the disk.

    A power cut takes a new folder, with everything in it, while its parent's list of names is in memory
    only. The walk ends at the file system's root, or at a folder that this user may not read, since this
    user has made neither.
    """
    path = path.resolve()
    device = path.stat().st_dev
    for parent in path.parents:
        try:
            if parent.stat().st_dev != device:
                return
            sync_folder(parent)
        except PermissionError:
            return


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once: at no moment is either of them missing.

    See renameat2(2), RENAME_EXCHANGE. Linux alone has this call, and not on every file system (not on NFS).

    Returns: False, with nothing changed, if the system or the file system cannot.

    Raises:
        OSError: any other error, such as a name that is not there.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    renameat2.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    )
    names = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def way_out(error: OSError) -> str:
    """What to do about an error of writing, to be followed by a place."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "let this user write"
    if error.errno == errno.EFBIG:
        return "raise the limit of a file's size (ulimit -f)"
    return "make room"
