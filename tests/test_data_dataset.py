"""`open_dataset`: what a prepared folder offers, and every kind of damage to it."""

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from cupytron.data import DataError, open_dataset, prepare_dataset

TEXT = "the cat sat on the mat\n" * 40


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.txt").write_text(TEXT)
    prepare_dataset([folder / "a.txt"], folder / "char", "char")
    prepare_dataset([folder / "a.txt"], folder / "bpe", "bpe:262")
    return folder


@pytest.fixture
def damaged(prepared, tmp_path):
    return shutil.copytree(prepared / "char", tmp_path / "char")


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "remove"}))


def test_dataset_is_what_was_prepared(prepared):
    dataset = open_dataset(prepared / "char", verify=True)
    assert (dataset.vocab_size, dataset.separator, dataset.tokenizer_kind) == (11, None, "char")
    assert dataset.train.num_tokens == int(len(TEXT) * 0.9) == dataset.train.num_bytes
    tokens = np.concatenate([dataset.train.tokens, dataset.val.tokens])
    assert dataset.tokenizer.decode(tokens) == TEXT
    assert dataset.tokenizer.hash == dataset.tokenizer_hash
    assert dataset.sources == [str(prepared / "a.txt")]
    with pytest.raises(TypeError, match="assignment"):
        dataset.train.tokens[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        dataset.train.tokens[:2][0] = 1


def test_empty_validation_split(prepared, tmp_path):
    prepare_dataset([prepared / "a.txt"], tmp_path / "out", val_fraction=0)
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert dataset.val.num_tokens == dataset.val.num_bytes == 0
    assert dataset.train.num_tokens == len(TEXT)


def test_bpe_comes_with_the_package():
    """The README offers BPE beside byte and char, so it works without an extra."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert any(re.match(r"tokenizers\b", wanted) for wanted in project["dependencies"])


def test_training_needs_no_tokenizers_package(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    dataset = open_dataset(prepared / "bpe")
    assert dataset.train.num_tokens > 0
    with pytest.raises(DataError, match="pip install tokenizers"):
        dataset.tokenizer.decode([0])


SIDECARS = [
    ({"dtype": "int16"}, "dtype="),
    ({"dtype": ["uint16"]}, "dtype="),
    ({"dtype": "uint32"}, "1656 bytes, but train.json has 828 uint32"),
    ({"tokens": 827}, "1656 bytes, but train.json has 827"),
    ({"tokens": -1}, "tokens=-1 cannot be"),
    ({"tokens": True}, "tokens=true"),
    ({"tokens": "828"}, "tokens="),
    ({"tokens": 1 << 80}, "tokens="),
    ({"bytes": 1.5}, "bytes="),
    ({"vocab_size": 0}, "vocab_size=0"),
    ({"vocab_size": "x"}, "vocab_size="),
    ({"separator": 11}, "separator=11"),
    ({"tokenizer": 3}, "tokenizer=3"),
    ({"tokenizer_hash": "ab"}, "tokenizer_hash="),
    ({"tokenizer_hash": "0" * 64}, "made with another tokenizer"),
    ({"sha256": None}, "sha256="),
    ({"sources": "a.txt"}, "sources="),
    ({"format": 2}, "format=2, not 1"),
    ({"tokens": "remove"}, "missing or unknown: tokens"),
    ({"other": 1}, "missing or unknown: other"),
]


@pytest.mark.parametrize(("changes", "message"), SIDECARS)
def test_damaged_sidecars(damaged, changes, message):
    for name in ("train.json", "val.json"):
        if "tokens" not in changes and "dtype" not in changes:
            edit(damaged / name, **changes)
    edit(damaged / "train.json", **changes)
    if changes == {"dtype": "uint32"}:
        edit(damaged / "val.json", **changes)
    with pytest.raises(DataError, match=message) as info:
        open_dataset(damaged)
    assert "\n" not in str(info.value) and "again" in str(info.value)


def test_sidecars_that_disagree(damaged):
    edit(damaged / "val.json", vocab_size=13)
    with pytest.raises(DataError, match=r"train.json has vocab_size=11, but val.json 13"):
        open_dataset(damaged)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"null", b" " * (1 << 20) + b"{}"])
def test_sidecars_that_are_not_json_objects(damaged, data):
    (damaged / "train.json").write_bytes(data)
    with pytest.raises(DataError, match=r"train\.json"):
        open_dataset(damaged)


def test_missing_files(damaged, tmp_path):
    with pytest.raises(DataError, match="no such folder; make it with"):
        open_dataset(tmp_path / "none")
    with pytest.raises(DataError, match=r"no train.json here, so it is no prepared data set"):
        open_dataset(tmp_path)
    for name in ("val.bin", "tokenizer.json", "train.json"):
        (damaged / name).unlink()
        with pytest.raises(DataError, match=name):
            open_dataset(damaged)


def test_ids_of_a_split_that_nobody_reads_are_not_read(damaged):
    flipped = bytearray((damaged / "train.bin").read_bytes())
    flipped[11] ^= 1
    (damaged / "train.bin").write_bytes(flipped)
    assert open_dataset(damaged, checked=["val"]).val.num_tokens > 0
    with pytest.raises(DataError, match=r"train.bin: .*outside the vocabulary"):
        open_dataset(damaged)


def test_truncated_and_flipped_token_files(damaged):
    data = (damaged / "val.bin").read_bytes()
    flipped = bytearray(data)
    flipped[10] ^= 1
    (damaged / "val.bin").write_bytes(flipped)
    open_dataset(damaged)  # the ids are still possible ones
    with pytest.raises(DataError, match=r"val.bin: its SHA-256 .* damaged"):
        open_dataset(damaged, verify=True)
    flipped[11] ^= 1
    (damaged / "val.bin").write_bytes(flipped)
    with pytest.raises(
        DataError, match=r"val.bin: token 5 has id 2.., outside the vocabulary of 11"
    ):
        open_dataset(damaged)
    for size in (0, 1, len(data) - 1, len(data) - 2):
        (damaged / "val.bin").write_bytes(data[:size])
        with pytest.raises(DataError, match=r"val.bin: \d+ bytes, but"):
            open_dataset(damaged)


def test_another_tokenizer_is_found(damaged):
    edit(damaged / "tokenizer.json", characters="abc")
    with pytest.raises(DataError, match="made with another tokenizer"):
        open_dataset(damaged)


def test_vocabulary_that_is_not_the_tokenizers(damaged):
    for name in ("train.json", "val.json"):
        edit(damaged / name, vocab_size=20)
    with pytest.raises(DataError, match=r"tokenizer.json has vocab_size=11.*the tokens 20"):
        _ = open_dataset(damaged).tokenizer
