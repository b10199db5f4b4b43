"""Reads the files of a checkpoint. An error says whether they are damaged, unreadable or gone.

A checkpoint is damaged only if its own files prove it. It may also be unreadable for now, or a run that
trains at the same time may have removed or replaced it.
"""

import contextlib
import functools
import hashlib
import os
import re
import weakref
from collections.abc import Callable, Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cupytron import progress
from cupytron.checkpoint_format import MAX_HEADER, Listed, end_of, header_of, listed, parse_header
from cupytron.durable import NotAFile, open_file
from cupytron.errors import (
    CheckpointError,
    DamagedCheckpoint,
    GoneCheckpoint,
    UnreadableCheckpoint,
)
from cupytron.manifest import MANIFEST, Manifest, identity_of, read_manifest
from cupytron.piece_table import PieceTable, merged, table_of
from cupytron.reading import again

T = TypeVar("T")

_NAME = re.compile(r"rank-[0-9]{5,}\.safetensors")
_BLOCK = 1 << 22  # bytes of values read at a time
_MOST_HELD = 64  # files that are kept open at once; a process may open about a thousand
_HASHED = 1 << 18  # bytes hashed at a time: they stay in the processor's cache


class _Entry(NamedTuple):
    """The manifest's entry for a file.

    Attributes:
        name: the file's name.
        bytes: its size.
        sha256: of all of it.
        header: SHA-256 of its beginning, up to the first value.
        pieces: the pieces in it; None: the file lists them itself.
    """

    name: str
    bytes: int
    sha256: str
    header: str
    pieces: list[Listed] | None


class CheckpointFiles:
    """The files that a manifest names, numbered in its order: 0 ... len - 1.

    Each method opens the files that it reads, unless `hold` has opened all of them.

    Raises:
        DamagedCheckpoint, UnreadableCheckpoint, GoneCheckpoint: from each method, as their names say.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.sha256, self.identity = manifest.sha256, manifest.identity
        body = manifest.body
        try:
            self._entries = _entries_1(body) if body["format"] == 1 else _entries_2(body)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.damaged(f"{MANIFEST} has a missing or wrong entry: {error}") from None
        self._held: dict[str, BufferedReader] = {}  # open files by their names

    def hold(self) -> None:
        """Open all files now, if they are few, so that they can be read after the checkpoint is removed.

        Otherwise a run that saves often could remove each checkpoint before a reader has read it.
        """
        if self._held or len(self._entries) > _MOST_HELD:
            return
        files: dict[str, BufferedReader] = {}
        for entry in self._entries:
            # a second descriptor stays open
            files[entry.name] = self._with_file(
                entry, lambda file: open(os.dup(file.fileno()), "rb")
            )
            weakref.finalize(self, files[entry.name].close)
        self.check_still_there()
        self._held = files

    def __len__(self) -> int:
        return len(self._entries)

    def damaged(self, what: str) -> DamagedCheckpoint:
        """An error that names the checkpoint, and says what is damaged."""
        return DamagedCheckpoint(f"{self.folder}: {what}")

    def table(self, numbers: Iterable[int]) -> PieceTable:
        """The pieces of these files, from their headers, which are compared with the manifest's hashes."""
        return self._tables(numbers, self._head)

    def verify(self, numbers: Iterable[int]) -> PieceTable:
        """Compare these files with the manifest, byte for byte; returns the pieces in them."""
        return self._tables(numbers, self._verified_head)

    def read(self, number: int, offset: int, out: np.ndarray) -> None:
        """Fill an array from a file.

        Args:
            number: of the file.
            offset: the byte where the values begin.
            out: one-dimensional and contiguous.
        """
        entry = self._entries[number]
        # in blocks, since a single read returns 2 GiB at most
        view = out.view(np.uint8).data

        def fill(file: BufferedReader) -> None:
            file.seek(offset)
            for at in range(0, len(view), _BLOCK):
                block = view[at : at + _BLOCK]
                if file.readinto(block) != len(block):
                    raise self.damaged(f"{entry.name} ends too early: it has been cut")
                progress.beat()

        self._with_file(entry, fill)

    def check_still_there(self) -> None:
        """Raise GoneCheckpoint if the checkpoint was removed or replaced.

        Files that are held can still be read.
        """
        if self._held:
            return
        with contextlib.suppress(OSError):
            if identity_of(os.stat(self.folder / MANIFEST)) == self.identity:
                return
        if (error := self._gone()) is not None:
            raise error

    def _gone(self) -> CheckpointError | None:
        """Why the files may no longer be the manifest's; None: the same manifest is still there."""
        try:
            now = read_manifest(self.folder)
        except (GoneCheckpoint, UnreadableCheckpoint) as error:
            return error
        except DamagedCheckpoint:
            return None
        if now.sha256 != self.sha256:
            return GoneCheckpoint(f"{self.folder}: was replaced while it was read")
        self.identity = now.identity  # the same manifest in another file, such as a copy
        return None

    def _with_file(self, entry: _Entry, work: Callable[[BufferedReader], T]) -> T:
        """Return work(file); if it fails, raise the CheckpointError that the failure proves."""

        def opened() -> T:
            if entry.name in self._held:
                self._held[entry.name].seek(0)
                return work(self._held[entry.name])
            with open_file(self.folder / entry.name, follow=False) as file:
                return work(file)

        try:
            return again(opened)
        except (FileNotFoundError, NotADirectoryError):
            problem: CheckpointError = self.damaged(f"{entry.name} is missing")
        except NotAFile:
            problem = self.damaged(f"{entry.name} is missing: something else has its name")
        except OSError as error:
            problem = UnreadableCheckpoint(
                f"{self.folder}: {entry.name} cannot be read ({error.strerror or error})"
            )
        except DamagedCheckpoint as error:
            problem = error
        # files that are held were the manifest's when they were opened
        raise (None if self._held else self._gone()) or problem

    def _tables(
        self, numbers: Iterable[int], head_of: Callable[[_Entry, BufferedReader], bytes]
    ) -> PieceTable:
        """The pieces of these files; head_of(entry, file) reads a file's beginning, and checks it."""
        tables = []
        for number in numbers:
            entry = self._entries[number]
            head = self._with_file(entry, functools.partial(head_of, entry))
            try:
                if entry.pieces is None:
                    pieces, offsets = parse_header(head)
                else:
                    # the hash of the header has proved that these are its pieces
                    pieces, offsets = entry.pieces, header_of(entry.pieces, with_list=False)[1]
                if pieces and end_of(pieces[-1], offsets[-1]) != entry.bytes:
                    raise ValueError("its pieces end elsewhere than the file")
                tables.append(table_of(number, pieces, offsets))
            except ValueError as error:
                raise self.damaged(f"{entry.name} is damaged: {error}") from None
        try:
            return merged(tables)
        except ValueError as error:
            raise self.damaged(f"{error}") from None

    def _head(self, entry: _Entry, file: BufferedReader) -> bytes:
        """The beginning of a file: the eight bytes of the header's length, and the header."""
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise self.damaged(f"{entry.name} has {size} bytes in place of {entry.bytes}")
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER:
            raise self.damaged(f"{entry.name} is damaged: its header is too large")
        head = start + file.read(length)
        if hashlib.sha256(head).hexdigest() != entry.header:
            raise self.damaged(f"{entry.name} is damaged: its header does not match its SHA-256")
        return head

    def _verified_head(self, entry: _Entry, file: BufferedReader) -> bytes:
        head = self._head(entry, file)
        digest, block, done = hashlib.sha256(head), memoryview(bytearray(_HASHED)), len(head)
        while count := file.readinto(block):
            digest.update(block[:count])
            done += count
            progress.count(done, entry.bytes, "bytes")
        if digest.hexdigest() != entry.sha256:
            raise self.damaged(f"{entry.name} is damaged: it does not match its SHA-256")
        return head


def _entries_2(body: dict[str, Any]) -> list[_Entry]:
    return [
        _Entry(_name(name), _size(f["bytes"]), str(f["sha256"]), str(f["header"]), None)
        for name, f in body["files"].items()
    ]


def _entries_1(body: dict[str, Any]) -> list[_Entry]:
    """Format 1: the manifest lists the pieces of all files, each file's in their order."""
    of_file: dict[str, list[Listed]] = {name: [] for name in body["files"]}
    for p in body["pieces"]:
        pieces = of_file[p["file"]]
        pieces.append(listed(p["tensor"], p["shape"], p["dtype"], p["box"], p["range"]))
        if p["key"] != f"{len(pieces) - 1:06d}/{p['tensor']}":
            raise ValueError(f"a piece of {p['tensor']}")
    entries = []
    for name, f in body["files"].items():
        head, _ = header_of(of_file[name], with_list=False)
        header = hashlib.sha256(head).hexdigest()
        entries.append(
            _Entry(_name(name), _size(f["bytes"]), str(f["sha256"]), header, of_file[name])
        )
    return entries


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a file's name: {name!r}")
    return name


def _size(value: Any) -> int:
    if type(value) is not int or value < 8:
        raise ValueError(f"a file's size: {value!r}")
    return value
