"""A checkpoint's manifest: its content, the seal that proves it whole, and reading it without NumPy.

The manifest is the file that is written last. Its body is any JSON object; the seal is the body's SHA-256,
and the file is refused if a single byte of it is not what we would have written.
"""

import errno
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from cupytron.errors import DamagedCheckpoint, UnreadableCheckpoint

MANIFEST = "manifest.json"
MAX_BYTES = 64 << 20  # a larger one is no manifest of ours
# errors of a moment, as a network file system has them: the file behind the name was replaced on the
# server, or the server did not answer
_PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR)
_TRIES = 3
_PAUSE = 0.2  # seconds before the second try; each later pause is twice as long


class Manifest(NamedTuple):
    """A manifest that is whole.

    body: what it says. sha256: of the body. identity: of the file, (inode, time of change in ns, bytes):
    two ranks with the same identity look at the same file, not at two copies of it.
    """

    body: dict[str, Any]
    sha256: str
    identity: tuple[int, int, int]


def seal(body: dict[str, Any]) -> bytes:
    """A manifest's content: its body, and the body's hash."""
    return json.dumps({"body": body, "sha256": body_hash(body)}, indent=1).encode()


def body_hash(body: dict[str, Any]) -> str:
    """SHA-256 of a manifest's body, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        DamagedCheckpoint: it is missing, or it is not what we would have written.
        UnreadableCheckpoint: the system cannot read it, even when asked again.
    """
    path = folder / MANIFEST
    try:
        content, identity = read_again(path)
        if len(content) > MAX_BYTES:
            raise DamagedCheckpoint(f"{folder}: {MANIFEST} is too large to be one")
        sealed = json.loads(content)
        body = sealed["body"]
        # byte for byte what we would have written: no change, however small, goes unseen
        whole = seal(body) == content and sealed["sha256"] == body_hash(body)
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{folder}: {MANIFEST} is missing: not a complete checkpoint"
        ) from None
    except DamagedCheckpoint:
        raise
    except OSError as error:
        raise UnreadableCheckpoint(
            f"{folder}: {MANIFEST} cannot be read ({error.strerror})"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} is damaged") from None
    if not whole:
        raise DamagedCheckpoint(
            f"{folder}: {MANIFEST} is damaged: it does not match its own SHA-256"
        )
    return Manifest(body, sealed["sha256"], identity)


def read_again(path: Path) -> tuple[bytes, tuple[int, int, int]]:
    """A file's content, at most MAX_BYTES + 1 bytes of it, and its identity.

    An error of a moment is not believed at once: the file is read up to three times.

    Raises:
        OSError: the last error, if it stays.
    """
    pause = _PAUSE
    for left in reversed(range(_TRIES)):
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            if not left or error.errno not in _PASSING:
                raise
            time.sleep(pause)
            pause *= 2
        else:
            return content, (status.st_ino, status.st_mtime_ns, status.st_size)
    raise AssertionError
