"""Finds the token between documents in a tokenizer file of Hugging Face.

A separator is chosen once, when a data set is prepared. The choice is written into tokenizer.json as a mark
on one of its added tokens; the tokenizers library ignores the mark. So the hash of tokenizer.json covers
the choice, and every later reader of the file (training, sampling) finds it there. In a file without a
mark, the separator is the first of `NAMES_WITHOUT_MARK` that is a special token.
"""

import difflib
from collections.abc import Collection
from typing import Any

from .errors import DataError

# the token that ends a text in GPT-2 and Qwen, Llama 3, Llama 2, Gemma
NAMES_WITHOUT_MARK = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# The end of a turn, such as <|im_end|> or <|eot_id|>, is not the end of a document. <|bos|> (nanochat) and
# [SEP] (BERT) are here since those tokenizers have no better token.
KNOWN_NAMES = (
    *NAMES_WITHOUT_MARK,
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "<EOS_TOKEN>",  # Command R
    "<seed:eos>",
    "<EOD|LLM-jp>",
    "<|eod|>",
    "<eod>",  # XLNet
    "<EOD>",
    "<|eos|>",
    "<EOS>",
    "[EOS]",  # Kimi
    "<|bos|>",
    "[SEP]",
)
_MARK = ("cupytron", "separator")


def marked(content: dict[str, Any]) -> str | None:
    """The name of the added token that carries the mark; None: no token does."""
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get(_MARK[0]) == _MARK[1]:
            return str(token.get("content"))
    return None


def mark(content: dict[str, Any], name: str, i: int) -> dict[str, Any]:
    """A copy of a tokenizer's content in which one token carries the mark.

    The token becomes a special added token, if it is not one already.

    Args:
        content: of tokenizer.json.
        name: of the token.
        i: its id.
    """
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    new = {"id": i, "content": name, **flags, "special": True}
    added = [
        {key: value for key, value in token.items() if key != _MARK[0]}
        for token in content.get("added_tokens") or []
    ]
    if all(token.get("content") != name for token in added):
        added.append(new)
    for token in added:
        if token["content"] == name:
            # an ordinary added token becomes special too, so that no text is encoded to it
            token |= {"special": True, _MARK[0]: _MARK[1]}
    return {**content, "added_tokens": added}


def require(name: str, vocabulary: Collection[str], added: Collection[str]) -> None:
    """Refuse a name that is no token.

    Args:
        name: of the token.
        vocabulary: the names of all tokens.
        added: the names of the added tokens.

    Raises:
        DataError: it is none; the message lists similar names.
    """
    if name in vocabulary:
        return
    near = difflib.get_close_matches(name, added, 3, 0.5) or difflib.get_close_matches(
        name, vocabulary, 3, 0.8
    )
    other = ", ".join(near or sorted(added)[:8])
    hint = f"; {'similar' if near else 'its special'} names: {other}" if other else ""
    raise DataError(f"separator={name}: is not a token of the tokenizer{hint}")
