"""A checkpoint's manifest: its content, the seal that proves it whole, and reading it without NumPy.

The manifest is the last file to be written. Its body is any JSON object; the seal is the body's SHA-256.
The file is refused if a single byte of it is not what we would have written.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from cupytron.durable import NotAFile, open_file
from cupytron.errors import DamagedCheckpoint, GoneCheckpoint, UnreadableCheckpoint
from cupytron.reading import again

MANIFEST = "manifest.json"
MAX_BYTES = 64 << 20  # `write` refuses to write more


class Manifest(NamedTuple):
    """A manifest that is whole.

    Attributes:
        body: the JSON object.
        sha256: of the body, in hexadecimal digits.
        identity: of the file: (inode, time of change in ns, bytes). Two ranks with the same identity look
            at the same file, not at two copies of it.
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
        UnreadableCheckpoint: the system cannot read it, even when asked again, or it is too large.
        GoneCheckpoint: there is no such folder.
    """
    try:
        content, identity = again(lambda: _read(folder / MANIFEST))
        sealed = json.loads(content)
        body = sealed["body"]
        # the file must be byte for byte what we would have written, so that every change is found
        whole = seal(body) == content and sealed["sha256"] == body_hash(body)
        whole = whole and isinstance(body, dict)
    except FileNotFoundError:
        if not os.path.lexists(folder):
            raise GoneCheckpoint(f"{folder}: there is no such checkpoint") from None
        raise DamagedCheckpoint(
            f"{folder}: {MANIFEST} is missing: not a complete checkpoint"
        ) from None
    except (NotAFile, NotADirectoryError):
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} is missing: it is not a file") from None
    except OSError as error:
        raise UnreadableCheckpoint(
            f"{folder}: {MANIFEST} cannot be read ({error.strerror})"
        ) from None
    except UnreadableCheckpoint:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} is damaged") from None
    if not whole:
        raise DamagedCheckpoint(
            f"{folder}: {MANIFEST} is damaged: it does not match its own SHA-256"
        )
    return Manifest(body, sealed["sha256"], identity)


def _read(path: Path) -> tuple[bytes, tuple[int, int, int]]:
    """The content of a manifest's file, and the file's identity."""
    with open_file(path, follow=False) as file:
        status = os.fstat(file.fileno())
        if status.st_size > MAX_BYTES:
            # earlier versions wrote such files for very large jobs: it is no damage
            raise UnreadableCheckpoint(
                f"{path.parent}: {MANIFEST} has {status.st_size} bytes; at most {MAX_BYTES} can be read"
            )
        content = file.read(MAX_BYTES + 1)
    return content, identity_of(status)


def identity_of(status: os.stat_result) -> tuple[int, int, int]:
    """A file's identity, as in Manifest."""
    return status.st_ino, status.st_mtime_ns, status.st_size
