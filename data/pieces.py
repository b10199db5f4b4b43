"""Cuts documents into pieces to be encoded, and joins the ids of the pieces to those of the document.

To encode a text, the tokenizers library takes many times the text's memory, and longer per character for
long texts. So documents are cut, in one of two ways, and neither changes a document's ids:

- At a place where the tokenizer splits every text (`places_of`), if its pre-tokenizer is known to do so.
  Each piece is encoded by itself.
- Anywhere, with another tokenizer, or in a long stretch of text without such a place. Two neighbours then
  share some text. They are joined at a token that both have, with the same id at the same place. This is
  exact for BPE whose merges stand in the order in which they were learnt. If no merge crosses the edges of
  a token in either piece, none does in the document. For other models it is not proved, and relies on the
  distance between that token and the cuts. If two pieces have no token in common, they are encoded as one.
  If that would exceed about a million characters, they are cut all the same, and the user is told.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# in characters
_PIECE = 1 << 13  # a piece ends at the first place after so many characters
_LONGEST_PIECE = 1 << 16
_OVERLAP = 1 << 10
_LONGEST_JOINED = 1 << 20
_LONGEST_TRAINING_WORD = 1 << 11

# a space or a new line after a letter or digit, or after anything but white space
_AFTER_WORD = re.compile(r"[ \n](?<=[^\W_][ \n])")
_AFTER_ANY = re.compile(r"[ \n](?<=\S[ \n])")
_SPACE_AFTER_ANY = re.compile(r" (?<=\S )")
Places = Sequence[re.Pattern[str]]
GPT2_PLACES: Places = (_AFTER_WORD, _AFTER_ANY)

# the patterns of GPT-4 (and Llama 3) and of Qwen 2: new lines after punctuation belong to its word
_GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4_PATTERNS = (_GPT4_PATTERN, _GPT4_PATTERN.replace("{1,3}", ""))
_GPT4_PLACES: Places = (_AFTER_WORD, _SPACE_AFTER_ANY)


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: to be encoded.
        before: characters at its beginning that the piece before ends with.
        after: characters at its end that the next piece begins with.
    """

    text: str
    before: int = 0
    after: int = 0


class Tokens(NamedTuple):
    """The ids of a text, and the characters that each stands for: text[starts[i]:ends[i]].

    Shapes: (num_tokens,) each.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def places_of(content: dict[str, Any]) -> Places:
    """The places where a tokenizer of the library splits every text; () if none are known.

    Args:
        content: of tokenizer.json.
    """
    steps = _steps(content.get("pre_tokenizer"))
    normalizers = _steps(content.get("normalizer"), "normalizers")
    # NFC never joins a space or a new line with a character beside it
    known = all(step == {"type": "NFC"} for step in normalizers)
    known = known and not any(map(_crosses_places, content.get("added_tokens") or []))
    found = [_places_of_step(step) for step in steps]
    if not known or any(places is None for places in found):
        return ()
    splits = [places for places in found if places]
    if not splits:
        return ()
    return GPT2_PLACES if all(places is GPT2_PLACES for places in splits) else _GPT4_PLACES


def _steps(part: Any, key: str = "pretokenizers") -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, which may be none, one or a sequence of some."""
    if part is None:
        return []
    if isinstance(part, dict) and part.get("type") == "Sequence":
        steps = part.get(key)
        return steps if isinstance(steps, list) else [part]
    return [part]


def _places_of_step(step: Any) -> Places | None:
    """Where a pre-tokenizer always splits: () if it splits further only, None if it is not known."""
    if not isinstance(step, dict):
        return None
    kind = step.get("type")
    if kind == "Digits":
        return ()
    if kind == "ByteLevel" and step.get("add_prefix_space") is False:
        return GPT2_PLACES if step.get("use_regex", True) is True else ()
    pattern = step.get("pattern")
    isolated = (step.get("behavior"), step.get("invert", False)) == ("Isolated", False)
    if kind == "Split" and isolated and isinstance(pattern, dict):
        return _GPT4_PLACES if pattern.get("Regex") in _GPT4_PATTERNS else None
    return None


def _crosses_places(token: Any) -> bool:
    """Whether an added token can reach across a place. Special tokens are not looked for in texts."""
    if not isinstance(token, dict):
        return True
    if token.get("special"):
        return False
    flags = any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
    return flags or re.search(r"\s", str(token.get("content"))) is not None


def cut(texts: Iterable[str], places: Places) -> Iterator[Piece]:
    """Regroup the blocks of a document into pieces.

    Args:
        texts: the blocks.
        places: as `places_of` returns them; without any, all but short documents are cut with an overlap.
    """
    pending, start, before = "", 0, 0
    for text in texts:
        pending, start = pending[start:] + text, 0
        while len(pending) - start > (_PIECE if places else _LONGEST_PIECE):
            limit = start + _LONGEST_PIECE
            end = _place(pending, start + _PIECE, limit, places[:1])
            if end is None and len(pending) <= limit:
                break
            end = end or _place(pending, start + _PIECE, limit, places[1:])
            if end is not None:
                yield Piece(pending[start:end], before)
                start, before = end, 0
            else:
                yield Piece(pending[start:limit], before, _OVERLAP)
                start, before = limit - _OVERLAP, _OVERLAP
    if len(pending) > start:
        yield Piece(pending[start:], before)


def _place(text: str, start: int, limit: int, places: Places) -> int | None:
    for place in places:
        if found := place.search(text, start, limit):
            return found.start()
    return None


def training_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of a document to train byte-level BPE on, without overlap.

    The time of training grows with the square of a word's length. So in a long stretch of text without a
    place for a cut, words are cut to a length that no vocabulary needs. Other text is cut as `cut` does.
    """
    for piece in cut(texts, GPT2_PLACES):
        text = piece.text[piece.before :]
        if not (piece.before or piece.after):
            yield text
            continue
        for word in re.split(r"(?<=\S)(?=[ \n])", text):
            for start in range(0, len(word), _LONGEST_TRAINING_WORD):
                yield word[start : start + _LONGEST_TRAINING_WORD]


class Joined(NamedTuple):
    """A part of a document: its text, and its ids in the document, (num_tokens,)."""

    text: str
    ids: np.ndarray


class Joiner:
    """Joins the ids of neighbours that share text.

    Args:
        encode: the tokens of a text; called where two pieces have no token in common, on both together.

    Attributes:
        unproved: number of places where neighbours were joined without a common token. That happens only
            if about a million characters have none.
    """

    def __init__(self, encode: Callable[[str], Tokens]) -> None:
        self.unproved = 0
        self._encode = encode
        self._held: _Held | None = None

    def add(self, piece: Piece, tokens: Tokens) -> Iterator[Joined]:
        """Take the next piece of a document; yields the parts of the document whose ids are certain now."""
        held = _Held(piece.text, tokens, 0)
        if (left := self._held) is not None:
            at = _meeting(left, held, piece.before)
            if at is not None:
                yield left.until(at[0])
                held = _Held(piece.text, tokens, at[1])
            elif len(left.text) + len(piece.text) <= _LONGEST_JOINED:
                held = self._encoded(left.text + piece.text[piece.before :], left.start)
            else:
                self.unproved += 1
                half = piece.before // 2
                left = self._encoded(left.text[: half - piece.before], left.start)
                yield left.until(len(left.tokens.ids))
                held = self._encoded(piece.text[half:], 0)
        self._held = held if piece.after else None
        if not piece.after:
            yield held.until(len(held.tokens.ids))

    def _encoded(self, text: str, start: int) -> "_Held":
        """Encode a text whose part before `start` has been yielded already."""
        tokens = self._encode(text)
        first = int(np.searchsorted(tokens.starts, start)) if start else 0
        if start and (first == len(tokens.ids) or tokens.starts[first] != start):
            self.unproved += 1
            return self._encoded(text[start:], 0)
        return _Held(text, tokens, first)


class _Held(NamedTuple):
    """A piece whose tokens before `first` have been yielded."""

    text: str
    tokens: Tokens
    first: int

    @property
    def start(self) -> int:
        """Where the token `first` begins in the text."""
        return self._start(self.first)

    def until(self, last: int) -> Joined:
        """The text and the ids of the tokens first ... last - 1."""
        ids = self.tokens.ids[self.first : last]
        return Joined(self.text[self.start : self._start(last)], ids)

    def _start(self, i: int) -> int:
        # white space that has no token of its own goes with the text before a token
        if i == 0:
            return 0
        return int(self.tokens.starts[i]) if i < len(self.tokens.ids) else len(self.text)


def _meeting(left: _Held, right: _Held, overlap: int) -> tuple[int, int] | None:
    """The index in each piece of a token that both have, nearest to the overlap's middle; None: none."""
    shift = len(left.text) - overlap
    # the first token of a piece may begin there only because the piece does
    there = {key: i for key, i in _whole_tokens(right.tokens, 0) if 0 < i and key[0] < overlap}
    common = [
        (abs(key[0] - shift - overlap // 2), i, there[shifted])
        for key, i in _whole_tokens(left.tokens, shift)
        if i > left.first and (shifted := (key[0] - shift, key[1] - shift, key[2])) in there
    ]
    return min(common)[1:] if common else None


def _whole_tokens(tokens: Tokens, start: int) -> Iterator[tuple[tuple[int, int, int], int]]:
    """(start, end, id) and index of the tokens from `start` on that share no character with another."""
    ids, starts, ends = tokens
    for i in range(int(np.searchsorted(starts, start)), len(ids)):
        if (
            starts[i] < ends[i]
            and (i == 0 or ends[i - 1] <= starts[i])
            and (i + 1 == len(ids) or ends[i] <= starts[i + 1])
        ):
            yield (int(starts[i]), int(ends[i]), int(ids[i])), i
