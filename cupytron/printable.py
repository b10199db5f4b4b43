"""Text that a file or a stranger wrote, made fit for a terminal and for a page."""

import re

# Control characters move a terminal's cursor, change its title and set its keys. The marks of direction
# show text in another order than it has. Lone surrogates cannot be encoded.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings, overrides and isolates
    "\u2028\u2029"  # ends of lines and of paragraphs
    "\ud800-\udfff]"
)


def printable(text: str, keep: str = "") -> str:
    """The text with its control characters, marks of direction and lone surrogates written as escapes.

    Args:
        text: any text.
        keep: those of these characters that stay, such as "\\n" where the text may have several lines.

    Returns: text such as "\\x1b[31m" or "\\u202e" in place of what these characters would do.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in keep else ascii(character)[1:-1]

    return UNPRINTABLE.sub(escape, text)
