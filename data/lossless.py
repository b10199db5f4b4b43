"""Checks that ids keep every byte of their text, so that bytes can be counted from the ids.

Many parts of a tokenizer drop or add text: normalizers, pre-tokenizers, added tokens with `lstrip`, and
symbols that the vocabulary lacks. Each does so for other texts, so there is no list of such parts. Instead,
each text that is encoded is compared with the bytes of its ids.
"""

import numpy as np

from .tokenizers import Tokenizer

# typical texts, to check a tokenizer whose ids were given without their text
PROBES = (
    'The cat, "sat" on 12 mats; don\'t!',
    " a  b\n\n\tc\r\n d ",
    "x=[1.5]; y_z{@#} <b>/&amp;\\",
    "na\u00efve caf\u00e9 \u6f22\u5b57\u3002 \u0440\u0443\u0441 \U0001f680",
)
_SHOWN = 12  # characters before and after a difference


class ByteCheck:
    """Compares texts with their ids.

    Attributes:
        lengths: (vocab_size,) int64: bytes of text behind each id; None once a text differs from its ids.
        note: a line for the user: how a text differs, or why none can be compared. None: none differs.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.lengths = tokenizer.text_lengths()
        self.note: str | None = None
        self._bytes: list[bytes] = []
        if self.lengths is None:
            self.note = (
                f"this {tokenizer.kind} tokenizer may not keep every character of a text (only "
                "byte-level BPE does); the bytes of text are not counted"
            )
        elif not tokenizer.keeps_bytes and tokenizer.token_bytes is not None:
            self._bytes = list(tokenizer.token_bytes)
            for i in tokenizer.special:
                self._bytes[i] = b""

    def compare(self, text: str, ids: np.ndarray) -> None:
        """Compare a text with the bytes of its ids, (num_tokens,)."""
        if self.lengths is None or not self._bytes:
            return
        want = text.encode("utf-8")
        found = b"".join(map(self._bytes.__getitem__, ids.tolist()))
        if found != want:
            self.lengths = None
            self.note = (
                f"this tokenizer does not keep every byte of the text: {_difference(want, found)}; the "
                "bytes of text are not counted, so there are no bits per byte"
            )

    def probe(self, tokenizer: Tokenizer) -> None:
        """Compare `PROBES` with their ids, for a source of ids without their text."""
        if not self._bytes:
            return
        for text in PROBES:
            self.compare(text, np.array(tokenizer.encode(text), np.int64))


def _difference(want: bytes, found: bytes) -> str:
    pairs = enumerate(zip(want, found, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(want), len(found)))
    start = max(0, same - _SHOWN)
    parts = (data[start : start + 2 * _SHOWN].decode("utf-8", "replace") for data in (want, found))
    return " becomes ".join(map(ascii, parts))
