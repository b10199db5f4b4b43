"""What `prepare` reads: text files, folders, .jsonl files and nanoGPT's .bin files, in blocks.

A document is a run of parts, each a block of text or of token ids; text is kept byte for byte (line
ends and byte order marks too).
"""

import codecs
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from .errors import DataError

BLOCK_BYTES = 1 << 20
_LONGEST_LINE = 256 << 20


class Part(NamedTuple):
    """A block of a document.

    Attributes:
        first: whether it starts a document.
        text: the text, or None.
        ids: the token ids (uint16), where there is no text.
    """

    first: bool
    text: str | None
    ids: np.ndarray | None = None


class Source(Protocol):
    """Something to read again and again: `parts` starts from the beginning each time."""

    name: str
    num_bytes: int  # on disk: how long it will take, roughly

    def parts(self) -> Iterator[Part]: ...


class TextFile:
    """A UTF-8 file: one document."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.num_bytes = path, str(path), path.stat().st_size

    def parts(self) -> Iterator[Part]:
        first = True
        for text in _decode(self.path):
            yield Part(first, text)
            first = False


class JsonLines:
    """A .jsonl file: a document a line, in one field of its object. Blank lines are passed over."""

    def __init__(self, path: Path, field: str) -> None:
        self.path, self.name, self.num_bytes = path, str(path), path.stat().st_size
        self._field = field

    def parts(self) -> Iterator[Part]:
        with _open(self.path) as file:
            number = 0
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip() and (text := self._text(line, number)):
                    yield Part(True, text)

    def _text(self, line: bytes, number: int) -> str:
        where = f"{self.path}, line {number}"
        if len(line) > _LONGEST_LINE:
            raise DataError(
                f"{where}: longer than {_LONGEST_LINE:,} bytes; is it one object a line?"
            )
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 at byte {error.start}; convert the file") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); mend or remove the line") from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: {type(value).__name__}, not an object with a text field")
        if self._field not in value:
            fields = ", ".join(map(repr, list(value)[:8])) or "none"
            raise DataError(
                f"{where}: no field {self._field!r}; its fields: {fields}; choose one with --text-field"
            )
        text = value[self._field]
        if not isinstance(text, str):
            raise DataError(
                f"{where}: field {self._field!r} is {type(text).__name__}, not text; choose another "
                "with --text-field"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {text[error.start]!a} in field {self._field!r} is half a surrogate "
                "pair and no character; mend or remove the line"
            ) from None
        return text


class TokenFile:
    """A .bin file as nanoGPT writes it: little-endian uint16 ids. Its meta.pkl is never loaded."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.num_bytes = path, str(path), path.stat().st_size
        if self.num_bytes % 2:
            raise DataError(
                f"{path}: {self.num_bytes} bytes is no whole number of uint16 tokens; only nanoGPT's "
                "uint16 .bin files can be read (was it cut short?)"
            )

    def parts(self) -> Iterator[Part]:
        first = True
        with _open(self.path) as file:
            while block := file.read(BLOCK_BYTES):
                yield Part(first, None, np.frombuffer(block, "<u2"))
                first = False


def documents(parts: Iterable[Part]) -> Iterator[Iterator[str]]:
    """The texts of each document; each is to be read before the next is asked for."""
    number = 0

    def document(part: Part) -> int:
        nonlocal number
        number += part.first
        return number

    for _, group in itertools.groupby(parts, document):
        yield (part.text for part in group if part.text is not None)


@dataclass(frozen=True)
class Skipped:
    """Files of a folder that were passed over."""

    folder: Path
    files: list[Path]

    def __str__(self) -> str:
        count = len(self.files)
        files = f"{count} files that are" if count > 1 else "1 file that is"
        first = self.files[0].relative_to(self.folder)
        return f"{self.folder}: skipped {files} not UTF-8 text ({'first: ' * (count > 1)}{first})"


def open_path(path: Path, text_field: str, exclude: Path) -> tuple[list[Source], Skipped | None]:
    """The sources behind a path: one for a file; for a folder one for each file, in sorted order.

    Hidden files and folders are passed over, and so are links to folders and the path `exclude` (where
    the output goes).

    Raises:
        DataError: nothing can be read there.
    """
    if path.is_dir():
        return _open_folder(path, text_field, exclude)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not path.is_file():
        raise DataError(
            f"{path}: not a regular file; sources are read twice, so write it to a file"
        )
    return [_source(path, text_field)], None


def _source(path: Path, text_field: str) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".bin":
        return TokenFile(path)
    return JsonLines(path, text_field) if suffix == ".jsonl" else TextFile(path)


def _open_folder(
    folder: Path, text_field: str, exclude: Path
) -> tuple[list[Source], Skipped | None]:
    sources: list[Source] = []
    skipped = []
    for path in walk(folder, exclude):
        if path.suffix.lower() != ".bin" and is_text(path):
            sources.append(_source(path, text_field))
        else:
            skipped.append(path)
    if not sources:
        raise DataError(f"{folder}: no UTF-8 text files in this folder; give .bin files by name")
    return sources, Skipped(folder, skipped) if skipped else None


def walk(folder: Path, exclude: Path, skip_folders: Iterable[str] = ()) -> Iterator[Path]:
    """The regular files below a folder, in the same order on every machine."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot list: {error.strerror}") from error

    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in skip_folders
            and os.path.realpath(os.path.join(root, name)) != str(exclude)
        )
        for name in sorted(files):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path


def is_text(path: Path) -> bool:
    """Whether a file is UTF-8 and has no NUL in its first block."""
    try:
        # decodes the whole file: a folder's file is either read to its end or passed over
        return not any(number == 0 and "\0" in text for number, text in enumerate(_decode(path)))
    except _NotUtf8:
        return False


class _NotUtf8(DataError):
    pass


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from error


def _decode(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks; a character may begin in one block and end in the next."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    position = 0
    with _open(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _NotUtf8(
                    f"{path}: not UTF-8 text at byte {position - held + error.start}; convert it, for "
                    "example with iconv -t UTF-8"
                ) from None
            if text:
                yield text
            if not block:
                return
            position += len(block)
