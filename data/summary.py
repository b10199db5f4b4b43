"""What `cupytron data inspect` tells about a prepared folder."""

from pathlib import Path
from typing import Any

from .dataset import Dataset, Split, open_dataset

_EXCERPT_CHARACTERS = 300


def describe_dataset(path: str | Path) -> dict[str, Any]:
    """Facts about a prepared folder, ready for JSON; its SHA-256 are compared on the way.

    Raises:
        DataError: something is missing or damaged.
    """
    dataset = open_dataset(path, verify=True)
    tokenizer = dataset.tokenizer
    splits = (dataset.train, dataset.val)
    return {
        "path": str(dataset.path),
        "sources": dataset.sources,
        "dtype": dataset.train.tokens.dtype.name,
        "vocab_size": dataset.vocab_size,
        "separator": dataset.separator,
        "tokenizer": dataset.tokenizer_kind,
        "tokenizer_hash": dataset.tokenizer_hash,
        **{split.name: _describe(split) for split in splits},
        "sha256": "verified",
        "excerpt": None if tokenizer is None else _excerpt(dataset),
    }


def _describe(split: Split) -> dict[str, Any]:
    tokens, num_bytes = split.num_tokens, split.num_bytes
    ratio = num_bytes / tokens if num_bytes is not None and tokens else None
    return {"tokens": tokens, "bytes": num_bytes, "bytes_per_token": ratio}


def _excerpt(dataset: Dataset) -> str:
    """The beginning of the training split, as the tokenizer gives it back."""
    assert dataset.tokenizer is not None
    decoder = dataset.tokenizer.stream()
    text = ""
    for token in dataset.train.tokens[: 4 * _EXCERPT_CHARACTERS].tolist():
        text += decoder.push(token)
        if len(text) >= _EXCERPT_CHARACTERS:
            break
    else:
        text += decoder.finish()
    return text[:_EXCERPT_CHARACTERS]
