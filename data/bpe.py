"""Tokenizers of the Hugging Face `tokenizers` library: ours are byte-level BPE.

Byte-level BPE is Sennrich et al. 2016 (arXiv:1508.07909) on bytes, as in GPT-2: every text has ids, and
decoding gives the same bytes back. Other models of the library are read as well; what they do not keep
of a text is lost.
"""

import contextlib
import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from . import separators
from .errors import DataError
from .limits import check_limits
from .pieces import Piece, Tokens, cut, places_of
from .streaming import WindowDecoder
from .tokenizers import MAX_VOCAB_SIZE, SEPARATOR_TEXT, StreamDecoder, Tokenizer, to_utf8

BPE_SIZES = (257, 1 << 20)  # the smallest is 256 bytes and the separator


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the library, from the content of its JSON file."""

    keeps_bytes = False

    def __init__(self, content: dict[str, Any], where: str) -> None:
        library = _library()
        check_limits(content, where)
        self.content = content
        self._where = where
        model = content.get("model")
        self.kind = str(model.get("type", "bpe")).lower() if isinstance(model, dict) else "bpe"
        live = copy.copy(content)
        if isinstance(model, dict):
            # BPE dropout would give other ids on each run
            live["model"] = {**model, "dropout": None} if "dropout" in model else model
        # would cut texts short, or fill them up
        live["truncation"] = live["padding"] = None
        with self._guard():
            self._tokenizer = library.Tokenizer.from_str(json.dumps(live))
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            added = self._tokenizer.get_added_tokens_decoder()
            # "<|endoftext|>" written out in a text is text, not the separator
            self._tokenizer.encode_special_tokens = True
            # without special tokens it adds nothing, but it can change the offsets of tokens
            self._tokenizer.post_processor = None
        if not vocabulary:
            raise DataError(f"{where}: the tokenizer's vocabulary is empty; train it first")
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(
                f"{where}: token id {self.vocab_size - 1} is too large; at most {MAX_VOCAB_SIZE:,} "
                "ids can be used"
            )
        self._vocabulary = vocabulary
        self._added = {i: token.content for i, token in added.items()}
        self.special = frozenset(i for i, token in added.items() if token.special)
        names = {added[i].content for i in self.special}
        known = (name for name in separators.NAMES_WITHOUT_MARK if name in names)
        self._separator_text = separators.marked(content) or next(known, None)
        if self._separator_text is not None:
            self.separator = vocabulary[self._separator_text]
        self.token_bytes = _byte_level(content, vocabulary, self._added)
        self._byte_ids = _byte_fallback(content, vocabulary)
        self._places = places_of(content)

    def with_separator(self, name: str | None) -> Tokenizer:
        if name is None:
            name = self._separator_text or next(
                filter(self._separates, separators.KNOWN_NAMES), None
            )
        else:
            separators.require(name, self._vocabulary, self._added.values())
        if name == self._separator_text:
            return self
        assert name is not None
        marked = separators.mark(self.content, name, self._vocabulary[name])
        return LibraryTokenizer(marked, self._where)

    def _separates(self, name: str) -> bool:
        """Whether there is a token of that name, and BPE has not learnt it as a word of text."""
        i = self._vocabulary.get(name)
        if i is None:
            return False
        return i in self._added or self.kind != "bpe" or i not in self._encode([name])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # "fast" leaves out the characters that each id came from
        encodings = self._encode(texts, fast=True)
        found = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return [
            self._without_separator(text).ids if (ids == self.separator).any() else ids
            for text, ids in zip(texts, found, strict=True)
        ]

    def encode_tokens(self, texts: Sequence[str]) -> list[Tokens]:
        found = [_tokens(encoding) for encoding in self._encode(texts)]
        return [
            self._without_separator(text) if (tokens.ids == self.separator).any() else tokens
            for text, tokens in zip(texts, found, strict=True)
        ]

    def _encode(self, texts: Sequence[str], fast: bool = False) -> list[Any]:
        for text in texts:
            to_utf8(text)
        with self._guard():
            encode = self._tokenizer.encode_batch_fast if fast else self._tokenizer.encode_batch
            encodings: list[Any] = encode(list(texts), add_special_tokens=False)
            return encodings

    def _without_separator(self, text: str) -> Tokens:
        """The tokens of a text in which this model would encode some words to the separator.

        The text is cut inside these words, and each part is encoded by itself. A tokenizer that puts a
        space in front of a text does so for each part.
        """
        assert self._separator_text is not None
        start, end = map(re.escape, (self._separator_text[:2], self._separator_text[2:]))
        parts = re.split(f"(?<={start})(?={end})", text)
        offsets = itertools.accumulate(map(len, parts), initial=0)
        found = [
            _tokens(encoding, offset)
            for encoding, offset in zip(self._encode(parts), offsets, strict=False)
        ]
        tokens = Tokens(*map(np.concatenate, zip(*found, strict=True)))
        if (tokens.ids == self.separator).any():
            raise DataError(
                f"{self._where}: the tokenizer encodes text to its separator "
                f"{self._separator_text} (id {self.separator}); use another tokenizer, or choose "
                "another separator with --separator TOKEN"
            )
        return tokens

    def cut(self, texts: Iterable[str]) -> Iterator[Piece]:
        return cut(texts, self._places)

    def decode(self, ids: Iterable[int]) -> str:
        if self.token_bytes is not None:
            return super().decode(ids)
        with self._guard():
            return self._tokenizer.decode(self.check(ids), skip_special_tokens=False)

    def stream(self, prompt: Sequence[int] = ()) -> StreamDecoder:
        if self.token_bytes is not None:
            return StreamDecoder(self, prompt)
        return WindowDecoder(self.decode, prompt, self._byte_ids)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (DataError, KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            # the library's PanicException is no Exception
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{self._where}: the tokenizers library cannot use it: {reason}"
            ) from error


def train(texts: Iterable[str], size: int) -> LibraryTokenizer:
    """Train byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: as `training_pieces` yields them, read once; the library has 256 in memory at a time.
        size: ids wanted, in BPE_SIZES, with the 256 bytes and the separator; a small corpus gives fewer.

    Raises:
        DataError: the `tokenizers` package is missing.
    """
    library = _library()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[SEPARATOR_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return LibraryTokenizer(json.loads(tokenizer.to_str()), "the trained tokenizer")


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "this tokenizer needs the tokenizers package, which is not installed; "
            "pip install tokenizers, or use --tokenizer byte or char"
        ) from error
    return tokenizers


def _tokens(encoding: Any, offset: int = 0) -> Tokens:
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2) + offset
    return Tokens(np.array(encoding.ids, np.uint32), places[:, 0], places[:, 1])


def _byte_level(
    content: dict[str, Any], vocabulary: dict[str, int], added: dict[int, str]
) -> list[bytes] | None:
    """The bytes that each id is decoded to, if the decoder is GPT-2's; else None."""
    decoder = content.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        return None
    alphabet = _byte_alphabet()
    result = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i not in added and all(c in alphabet for c in token):
            result[i] = bytes(alphabet[c] for c in token)
        else:
            result[i] = token.encode("utf-8")
    return result


def _byte_fallback(content: dict[str, Any], vocabulary: dict[str, int]) -> frozenset[int]:
    """The ids that the decoder takes for single bytes, such as <0x0A>."""
    if '"ByteFallback"' not in json.dumps(content.get("decoder")):
        return frozenset()
    return frozenset(
        i for token, i in vocabulary.items() if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token)
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (bytes_to_unicode in its encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
