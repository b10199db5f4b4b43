"""The sources that `prepare` reads, in blocks: text files and JSON lines (token files: `token_files`).

A document is a run of parts, each a block of text or of token ids; text is kept byte for byte (line
ends and byte order marks too).
"""

import codecs
import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from cupytron import durable

from .errors import DataError
from .tokenizers import json_fault

BLOCK_BYTES = 1 << 20
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
_LONGEST_LINE = 256 << 20


class Part(NamedTuple):
    """A block of a document.

    Attributes:
        first: whether it starts a document.
        text: the text, or None.
        ids: where there is no text, the token ids, (num_tokens,), of any integer type; else None.
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
    """A file of JSON lines: a document a line, in one field of its object. Blank lines are passed over."""

    def __init__(self, path: Path, field: str) -> None:
        self.path, self.name, self.num_bytes = path, str(path), path.stat().st_size
        self._field = field

    def parts(self) -> Iterator[Part]:
        with open_file(self.path) as file:
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
            fault = json_fault(error)
            raise DataError(f"{where}: not JSON ({fault}); mend or remove the line") from None
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


def documents(parts: Iterable[Part]) -> Iterator[Iterator[str]]:
    """The texts of each document; each is to be read before the next is asked for."""
    number = 0

    def document(part: Part) -> int:
        nonlocal number
        number += part.first
        return number

    for _, group in itertools.groupby(parts, document):
        yield (part.text for part in group if part.text is not None)


def why_not_json_lines(path: Path, field: str | None = None) -> str | None:
    """Why a .json file is not one object a line, and what to do; None if its first line is an object.

    Args:
        path: of the file.
        field: a field that the object must have; None: any object will do.
    """
    with open_file(path) as file:
        line = file.readline(_LONGEST_LINE + 1).removeprefix(codecs.BOM_UTF8)
        while line and not line.strip():
            line = file.readline(_LONGEST_LINE + 1)
    line = line.strip()
    if line.startswith(b"["):
        return (
            f"an array, not one object a line; turn it into lines with jq -c '.[]' {path} > X.jsonl"
        )
    try:
        value = json.loads(line) if line else {field: ""}
    except (ValueError, RecursionError):
        return f"not one object a line; write it so with jq -c . {path} > X.jsonl"
    if isinstance(value, dict) and (field is None or field in value):
        return None
    return "not one object a line; write it so, with the text in a field"


def is_text(path: Path) -> bool:
    """Whether a file is UTF-8 and has no NUL in its first block."""
    try:
        # decodes the whole file: a folder's file is either read to its end or passed over
        return not any(number == 0 and "\0" in text for number, text in enumerate(_decode(path)))
    except _NotUtf8:
        return False


class _NotUtf8(DataError):
    pass


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a source.

    Raises:
        DataError: it cannot be opened or read.
    """
    try:
        with durable.open_file(path) as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from error


def _decode(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks; a character may begin in one block and end in the next."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    position = 0
    with open_file(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _NotUtf8(
                    f"{path}: not UTF-8 text at byte {position - held + error.start}; convert it, for "
                    "example with iconv -t UTF-8, or unpack it if it is compressed"
                ) from None
            if text:
                yield text
            if not block:
                return
            position += len(block)
