"""Files that would take minutes, or all of the memory, end in one line at once."""

import json

import numpy as np
import pytest

from cupytron import config_io, piece_table
from cupytron.config import load_config
from cupytron.data import DataError
from cupytron.data.bpe import MOST_GROWTH, growth
from cupytron.data.tokenizers import load_tokenizer
from cupytron.errors import ConfigError

pytestmark = pytest.mark.timeout(20)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\n" + "".join(f"k{i}=1\n" for i in range(90_000)), "larger than 64 KiB"),
        ("a" + ".a" * 30_000 + "=1\n", "line 1 is longer than 8192 bytes"),
        ("[a" + ".a" * 30_000 + "]\n", "line 1 is longer than 8192 bytes"),
        ("a=" + "[" * 8000, "nested too deeply"),
        ("a=" + "9" * 8000, "a number is too long"),
        ("[model]\nd_model" + ".a" * 4000 + "=1\n", "nested too deeply"),
        ("[model.d_model" + ".a" * 1000 + "]\n", "nested too deeply"),
    ],
)
def test_settings(tmp_path, text, words):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(file=tmp_path / "x.toml")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("parts", [100, 1000, 4000, 50_000])
def test_a_value_of_an_option_with_a_key_of_many_parts(parts):
    """At 1,000 parts showing it was too much for Python, and at 50,000 reading it."""
    with pytest.raises(ConfigError, match=r"model\.d_model=.*\.\.\.: must be a whole number$"):
        load_config(overrides=["model.d_model={a" + ".a" * parts + "=1}"])


def test_what_is_nested_as_people_nest_it_is_read():
    assert config_io.read_value("{a.b.c = [[[1]]]}") == {"a": {"b": {"c": [[[1]]]}}}


def test_thousands_of_unknown_keys_are_counted(tmp_path):
    keys = "".join(f"k{i}=1\n" for i in range(6000))
    assert len(keys) < config_io.MAX_BYTES
    (tmp_path / "x.toml").write_text("[train]\n" + keys)
    with pytest.raises(ConfigError) as caught:
        load_config(file=tmp_path / "x.toml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "and 5,980 more errors; mend these first"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": ' + "9" * 5000 + "}", "a number has thousands of digits"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ("{", "not JSON"),
    ],
)
def test_json_is_refused_without_advice_for_programmers(tmp_path, text, words):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "sys." not in str(caught.value) and "recursion" not in str(caught.value)


def replace(text, content):
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def test_replacements_that_multiply_a_text_are_refused(tmp_path):
    steps = [replace("a", "a" * 100)] * 6
    content = {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "normalizer": {"type": "Sequence", "normalizers": steps},
    }
    assert growth(content) == 100**6
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"at most {MOST_GROWTH} times"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("normalizer", "times"),
    [
        (None, 1),
        (replace(" ", "\u2581"), 1),  # SentencePiece's space
        (replace("``", '"'), 1),
        ({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}, 1),
        (replace("", "xy"), 2),
        ({"type": "Sequence", "normalizers": [replace("a", "aaa"), replace("a", "aa")]}, 6),
    ],
)
def test_how_much_longer_replacements_make_a_text(normalizer, times):
    assert growth({"normalizer": normalizer, "pre_tokenizer": None, "model": {}}) == times


def pieces(boxes, shape):
    boxes = np.array(boxes, np.int64)
    sizes = (boxes[:, :, 1] - boxes[:, :, 0]).prod(1)
    zeros = np.zeros(len(boxes), np.int64)
    return piece_table.Pieces(shape, "F32", boxes, np.stack([zeros, sizes], 1), zeros, zeros)


@pytest.mark.parametrize("dims", [1, 2, 12, 40])
def test_forty_thousand_boxes_of_many_dims(dims):
    rows = [[(i, i + 1), *[(0, 1)] * (dims - 1)] for i in range(40_000)]
    shape = (40_000, *(1,) * (dims - 1))
    assert piece_table.untiled("w", pieces(rows, shape)) is None
    rows[7] = rows[8]
    assert piece_table.untiled("w", pieces(rows, shape)) is not None


def test_boxes_that_share_no_corner_are_too_many_to_compare():
    rng = np.random.default_rng(1)
    low = rng.integers(0, 1000, (20_000, 12))
    rows = np.stack([low, low + 1], axis=2)
    found = piece_table.untiled("w", pieces(rows, (1, 20_000, *(1,) * 10)))
    assert found is not None and "too many to compare" in found


def test_one_box_is_the_whole_tensor():
    assert piece_table.untiled("w", pieces([[(0, 3), (0, 4)]], (3, 4))) is None
    assert piece_table.untiled("w", pieces([[(0, 3), (0, 4)]] * 2, (3, 4))) is not None
