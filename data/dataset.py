"""A prepared folder: token files, what is written about them, and the checks on both.

train.bin, val.bin    token ids, raw little-endian uint16 or uint32
train.json, val.json  what they hold (`Sidecar`)
tokenizer.json        absent where only the number of ids is known
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupytron import progress

from .errors import DataError
from .tokenizers import (
    MAX_FILE_BYTES,
    Tokenizer,
    content_hash,
    read_json_object,
    tokenizer_from,
)
from .tokens import BLOCK_TOKENS, FileTokens
from .work import set_aside

FILES = ("train.bin", "val.bin", "train.json", "val.json", "tokenizer.json")
FORMAT = 1
_MAX_SIDECAR_BYTES = 1 << 20
_AGAIN = "prepare the data set again"


@dataclass(frozen=True)
class Sidecar:
    """What train.json and val.json hold.

    Attributes:
        bytes: of UTF-8 text behind the tokens, or None where that is not known.
        separator: the id between documents, or None.
        tokenizer, tokenizer_hash: kind and hash of tokenizer.json, or None.
        sha256: of the .bin file.
        sources: what was asked for, for the reader.
    """

    format: int
    dtype: str
    tokens: int
    bytes: int | None
    vocab_size: int
    separator: int | None
    tokenizer: str | None
    tokenizer_hash: str | None
    sha256: str
    sources: list[str]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="ascii")


@dataclass(frozen=True)
class Split:
    """The tokens of one split: one stream.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32, in memory or in a file.
        num_bytes: of UTF-8 text behind them, or None where that is not known.
        name: for messages.
        sha256: of the tokens' file, as its sidecar says; None where there is no file.
        vocab_size: ids are below it; None where that is not known.
    """

    tokens: np.ndarray | FileTokens
    num_bytes: int | None = None
    name: str = "tokens"
    sha256: str | None = None
    vocab_size: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def check_unchanged(self) -> None:
        """Compare the file with its hash again, if its size or time has changed since the last call.

        This costs one call of fstat where nothing has changed.

        Raises:
            DataError: the file holds other tokens than when it was opened.
        """
        if isinstance(self.tokens, FileTokens) and self.tokens.touched():
            self.check(verify=True)

    def check(self, verify: bool) -> None:
        """Compare every id of the file with the vocabulary.

        Args:
            verify: compare the file with its hash, too.

        Raises:
            DataError: an id is not in the vocabulary, or the hash is another.
        """
        assert isinstance(self.tokens, FileTokens) and self.vocab_size is not None
        file, digest, position = self.tokens, hashlib.sha256(), 0
        for block in file.blocks():
            check_ids(block, self.vocab_size, str(file.path), position)
            position += block.size
            if verify:
                digest.update(block.data)
            progress.count(position, self.num_tokens, "tokens")
        if verify and (found := digest.hexdigest()) != self.sha256:
            raise DataError(
                f"{file.path}: its SHA-256 is {found[:16]}..., but {self.name}.json has "
                f"{str(self.sha256)[:16]}...: the file is damaged, or was changed while it was in use; "
                f"{_AGAIN}"
            )


@dataclass(frozen=True)
class Dataset:
    """A prepared folder, opened and checked."""

    path: Path
    train: Split
    val: Split
    vocab_size: int
    separator: int | None
    tokenizer_kind: str | None
    tokenizer_hash: str | None
    sources: list[str]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if the data set has one. Training needs none, so it is read when asked for."""
        if self.tokenizer_hash is None:
            return None
        content = _read_tokenizer(self.path, self.tokenizer_hash)
        tokenizer = tokenizer_from(content, str(self.path / "tokenizer.json"))
        if (tokenizer.vocab_size, tokenizer.separator) != (self.vocab_size, self.separator):
            raise DataError(
                f"{self.path}: tokenizer.json has vocab_size={tokenizer.vocab_size}, "
                f"separator={tokenizer.separator}, but the tokens {self.vocab_size}, "
                f"{self.separator}; {_AGAIN}"
            )
        return tokenizer


def open_dataset(
    path: str | Path, verify: bool = False, checked: Sequence[str] = ("train", "val")
) -> Dataset:
    """Open a prepared folder; every token id is checked against the vocabulary.

    Args:
        path: a folder that `cupytron data prepare` made.
        verify: compare the SHA-256 of the token files too.
        checked: the splits that will be read. The ids of another one are not checked, which takes long.

    Raises:
        DataError: something is missing or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        if old := set_aside(path):
            raise DataError(
                f"{path}: no such folder; a data prepare --overwrite was killed while it replaced this "
                f"data set, and left it in {old}; start that command again, or mv {old} {path}"
            )
        raise DataError(f"{path}: {_instead(path)}")
    train, val = _read_sidecar(path / "train.json"), _read_sidecar(path / "val.json")
    for key in ("dtype", "vocab_size", "separator", "tokenizer", "tokenizer_hash"):
        if getattr(train, key) != getattr(val, key):
            raise DataError(
                f"{path}: train.json has {key}={getattr(train, key)!r}, but val.json "
                f"{getattr(val, key)!r}; {_AGAIN}"
            )
    if train.tokenizer_hash is not None:
        _read_tokenizer(path, train.tokenizer_hash)
    return Dataset(
        path,
        _open_split(path, "train", train, verify, "train" in checked),
        _open_split(path, "val", val, verify, "val" in checked),
        train.vocab_size,
        train.separator,
        train.tokenizer,
        train.tokenizer_hash,
        train.sources,
    )


def _instead(path: Path) -> str:
    """What a path is that is not a folder, and what to give in its place."""
    if not path.exists():
        return f"no such folder; make it with cupytron data prepare SOURCE... --out {path}"
    if path.name in FILES and (path.parent / "train.json").is_file():
        return f"is a file of a data set; give its folder, {path.parent}"
    return f"is a file; make a data set of it with cupytron data prepare {path} --out DIR"


def is_prepared(path: Path) -> bool:
    """Whether a folder holds a prepared data set and nothing else."""
    names = {entry.name for entry in path.iterdir()}
    return {"train.bin", "train.json"} <= names <= set(FILES)


def read_blocks(path: Path, dtype: str) -> Iterator[np.ndarray]:
    """The ids in a file, a block at a time."""
    with open(path, "rb") as file:
        while (block := np.fromfile(file, _little_endian(dtype), BLOCK_TOKENS)).size:
            yield block


def _little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _open_split(path: Path, name: str, sidecar: Sidecar, verify: bool, check: bool) -> Split:
    file = path / f"{name}.bin"
    try:
        tokens = FileTokens(file, _little_endian(sidecar.dtype))
    except DataError as error:
        raise DataError(f"{error}; {_AGAIN}") from error
    expected = sidecar.tokens * tokens.dtype.itemsize
    if tokens.num_bytes != expected:
        raise DataError(
            f"{file}: {tokens.num_bytes} bytes, but {name}.json has {sidecar.tokens} {sidecar.dtype} "
            f"tokens, {expected} bytes; {_AGAIN}"
        )
    split = Split(tokens, sidecar.bytes, name, sidecar.sha256, sidecar.vocab_size)
    if check:
        split.check(verify)
    return split


def check_ids(block: np.ndarray, vocab_size: int, where: str, position: int = 0) -> None:
    """Compare every id of a block with the vocabulary; `position` is that of its first id.

    Raises:
        DataError: an id that is negative, `vocab_size` or larger, and where it stands.
    """
    if block.min() < 0 or block.max() >= vocab_size:
        at = int(((block < 0) | (block >= vocab_size)).argmax())
        raise DataError(
            f"{where}: token {position + at} has id {block[at]}, outside the vocabulary of "
            f"{vocab_size}; give the tokenizer or vocabulary size that the tokens were made with"
        )


def _read_tokenizer(path: Path, expected: str) -> dict[str, Any]:
    file = path / "tokenizer.json"
    content = read_json_object(file, MAX_FILE_BYTES, "tokenizer.json")
    if (found := content_hash(content)) != expected:
        raise DataError(
            f"{file}: its hash is {found[:16]}..., but train.json has {expected[:16]}...: the tokens "
            f"were made with another tokenizer; {_AGAIN}"
        )
    return content


def _read_sidecar(path: Path) -> Sidecar:
    """Read and check every field, one by one, for the file may come from anywhere."""
    if not path.exists():
        folder = path.parent
        if (folder / "config.toml").is_file() and not any(
            (folder / name).exists() for name in FILES[:2]
        ):
            raise DataError(
                f"{folder}: is a run's folder, and no prepared data set; give the folder that "
                "data.path in its config.toml names"
            )
        raise DataError(
            f"{folder}: no {path.name} here, so it is no prepared data set; "
            f"make one with cupytron data prepare {folder} --out DIR, if it holds your text"
        )
    content = read_json_object(path, _MAX_SIDECAR_BYTES, path.name)
    if content.get("format") != FORMAT:
        raise DataError(f"{path}: format={content.get('format')!r}, not {FORMAT}; {_AGAIN}")
    names = set(Sidecar.__dataclass_fields__)
    if names != set(content):
        wrong = ", ".join(sorted(names ^ set(content)))
        raise DataError(f"{path}: missing or unknown: {wrong}; {_AGAIN}")
    sidecar = Sidecar(**content)
    vocab_size = sidecar.vocab_size
    ids = sidecar.tokenizer_hash
    checks = {
        "dtype": sidecar.dtype in ("uint16", "uint32"),
        "tokens": _is_count(sidecar.tokens),
        "bytes": sidecar.bytes is None or _is_count(sidecar.bytes),
        "vocab_size": _is_count(vocab_size) and 1 <= vocab_size <= 1 << 32,
        "separator": sidecar.separator is None
        or (
            _is_count(sidecar.separator)
            and _is_count(vocab_size)
            and sidecar.separator < vocab_size
        ),
        "tokenizer": (isinstance(sidecar.tokenizer, str) if ids else sidecar.tokenizer is None),
        "tokenizer_hash": ids is None or _is_sha256(ids),
        "sha256": _is_sha256(sidecar.sha256),
        "sources": isinstance(sidecar.sources, list)
        and all(isinstance(source, str) for source in sidecar.sources),
    }
    for key, good in checks.items():
        if not good:
            value = json.dumps(content[key])
            raise DataError(f"{path}: {key}={value[:60]} cannot be; {_AGAIN}")
    return sidecar


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
