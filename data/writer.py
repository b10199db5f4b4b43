"""From sources and a tokenizer to the files of a prepared folder, in blocks."""

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from .dataset import FORMAT, Sidecar, check_ids, read_blocks
from .errors import DataError
from .sources import BLOCK_BYTES, Part, Source, documents
from .token_files import TokenFile
from .tokenizers import Tokenizer

_BATCH_PIECES = 4096
_BATCH_CHARACTERS = 1 << 18


def write_dataset(
    folder: Path,
    sources: list[Source],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    val_fraction: float,
    names: list[str],
    report: Callable[[str], None],
) -> tuple[Sidecar, Sidecar]:
    """Write the files of a prepared folder; the sidecars come last."""
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    separator = tokenizer.separator if tokenizer else None
    report("encoding")
    train_path, val_path = folder / "train.bin", folder / "val.bin"
    with open(train_path, "wb") as file:
        writer = _Writer(file, dtype, separator)
        for first, ids in _encode(sources, tokenizer, vocab_size):
            writer.write(first, ids)
    if not writer.count:
        no_text(sources)
    num_train = int(writer.count * (1 - val_fraction))
    if not num_train:
        raise DataError(
            f"{writer.count} tokens in all leave none to train on with val_fraction={val_fraction}; "
            "give more text or a smaller fraction"
        )
    _move_tail(train_path, val_path, num_train * np.dtype(dtype).itemsize)
    if tokenizer:
        tokenizer.save(folder / "tokenizer.json")
    report("counting")
    lengths = tokenizer.text_lengths() if tokenizer else None
    sidecars = []
    for path in (train_path, val_path):
        num_tokens, num_bytes, sha256 = _count(path, dtype, lengths)
        sidecar = Sidecar(
            format=FORMAT,
            dtype=dtype,
            tokens=num_tokens,
            bytes=num_bytes,
            vocab_size=vocab_size,
            separator=separator,
            tokenizer=tokenizer.kind if tokenizer else None,
            tokenizer_hash=tokenizer.hash if tokenizer else None,
            sha256=sha256,
            sources=names,
        )
        sidecar.write(path.with_suffix(".json"))
        sidecars.append(sidecar)
    return sidecars[0], sidecars[1]


class _Writer:
    """Appends documents to a token file, with one separator between two that have text."""

    def __init__(self, file: BinaryIO, dtype: str, separator: int | None) -> None:
        self.count = 0
        self._file = file
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._separator = separator
        self._last = -1

    def write(self, first: bool, ids: np.ndarray) -> None:
        if not ids.size:
            return
        separator = self._separator
        # a .bin file may bring its own separator along
        if first and self.count and separator is not None and self._last != separator:
            self._append(np.array([separator]))
        self._append(ids)

    def _append(self, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self._dtype).tobytes())
        self.count += ids.size
        self._last = int(ids[-1])


def _encode(
    sources: list[Source], tokenizer: Tokenizer | None, vocab_size: int
) -> Iterator[tuple[bool, np.ndarray]]:
    """The ids of each piece, and whether it starts a document."""
    for is_tokens, group in itertools.groupby(
        sources, lambda source: isinstance(source, TokenFile)
    ):
        if is_tokens:
            for source in group:
                position = 0
                for part in source.parts():
                    assert part.ids is not None
                    check_ids(part.ids, vocab_size, source.name, position)
                    position += part.ids.size
                    yield part.first, part.ids
            continue
        assert tokenizer is not None
        parts = itertools.chain.from_iterable(source.parts() for source in group)
        for batch in _batches(_pieces(parts, tokenizer)):
            ids = tokenizer.encode_batch([text for _, text in batch])
            yield from zip((first for first, _ in batch), ids, strict=True)


def _pieces(parts: Iterable[Part], tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """Each document cut where the tokenizer wants it."""
    for document in documents(parts):
        first = True
        for text in tokenizer.cut(document):
            yield first, text
            first = False


def _batches(pieces: Iterable[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    """Groups of pieces: the tokenizers library encodes those of a group at once, on threads."""
    batch: list[tuple[bool, str]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _move_tail(path: Path, tail_path: Path, size: int) -> None:
    """Cut a file to `size` bytes and write the rest to another."""
    with open(path, "r+b") as file, open(tail_path, "wb") as tail:
        file.seek(size)
        shutil.copyfileobj(file, tail, BLOCK_BYTES)
        file.truncate(size)
        for each in (file, tail):
            each.flush()
            os.fsync(each.fileno())


def _count(path: Path, dtype: str, lengths: np.ndarray | None) -> tuple[int, int | None, str]:
    """Tokens in a file, bytes of text behind them, and the file's SHA-256."""
    num_tokens = num_bytes = 0
    digest = hashlib.sha256()
    for block in read_blocks(path, dtype):
        digest.update(block.data)
        num_tokens += block.size
        num_bytes += 0 if lengths is None else int(lengths[block].sum())
    return num_tokens, None if lengths is None else num_bytes, digest.hexdigest()


def no_text(sources: list[Source]) -> NoReturn:
    raise DataError(f"{sources[0].name}: no text in the sources; give files that are not empty")
