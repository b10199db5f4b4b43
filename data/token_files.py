"""Files of token ids, and where the type of their ids comes from.

.npy             numpy.save; the header has the type
.bin of llm.c    a header of 256 int32 has type and number
.bin and .idx    Megatron-LM; the index has the type
any other .bin   only ids: uint16, as nanoGPT writes them, or the type that --bin-dtype gives
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import DataError
from .sources import BLOCK_BYTES, Part, open_file

BIN_DTYPES = ("uint16", "uint32", "int32", "int64")
TOKEN_SUFFIXES = (".bin", ".npy")

_NUMPY_MAGIC = b"\x93NUMPY"
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
# Megatron-LM's codes for the types of ids, which follow its magic number and a version of 8 bytes
_MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
# llm.c's magic numbers: (version, type), for GPT-2's and for Llama 3's tokens
_LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
_LLMC_HEADER_BYTES = 1024
_TINY = (0, 15)  # upper halves of ids below 2^16, and below 2^20
_FEWEST = 16  # least number of words above a limit for which ids count as wider


class _Layout(NamedTuple):
    """The layout of a file.

    Attributes:
        dtype: of the ids.
        start: the byte where they begin.
        by: the header, index or option that says so, for messages.
    """

    dtype: np.dtype
    start: int
    by: str


class TokenFile:
    """A file of token ids: one document. nanoGPT's meta.pkl is never loaded.

    Args:
        path: the file.
        bin_dtype: one of BIN_DTYPES, for a .bin file that does not name its type; None: uint16, unless the
            ids look wider.

    Attributes:
        note: a line for the user, or None.

    Raises:
        DataError: it cannot be read, or its bytes do not fit the type of its ids.
    """

    def __init__(self, path: Path, bin_dtype: str | None = None) -> None:
        self.path, self.name, self.num_bytes = path, str(path), path.stat().st_size
        self.note: str | None = None
        with open_file(path) as file:
            block = file.read(BLOCK_BYTES)
        layout = self._says(block)
        if layout is None:
            if bin_dtype is None:
                _refuse_wider(path, block, self.num_bytes)
            layout = _Layout(np.dtype(bin_dtype or "uint16").newbyteorder("<"), 0, "--bin-dtype")
        elif bin_dtype not in (None, layout.dtype.name) and not block.startswith(_NUMPY_MAGIC):
            raise DataError(
                f"{path}: {layout.by} says that its ids are {layout.dtype.name}, and --bin-dtype "
                f"{bin_dtype}; leave --bin-dtype out"
            )
        self._dtype, self._start = layout.dtype, layout.start
        if (self.num_bytes - self._start) % self._dtype.itemsize:
            raise DataError(
                f"{path}: {self.num_bytes - self._start} bytes are not a whole number of "
                f"{self._dtype.name} tokens; give the type of its ids with --bin-dtype (or was it cut "
                "short?)"
            )

    def parts(self) -> Iterator[Part]:
        first = True
        with open_file(self.path) as file:
            file.seek(self._start)
            while block := file.read(BLOCK_BYTES):
                yield Part(first, None, np.frombuffer(block, self._dtype))
                first = False

    def _says(self, block: bytes) -> _Layout | None:
        """The layout according to the file itself, or to an index beside it; None: neither has one."""
        if block.startswith(_NUMPY_MAGIC):
            return _numpy_layout(self.path, self.num_bytes)
        if self.path.suffix.lower() == ".npy":
            raise DataError(f"{self.path}: not written by numpy.save, whatever its name says")
        return _llmc_layout(self.path, block, self.num_bytes) or self._megatron_layout()

    def _megatron_layout(self) -> _Layout | None:
        index = self.path.with_suffix(".idx")
        if not is_megatron_index(index):
            return None
        with open_file(index) as file:
            code = file.read(len(_MEGATRON_MAGIC) + 9)[-1]
        if code not in _MEGATRON_DTYPES:
            raise DataError(
                f"{index}: its type of ids, {code}, is not known, or is no integer type"
            )
        self.note = (
            f"{self.path}: the documents' ends in {index.name} are not used; if its ids hold no "
            "separator, documents run together"
        )
        return _Layout(np.dtype(_MEGATRON_DTYPES[code]).newbyteorder("<"), 0, index.name)


def is_megatron_index(path: Path) -> bool:
    """Whether a file is the index that Megatron-LM writes beside its tokens."""
    if path.suffix.lower() != ".idx" or not path.is_file():
        return False
    with open_file(path) as file:
        start = file.read(len(_MEGATRON_MAGIC) + 9)
    return start.startswith(_MEGATRON_MAGIC) and len(start) == len(_MEGATRON_MAGIC) + 9


def _numpy_layout(path: Path, num_bytes: int) -> _Layout:
    try:
        # a map, so that only the header is read
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as an array of NumPy: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path}: an array of {array.dtype.name} of shape {array.shape}, not a list of whole "
            "numbers; save the ids as one: numpy.save(path, ids.ravel().astype('uint32'))"
        )
    if array.offset + array.nbytes != num_bytes:
        raise DataError(
            f"{path}: {num_bytes - array.offset - array.nbytes} bytes follow the array; save all ids as "
            "one array"
        )
    return _Layout(array.dtype, array.offset, "its header")


def _llmc_layout(path: Path, block: bytes, num_bytes: int) -> _Layout | None:
    """The layout in llm.c's header; None: there is none. Reference: llm.c, dev/data/data_common.py."""
    if len(block) < _LLMC_HEADER_BYTES:
        return None
    magic, version, count = np.frombuffer(block, "<i4", 3).tolist()
    if magic not in _LLMC:
        return None
    known, name = _LLMC[magic]
    dtype = np.dtype(name).newbyteorder("<")
    if version != known:
        raise DataError(
            f"{path}: version {version} of llm.c's token files is not {known}, the known one"
        )
    expected = _LLMC_HEADER_BYTES + count * dtype.itemsize
    if num_bytes != expected:
        raise DataError(
            f"{path}: llm.c's header says {count} {name} tokens, {expected} bytes, but it has "
            f"{num_bytes}; get the file again"
        )
    return _Layout(dtype, _LLMC_HEADER_BYTES, "llm.c's header")


def _refuse_wider(path: Path, block: bytes, num_bytes: int) -> None:
    """Refuse ids of 32 or 64 bits that would be read as uint16.

    The upper half of a 32-bit id is 0 for ids below 2^16, and at most 15 for ids below 2^20. Let t be 0 or
    15. A file is refused if at least 16 of its first words are larger than t, and all of these stand at
    even places. In uint16 ids places mean nothing, so k such words all stand at even places with a
    probability of about 2^-k. That is at most 3e-5 in all, and 1e-300 for 1,000 words. It is different if
    every second id is the same, as with one letter on each line; the message says what to do then.
    """
    words = np.frombuffer(block[: len(block) // 4 * 4], "<u2")
    if num_bytes % 4 or not any(_only_at_even_places(words > tiny) for tiny in _TINY):
        return
    wide = num_bytes % 8 == 0 and not words[2::4].any() and not words[3::4].any()
    name, bits = ("int64", 64) if wide else ("uint32", 32)
    raise DataError(
        f"{path}: its ids look like {bits} bits each, not like uint16, which nanoGPT writes: the upper "
        f"halves of the first {words.nbytes:,} bytes are all tiny; give --bin-dtype {name}, or "
        "--bin-dtype uint16 if they are uint16 all the same"
    )


def _only_at_even_places(large: np.ndarray) -> bool:
    return bool(not large[1::2].any() and np.count_nonzero(large) >= _FEWEST)
