"""From sources and a tokenizer to the files of a prepared folder, in blocks."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from cupytron.durable import naming, sync

from .dataset import FORMAT, Sidecar, read_blocks
from .encoder import Encoder
from .errors import DataError
from .sources import BLOCK_BYTES, Source
from .tokenizers import Tokenizer


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        train: the content of train.json.
        val: the content of val.json.
        notes: lines for the user.
    """

    train: Sidecar
    val: Sidecar
    notes: list[str]


def write_dataset(
    folder: Path,
    sources: list[Source],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    val_fraction: float,
    names: list[str],
    report: Callable[[str], None],
) -> Written:
    """Write the files of a prepared folder; the sidecars come last."""
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    separator = tokenizer.separator if tokenizer else None
    report("encoding")
    train_path, val_path = folder / "train.bin", folder / "val.bin"
    with naming(train_path), open(train_path, "wb") as file:
        writer = _Writer(file, dtype, separator)
        encoder = Encoder(tokenizer, vocab_size)
        for first, ids in encoder.encode(sources):
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
        file_of_tokenizer = folder / "tokenizer.json"
        with naming(file_of_tokenizer):
            tokenizer.save(file_of_tokenizer)
    report("counting")
    lengths = encoder.check.lengths if encoder.check else None
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
        with naming(path.with_suffix(".json")):
            sidecar.write(path.with_suffix(".json"))
        sidecars.append(sidecar)
    train, val = sidecars
    notes = encoder.notes() + _separator_notes(tokenizer, writer.documents)
    if val_fraction and val.tokens < 2:
        notes.append(
            f"the validation split has {val.tokens} token{'s' * (val.tokens != 1)}, and a loss needs 2; "
            "give a larger --val-fraction or more text"
        )
    return Written(train, val, notes)


def _separator_notes(tokenizer: Tokenizer | None, documents: int) -> list[str]:
    if tokenizer is None or tokenizer.separator is not None or documents < 2:
        return []
    way_out = (
        "byte and bpe:SIZE have one"
        if tokenizer.kind == "char"
        else "name one of its tokens with --separator TOKEN"
    )
    return [
        f"the {documents:,} documents run together: this {tokenizer.kind} tokenizer has no separator "
        f"to stand between them; {way_out}"
    ]


class _Writer:
    """Appends documents to a token file, with one separator between two that have text."""

    def __init__(self, file: BinaryIO, dtype: str, separator: int | None) -> None:
        self.count = 0
        self._file = file
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._separator = separator
        self.documents = 0  # that have ids
        self._last = -1
        self._first = False

    def write(self, first: bool, ids: np.ndarray) -> None:
        """Append the next ids, and a separator before them if they start another document.

        Args:
            first: whether they start a document.
            ids: (num_tokens,).
        """
        # the first part of a document may have no ids
        self._first |= first
        if not ids.size:
            return
        separator = self._separator
        # a .bin file may bring its own separator along
        own = separator in (self._last, int(ids[0]))
        if self._first and self.count and separator is not None and not own:
            self._append(np.array([separator]))
        self.documents += self._first
        self._first = False
        self._append(ids)

    def _append(self, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self._dtype).tobytes())
        self.count += ids.size
        self._last = int(ids[-1])


def _move_tail(path: Path, tail_path: Path, size: int) -> None:
    """Cut a file to `size` bytes and write the rest to another."""
    with naming(path), open(path, "r+b") as file:
        file.seek(size)
        with naming(tail_path), open(tail_path, "wb") as tail:
            shutil.copyfileobj(file, tail, BLOCK_BYTES)
            sync(tail)
        file.truncate(size)
        sync(file)


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
