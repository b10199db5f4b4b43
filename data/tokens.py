"""Token ids in a file, read with plain reads."""

import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cupytron.durable import open_file

from .errors import DataError

BLOCK_TOKENS = 1 << 20


class FileTokens:
    """The ids in a file, as a read-only array with a length, a dtype, elements and slices.

    The file is not mapped into memory. If somebody shortens a mapped file, the next access ends the process
    with SIGBUS, without a message. A plain read that returns too few bytes raises an error with the file's
    name.

    The file stays open: if another file takes its name, the old one is still read.

    Args:
        path: a file of ids alone.
        dtype: of the ids in the file, with their byte order.

    Attributes:
        path, dtype: as given.
        num_bytes: the file's size when it was opened.

    Raises:
        DataError: the file cannot be read; each read may raise it.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        try:
            with open_file(path) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise DataError(f"{path}: cannot read: {error.strerror}") from error
        # the file is closed once, when nobody has this object any more
        weakref.finalize(self, os.close, self._file)
        self._seen = self._state()
        self.num_bytes = self._seen[0]

    def __len__(self) -> int:
        return self.num_bytes // self.dtype.itemsize

    def __getitem__(self, index: int | slice) -> Any:
        """An id, or the ids of a slice without steps as a new array."""
        if not isinstance(index, slice):
            at = range(len(self))[index]
            return self._read(at, at + 1)[0]
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice with step {step}; slices of a file have none")
        return self._read(start, max(start, stop))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def blocks(self) -> Iterator[np.ndarray]:
        """All ids, a block at a time."""
        for start in range(0, len(self), BLOCK_TOKENS):
            yield self[start : start + BLOCK_TOKENS]

    def touched(self) -> bool:
        """Whether the file's size or time of change has changed since the last call, or the opening."""
        before, self._seen = self._seen, self._state()
        return self._seen != before

    def _state(self) -> tuple[int, int]:
        """The file's bytes, and the time of its last change in nanoseconds."""
        try:
            found = os.fstat(self._file)
        except OSError as error:
            raise self._unreadable(error) from error
        return found.st_size, found.st_mtime_ns

    def _read(self, start: int, stop: int) -> np.ndarray:
        wanted, at = (stop - start) * self.dtype.itemsize, start * self.dtype.itemsize
        data = self._read_bytes(wanted, at)
        if len(data) < wanted:
            end, _ = self._state()  # the file may end long before `at`
            raise DataError(
                f"{self.path}: its bytes end at {end:,}, and had {self.num_bytes:,} when it was opened: "
                "the file was cut short while it was in use; prepare the data set again"
            )
        return np.frombuffer(data, self.dtype)

    def _read_bytes(self, count: int, at: int) -> bytes:
        """`count` bytes from byte `at` on, or fewer where the file ends."""
        try:
            data = os.pread(self._file, count, at)
            # one call reads at most 2 GiB
            while len(data) < count and (
                more := os.pread(self._file, count - len(data), at + len(data))
            ):
                data += more
        except OSError as error:
            raise self._unreadable(error) from error
        return data

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path}: cannot read: {error.strerror}; check that the file system is there, and start "
            "the same command again"
        )
