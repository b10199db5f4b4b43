"""Reads and writes files so that a crash at any moment loses nothing, and strangers' files do no harm.

Content and folders are written through to the disk, and names are exchanged. Only regular files are opened,
since a pipe or a device may wait for ever. Nothing is written through a link to another place.

It imports the standard library and progress.py alone, so that `data/` may use it too.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import IO, Any, BinaryIO

from cupytron import progress

_AT_FDCWD = -100  # a path that is not absolute begins at the working directory
_RENAME_EXCHANGE = 2
# EPERM: a container's filter of system calls answers so to calls that it does not know. If permission is
# really missing, the ordinary renames that follow fail with the same error.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


class NotAFile(OSError):
    """A folder, a pipe or a device stands where a file should."""


def open_file(path: str | Path, follow: bool = True) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: of the file.
        follow: whether the name may be a link to the file.

    Raises:
        NotAFile: it is not a regular file.
        OSError: it is not there, cannot be opened, or is a link that is not to be followed.
    """
    _check_regular(path)
    if not follow:
        _check_no_link(path)
    return open(path, "rb", opener=_opener(follow))


def open_in_place(path: Path) -> BufferedRandom:
    """Open a regular file for reading and appending; a missing one is made, and no link is followed.

    Raises:
        NotAFile: it is not a regular file.
        OSError: it cannot be opened, or is a link.
    """
    _check_no_link(path)
    if path.exists():
        _check_regular(path)
    return open(path, "a+b", opener=_opener(follow=False))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file's new content; at the end it takes the file's name.

    A reader sees the old content or the new. If a link has the name, the link is replaced. After an error
    the file is as it was. A kill leaves .NAME.RANDOM.tmp, which `left_by_replacing` finds.

    Raises:
        NotAFile: a folder, a pipe or a device has the name, such as /dev/null.
        OSError: as the system says.
    """
    if path.exists():
        _check_regular(path)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # x: nobody else has made this file, and it is no link
        with open(new, "xb") as file:
            yield file
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def left_by_replacing(path: Path) -> list[Path]:
    """Files that killed processes left beside a file while they replaced it.

    Args:
        path: of the file; its name may be a pattern.
    """
    # earlier versions made .NAME.tmp
    ends = ("tmp", f"{'[0-9a-f]' * 8}.tmp")
    return [left for end in ends for left in path.parent.glob(f".{path.name}.{end}")]


def _check_regular(path: str | Path) -> None:
    """Refuse a path that is not a regular file, since opening a pipe or a device may wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NotAFile(errno.EINVAL, "is not a file", str(path))


def _check_no_link(path: str | Path) -> None:
    if os.path.islink(path):
        what = "is a link, which is not followed; put the file itself there"
        raise OSError(errno.ELOOP, what, str(path))


def _opener(follow: bool) -> Callable[[str, int], int]:
    """An `opener` of `open`: a pipe or a link may have taken the name since it was checked."""
    # for files O_NONBLOCK changes nothing
    more = os.O_NONBLOCK if follow else os.O_NONBLOCK | os.O_NOFOLLOW
    return lambda path, flags: os.open(path, flags | more, 0o666)


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file through to the disk."""
    with open(path, "xb") as file:
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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of an open file, which do not name it, have its path as their filename."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def way_out(error: OSError) -> str:
    """The remedy for an error of writing; the caller adds the place."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "let this user write"
    if error.errno == errno.EFBIG:
        return "raise the limit of a file's size (ulimit -f)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room"
    return "look at what is wrong"
