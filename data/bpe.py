"""Tokenizers of the Hugging Face `tokenizers` library (the `bpe` extra): ours are byte-level BPE.

Byte-level BPE is Sennrich et al. 2016 (arXiv:1508.07909) on bytes, as in GPT-2: every text has ids, and
decoding gives the same bytes back. Other models of the library are read as well; what they do not keep
of a text is lost.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .errors import DataError
from .tokenizers import MAX_VOCAB_SIZE, SEPARATOR_TEXT, StreamDecoder, Tokenizer, to_utf8

# what the end of a text is called in GPT-2 and Qwen, Llama 3, Llama 2, Gemma
_SEPARATORS = (SEPARATOR_TEXT, "<|end_of_text|>", "</s>", "<eos>")
BPE_SIZES = (257, 1 << 20)  # the smallest is 256 bytes and the separator
_LONGEST_CHARACTER = 8  # tokens
_PIECE = 1 << 13  # characters
_LONGEST_PIECE = 1 << 16
# white space after a letter or digit, or after anything else but white space
_AFTER_WORD = re.compile(r"[ \n](?<=[^\W_][ \n])")
_AFTER_ANY = re.compile(r"[ \n](?<=\S[ \n])")


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the library, from the content of its JSON file."""

    def __init__(self, content: dict[str, Any], where: str) -> None:
        library = _library()
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
        if not vocabulary:
            raise DataError(f"{where}: the tokenizer's vocabulary is empty; train it first")
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(
                f"{where}: token id {self.vocab_size - 1} is too large; at most {MAX_VOCAB_SIZE:,} "
                "ids can be used"
            )
        self.special = frozenset(i for i, token in added.items() if token.special)
        names = {added[i].content: i for i in sorted(self.special)}
        self._separator_text = next((name for name in _SEPARATORS if name in names), None)
        self.separator = names[self._separator_text] if self._separator_text else None
        self.token_bytes = _byte_level(
            content, vocabulary, {i: t.content for i, t in added.items()}
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            to_utf8(text)
        ids = self._encode(list(texts))
        if self.separator is None or not any((i == self.separator).any() for i in ids):
            return ids
        return [self._without_separator(text) for text in texts]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        with self._guard():
            # "fast" leaves out the characters that each id came from
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def _without_separator(self, text: str) -> np.ndarray:
        """The ids of a text whose words this model's vocabulary takes for the separator."""
        assert self._separator_text is not None
        start, end = map(re.escape, (self._separator_text[:2], self._separator_text[2:]))
        parts = re.split(f"(?<={start})(?={end})", text)
        ids = np.concatenate(self._encode(parts))
        if (ids == self.separator).any():
            raise DataError(
                f"{self._where}: the tokenizer encodes text to its separator "
                f"{self._separator_text} (id {self.separator}); use another tokenizer"
            )
        return ids

    def cut(self, texts: Iterable[str]) -> Iterator[str]:
        return cut(texts)

    def decode(self, ids: Iterable[int]) -> str:
        if self.token_bytes is not None:
            return super().decode(ids)
        with self._guard():
            return self._tokenizer.decode(self.check(ids), skip_special_tokens=False)

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self) if self.token_bytes is not None else _WindowDecoder(self)

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


class _WindowDecoder(StreamDecoder):
    """For tokenizers whose text of an id depends on the ids before it: decodes the last few again."""

    def __init__(self, tokenizer: LibraryTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # ids[:_shown] have been returned

    def push(self, token: int) -> str:
        self._ids.append(int(token))
        text = self._rest()
        if not text or (
            text.endswith("\ufffd") and len(self._ids) - self._shown < _LONGEST_CHARACTER
        ):
            return ""
        # the ids shown last stay as the context of the next
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def finish(self) -> str:
        return self._rest()

    def _rest(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]


def cut(texts: Iterable[str]) -> Iterator[str]:
    """Regroup the blocks of a document into pieces, cut between a letter or digit and white space.

    The library takes many times the memory of a text to encode it, and more time for long ones.
    GPT-2's pattern and its successors always split a text there, so that the ids stay the same. In a
    text that has no such place for long, the cut may change the ids of the word it goes through.
    """
    pending, start = "", 0
    for text in texts:
        pending, start = pending[start:] + text, 0
        while len(pending) - start > _PIECE:
            limit = start + _LONGEST_PIECE
            boundary = _AFTER_WORD.search(pending, start + _PIECE, limit)
            if boundary is None and len(pending) <= limit:
                break
            boundary = boundary or _AFTER_ANY.search(pending, start + _PIECE, limit)
            end = boundary.start() if boundary else limit
            yield pending[start:end]
            start = end
    if len(pending) > start:
        yield pending[start:]


def train(texts: Iterable[str], size: int) -> LibraryTokenizer:
    """Train byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: pieces of text as `cut` makes them (the library holds 256 at a time), consumed once.
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
            "pip install 'cupytron[bpe]', or use --tokenizer byte or char"
        ) from error
    return tokenizers


def _byte_level(
    content: dict[str, Any], vocabulary: dict[str, int], added: dict[int, str]
) -> list[bytes] | None:
    """The bytes of each id of a byte-level BPE; None if it is not one that keeps every byte."""
    decoder, model = content.get("decoder"), content["model"]
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        return None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        return None
    alphabet = _byte_alphabet()
    if content.get("normalizer") is not None or not all(c in vocabulary for c in alphabet):
        return None
    result = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i in added:
            result[i] = added[i].encode("utf-8")
        elif all(c in alphabet for c in token):
            result[i] = bytes(alphabet[c] for c in token)
        else:
            return None
    return result


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (bytes_to_unicode in its encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
