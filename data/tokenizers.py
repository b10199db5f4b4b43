"""Tokenizers: text to token ids and back. Bytes and characters here, BPE in `bpe.py`.

A tokenizer is its content, the JSON object in `tokenizer.json`: ours for bytes and characters, that of
the `tokenizers` library for BPE. Its hash is that of the content, whatever the file's layout.
"""

import codecs
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupytron.durable import open_file

from .errors import DataError
from .pieces import Piece, Tokens

SEPARATOR_TEXT = "<|endoftext|>"
MAX_FILE_BYTES = 64 << 20
MAX_VOCAB_SIZE = 1 << 22
_NUM_CODE_POINTS = 0x110000


class StreamDecoder:
    """Text of a growing sequence of ids: `push` each id, then `finish`.

    A character's bytes can come in several tokens; they are held back until it is complete. The texts that
    `push` and `finish` return add up to the text that follows `decode(prompt)` in `decode` of all ids. If
    the pushed ids change the end of `decode(prompt)`, since they complete a character, it is the text after
    the part that stays.

    Args:
        tokenizer: decodes the ids.
        prompt: ids whose text is known already.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(tokenizer.bytes_of(prompt))
        # if the prompt ends inside a character, its text ends with a replacement character
        self._known = "\ufffd" if self._decoder.getstate()[0] else ""

    def push(self, token: int) -> str:
        """The text that this id completes, often empty."""
        return self._new(self._decoder.decode(self._tokenizer.bytes_of([token])))

    def finish(self) -> str:
        """What is left: a replacement character if the last character never became complete."""
        return self._new(self._decoder.decode(b"", final=True))

    def _new(self, text: str) -> str:
        if text and self._known:
            text, self._known = text.removeprefix(self._known), ""
        return text


class Tokenizer:
    """What every tokenizer offers.

    Attributes:
        kind: "byte", "char", "bpe", or another model of the `tokenizers` library.
        vocab_size: ids are 0 .. vocab_size - 1.
        separator: the id that stands between documents, or None. No text is encoded to it.
        content: the JSON object that `save` writes.
        token_bytes: the bytes of each id in decoded text; None if the bytes of an id depend on its
            neighbours. The separator has the bytes of its name.
        keeps_bytes: whether the ids of every text stand for exactly its bytes. If False, each text is
            checked (`lossless`).
        special: ids that stand for no text.
    """

    kind: str
    separator: int | None = None
    content: dict[str, Any]
    token_bytes: list[bytes] | None
    keeps_bytes = True
    special: frozenset[int] = frozenset()
    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, as unsigned integers of any width.

        Raises:
            DataError: a text that this tokenizer has no ids for.
        """
        raise NotImplementedError

    def cut(self, texts: Iterable[str]) -> Iterator[Piece]:
        """Regroup the blocks of one document into pieces to be encoded."""
        return (Piece(text) for text in texts)

    def encode_tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """The ids of each text with their places in it. Only for tokenizers whose `cut` makes overlaps.

        Raises:
            DataError: a text has characters without an id.
        """
        raise NotImplementedError

    def with_separator(self, name: str | None) -> "Tokenizer":
        """This tokenizer with another token between documents.

        Args:
            name: of the token; None: the best one it has.

        Raises:
            DataError: there is no such token, or the separator of this tokenizer cannot be chosen.
        """
        if name is not None:
            own = "has none" if self.separator is None else f"has {SEPARATOR_TEXT}"
            raise DataError(
                f"separator={name}: a {self.kind} tokenizer {own} and no other; a separator is chosen "
                "for a tokenizer file of Hugging Face"
            )
        return self

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist() if text else []

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become replacement characters."""
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def stream(self, prompt: Sequence[int] = ()) -> StreamDecoder:
        """A decoder of the ids that follow `prompt`."""
        return StreamDecoder(self, prompt)

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        assert self.token_bytes is not None
        return b"".join([self.token_bytes[i] for i in self.check(ids)])

    def check(self, ids: Iterable[int]) -> list[int]:
        """The ids as a list, or a DataError for the first that is none of this tokenizer's."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(
                    f"token id {i} is not in the tokenizer's vocabulary of {self.vocab_size}; "
                    "was the model trained with another tokenizer or a larger vocab_size?"
                )
        return ids

    def text_lengths(self) -> np.ndarray | None:
        """(vocab_size,) int64: bytes of text behind each id, 0 for special ids; None if unknown."""
        if self.token_bytes is None:
            return None
        lengths = np.array([len(b) for b in self.token_bytes], np.int64)
        lengths[list(self.special)] = 0
        return lengths

    @functools.cached_property
    def hash(self) -> str:
        return content_hash(self.content)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.content) + "\n", encoding="ascii")


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, 0 .. 255, and 256 between documents."""

    kind = "byte"
    vocab_size = 257
    separator = 256
    special = frozenset([256])

    def __init__(self) -> None:
        self.content = {"cupytron_tokenizer": 1, "kind": "byte"}
        self.token_bytes = [bytes([i]) for i in range(256)] + [SEPARATOR_TEXT.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(to_utf8(text), np.uint8) for text in texts]


class CharTokenizer(Tokenizer):
    """One id for each character, in the order of the code points; nothing stands between documents."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        points = [ord(c) for c in characters]
        if not points or any(a >= b for a, b in itertools.pairwise(points)):
            raise DataError(
                "the characters of a char tokenizer must be some, sorted, without repeats"
            )
        self.content = {"cupytron_tokenizer": 1, "kind": "char", "characters": characters}
        self.token_bytes = [to_utf8(c) for c in characters]
        self.vocab_size = len(points)
        # one entry more than needed: every character beyond the last falls on it
        self._table = np.full(points[-1] + 2, -1, np.int32)
        self._table[points] = np.arange(len(points))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ids = self._table[np.minimum(code_points(text), len(self._table) - 1)]
        if ids.size and ids.min() < 0:
            unknown = sorted({c for c, i in zip(text, ids.tolist(), strict=True) if i < 0})
            shown = ", ".join(ascii(c) if not c.isprintable() else repr(c) for c in unknown[:8])
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise DataError(
                f"not in the vocabulary of {self.vocab_size} characters: {shown}{more}; leave them "
                "out; a model that takes any text has to be trained on data of --tokenizer byte"
            )
        return ids.view(np.uint32)


def collect_characters(texts: Iterable[str]) -> str:
    """The characters that occur, sorted: the vocabulary of a CharTokenizer."""
    seen = np.zeros(_NUM_CODE_POINTS, bool)
    for text in texts:
        seen[code_points(text)] = True
    return "".join(map(chr, np.flatnonzero(seen).tolist()))


def code_points(text: str) -> np.ndarray:
    # surrogatepass: a lone surrogate is to be reported as an unknown character, by name
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def to_utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is {text[error.start]!a}, half of a surrogate "
            "pair and no character of its own; remove it (was the text decoded from another encoding?)"
        ) from None


def content_hash(content: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys and the layout of its file."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def json_fault(error: Exception) -> str:
    """What is wrong with JSON that Python's reader refuses, without advice for programmers.

    Args:
        error: a UnicodeDecodeError, JSONDecodeError, RecursionError, or int's ValueError.
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return str(error)
    return "a number has thousands of digits"


def read_json_object(path: Path, max_bytes: int, what: str) -> dict[str, Any]:
    """The JSON object in a file that someone else may have written.

    Raises:
        DataError: no such file, larger than `max_bytes`, not JSON, or not an object.
    """
    try:
        with open_file(path) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot read {what}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise DataError(f"{path}: larger than {max_bytes:,} bytes, so it is no {what}")
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: {what} is not JSON ({json_fault(error)}); make it again"
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: {what} must be a JSON object, not {type(content).__name__}")
    return content


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json: ours, or one of the Hugging Face `tokenizers` library.

    Raises:
        DataError: the file cannot be used, or needs the `tokenizers` package and it is missing.
    """
    path = Path(path)
    return tokenizer_from(read_json_object(path, MAX_FILE_BYTES, "a tokenizer"), str(path))


def tokenizer_from(content: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a content; `where` is named in errors."""
    if "cupytron_tokenizer" not in content and "model" in content:
        from .bpe import LibraryTokenizer

        return LibraryTokenizer(content, where)
    if content == {"cupytron_tokenizer": 1, "kind": "byte"}:
        return ByteTokenizer()
    characters = content.get("characters")
    known = {"cupytron_tokenizer": 1, "kind": "char", "characters": characters}
    if content == known and isinstance(characters, str):
        try:
            return CharTokenizer(characters)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    raise DataError(
        f"{where}: neither a tokenizer of cupytron (version 1, kind byte or char) nor one of the "
        "tokenizers library (no 'model'); give the tokenizer.json of a prepared data set or of a "
        "Hugging Face model"
    )
