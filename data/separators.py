"""The token between documents: which one a tokenizer file of Hugging Face has.

A separator is chosen once, when a data set is prepared. What was chosen is written into tokenizer.json, as
a mark on one of its added tokens, which the tokenizers library passes over. So the hash of tokenizer.json
covers the choice, and whoever reads the file later (training, sampling) finds it there. A file without a
mark has the first of `NAMES_WITHOUT_MARK` that is a special token.
"""

import difflib
from collections.abc import Collection
from typing import Any

from .errors import DataError

# what the end of a text is called in GPT-2 and Qwen, Llama 3, Llama 2, Gemma
NAMES_WITHOUT_MARK = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# A turn's end, such as <|im_end|> or <|eot_id|>, is no document's end. <|bos|> (nanochat) and [SEP]
# (BERT) stand between documents for want of anything else.
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
    """The name of the added token that carries the mark."""
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get(_MARK[0]) == _MARK[1]:
            return str(token.get("content"))
    return None


def mark(content: dict[str, Any], name: str, i: int) -> dict[str, Any]:
    """A copy of a tokenizer's content in which the token of that name and id carries the mark.

    A token of the vocabulary alone becomes an added one, special as a separator is.
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
            # also where it was an ordinary added token: no text is to be encoded to it
            token |= {"special": True, _MARK[0]: _MARK[1]}
    return {**content, "added_tokens": added}


def require(name: str, vocabulary: Collection[str], added: Collection[str]) -> None:
    """Raise a DataError with near names for a name that is no token."""
    if name in vocabulary:
        return
    near = difflib.get_close_matches(name, added, 3, 0.5) or difflib.get_close_matches(
        name, vocabulary, 3, 0.8
    )
    other = ", ".join(near or sorted(added)[:8])
    hint = f"; {'near' if near else 'its special'} names: {other}" if other else ""
    raise DataError(f"separator={name}: is no token of the tokenizer{hint}")
