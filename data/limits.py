"""Limits on tokenizers of the library, which no real one meets.

The library's time and memory grow without end with them, and it ends the process where memory does.
"""

import re
from collections.abc import Iterator
from typing import Any

from .errors import DataError

# times that the steps may make a text longer; those that people have make it four times as long
MOST_GROWTH = 64
MOST_STEPS = 100  # of a normalizer, a pre-tokenizer or a decoder; real ones have about ten
MOST_ADDED = 1 << 20  # characters of all added tokens; real tokenizers have a tenth of that
_BYTES = 4  # of a character in UTF-8, each of which ByteLevel makes a character
# characters and classes of them, each at least once: an expression that cannot match the empty text
_UNIT = r"(?:[^\\*?|^$(){}\[\]+]|\\[sSdDwWnrt]|\\[^\w]|\\p\{\w+\}|\[(?:[^\[\]\\]|\\[sSdDwWnrt]|\\[^\w])+\])"
_NEVER_EMPTY = re.compile(rf"(?:{_UNIT}(?:\+|\{{[1-9][0-9]*,?[0-9]*\}})?)+")


def check_limits(content: dict[str, Any], where: str) -> None:
    """Refuse a tokenizer that would take minutes, or all memory.

    Args:
        content: of tokenizer.json. where: named in the error.

    Raises:
        DataError: it says which limit is exceeded.
    """
    added = content.get("added_tokens")
    tokens = added if isinstance(added, list) else []
    held = sum(len(str(token.get("content"))) for token in tokens if isinstance(token, dict))
    if held > MOST_ADDED:
        raise DataError(
            f"{where}: its {len(tokens):,} added tokens have {held:,} characters; at most {MOST_ADDED:,} "
            "are taken, since the library needs minutes for more; remove those that no text has"
        )
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        count = sum("type" in step for step in _steps(content.get(part)))
        if count > MOST_STEPS:
            raise DataError(
                f"{where}: its {part} has {count:,} steps; at most {MOST_STEPS} are taken, since each of "
                "them runs over every text; use another tokenizer"
            )
    if (times := growth(content)) > MOST_GROWTH:
        shown = f"{times:,}" if times < 10**9 else "more than a billion"
        raise DataError(
            f"{where}: its steps can make a text {shown} times as long; at most {MOST_GROWTH} times is "
            "taken, since the result has to fit into memory; use another tokenizer"
        )


def growth(content: dict[str, Any]) -> int:
    """How many times longer a tokenizer's steps can make a text: of its text, or of its tokens'.

    A replacement of one character by n may apply to every character, and another one to its results.
    """
    normalizer, pre_tokenizer, decoder = (
        _product(content.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder")
    )
    return max(normalizer * pre_tokenizer, decoder)


def _product(part: Any) -> int:
    times = 1
    for step in _steps(part):
        times *= max(1, _growth(step))
    return times


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The objects of a part, however deep they lie in sequences."""
    pending = [part]
    while pending:
        step = pending.pop()
        if isinstance(step, dict):
            yield step
        if isinstance(step, dict | list):
            values = step.values() if isinstance(step, dict) else step
            pending.extend(value for value in values if isinstance(value, dict | list))


def _growth(step: dict[str, Any]) -> int:
    """How many times longer a step can make a text."""
    if step.get("type") == "ByteLevel":
        return _BYTES
    if step.get("type") == "Prepend":
        return len(str(step.get("prepend", "")))  # a text may have one character
    if step.get("type") != "Replace":
        return 1
    new, pattern = len(str(step.get("content", ""))), step.get("pattern")
    found = pattern if isinstance(pattern, dict) else {}
    literal, expression = str(found.get("String", "")), str(found.get("Regex", ""))
    if literal or _NEVER_EMPTY.fullmatch(expression):
        return -(-new // max(1, len(literal)))
    return 1 + new  # it may match the empty text in front of each character
