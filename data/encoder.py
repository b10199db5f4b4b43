"""Encodes sources in batches of pieces; the library encodes the pieces of a batch at once, on threads."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from .dataset import check_ids
from .lossless import ByteCheck
from .pieces import Joined, Joiner, Piece
from .sources import Part, Source, documents
from .token_files import TokenFile
from .tokenizers import Tokenizer

_BATCH_PIECES = 4096
_BATCH_CHARACTERS = 1 << 18


class Encoder:
    """Encodes sources, and collects notes for the user.

    Args:
        tokenizer: for text; None: all sources are files of token ids.
        vocab_size: number of ids; larger ones are refused.

    Attributes:
        check: compares texts with their ids; None without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self.check = ByteCheck(tokenizer) if tokenizer else None
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._unproved = 0

    def encode(self, sources: list[Source]) -> Iterator[tuple[bool, np.ndarray]]:
        """Yield (whether these ids start a document, ids) for each part of the sources.

        Raises:
            DataError: a source cannot be read, or an id is not below vocab_size.
        """
        for is_tokens, group in itertools.groupby(
            sources, lambda source: isinstance(source, TokenFile)
        ):
            if is_tokens:
                yield from self._copy(group)
            else:
                assert self._tokenizer is not None
                parts = itertools.chain.from_iterable(source.parts() for source in group)
                yield from self._encode(parts, self._tokenizer)

    def notes(self) -> list[str]:
        """Lines for the user about the sources encoded so far."""
        notes = [self.check.note] if self.check and self.check.note else []
        if self._unproved:
            notes.append(
                f"texts had to be cut at {self._unproved:,} places, where their ids may differ from "
                "those of the whole document; about a million characters had no place for a cut, and two "
                "pieces had no token in common"
            )
        return notes

    def _copy(self, sources: Iterable[Source]) -> Iterator[tuple[bool, np.ndarray]]:
        if self.check and self._tokenizer:
            self.check.probe(self._tokenizer)
        for source in sources:
            position = 0
            for part in source.parts():
                assert part.ids is not None
                check_ids(part.ids, self._vocab_size, source.name, position)
                position += part.ids.size
                yield part.first, part.ids

    def _encode(
        self, parts: Iterable[Part], tokenizer: Tokenizer
    ) -> Iterator[tuple[bool, np.ndarray]]:
        assert self.check is not None
        joiner = Joiner(lambda text: tokenizer.encode_tokens([text])[0])
        begins = False
        for batch in _batches(_pieces(parts, tokenizer)):
            shared = [piece.text for _, piece in batch if piece.before or piece.after]
            alone = [piece.text for _, piece in batch if not (piece.before or piece.after)]
            tokens = iter(tokenizer.encode_tokens(shared) if shared else [])
            ids = iter(tokenizer.encode_batch(alone))
            for first, piece in batch:
                begins |= first
                if not (piece.before or piece.after):
                    found = [Joined(piece.text, next(ids))]
                else:
                    found = list(joiner.add(piece, next(tokens)))
                for joined in found:
                    self.check.compare(*joined)
                    yield begins, joined.ids
                    begins = False
        self._unproved += joiner.unproved


def _pieces(parts: Iterable[Part], tokenizer: Tokenizer) -> Iterator[tuple[bool, Piece]]:
    """Cut each document as the tokenizer does; yields (whether the piece starts a document, piece)."""
    for document in documents(parts):
        first = True
        for piece in tokenizer.cut(document):
            yield first, piece
            first = False


def _batches(pieces: Iterable[tuple[bool, Piece]]) -> Iterator[list[tuple[bool, Piece]]]:
    """Groups of pieces; the tokenizers library encodes the pieces of a group at once, on threads."""
    batch: list[tuple[bool, Piece]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1].text)
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
