"""Files that would take minutes, or all of the memory, end in one line at once."""

import json

import numpy as np
import pytest

from cupytron import config_io, piece_table
from cupytron.config import load_config
from cupytron.data import DataError
from cupytron.data.limits import MOST_GROWTH, growth
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


def regex(expression, content):
    return {"type": "Replace", "pattern": {"Regex": expression}, "content": content}


def sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


def refused(tmp_path, **parts):
    """Why a tokenizer with these parts is not taken."""
    content = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, **parts}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    return str(caught.value)


@pytest.mark.parametrize(
    ("normalizer", "times"),
    [
        (sequence(*[replace("a", "a" * 100)] * 6), "more than a billion"),
        (sequence(*[replace("a", "a" * 1000)] * 90), "more than a billion"),
        (sequence(*[regex("", "a")] * 10), "1,024"),
        (sequence(*[regex("(?=.)|x", "a")] * 10), "1,024"),
        (sequence(*[{"type": "Prepend", "prepend": "a" * 1000}] * 2), "1,000,000"),
        (sequence(*[{"type": "ByteLevel"}] * 20), "more than a billion"),
    ],
)
def test_steps_that_multiply_a_text_are_refused(tmp_path, normalizer, times):
    told = refused(tmp_path, normalizer=normalizer)
    assert f"can make a text {times} times as long; at most {MOST_GROWTH} times" in told


def test_a_pre_tokenizer_works_on_what_a_normalizer_has_made():
    step = {"type": "ByteLevel"}
    assert growth({"normalizer": step, "pre_tokenizer": step, "decoder": step}) == 16


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
def test_very_many_steps_are_refused(tmp_path, part):
    told = refused(tmp_path, **{part: sequence(*[{"type": "Lowercase"}] * 5000)})
    assert f"its {part} has 5,001 steps; at most 100 are taken" in told


def test_megabytes_of_added_tokens_are_refused(tmp_path):
    added = [{"id": n, "content": f"<{n}>{'x' * 3000}"} for n in range(1000)]
    told = refused(tmp_path, added_tokens=added)
    assert "its 1,000 added tokens have 3,004,890 characters; at most 1,048,576 are taken" in told


@pytest.mark.parametrize(
    ("normalizer", "times"),
    [
        (None, 1),
        (replace(" ", "\u2581"), 1),  # SentencePiece's space
        ({"type": "Prepend", "prepend": "\u2581"}, 1),
        (replace("``", '"'), 1),
        (regex(" {2,}", "\u2581"), 1),
        (regex(r"[\r\n]+", " "), 1),
        (regex(r"\s+x", "y"), 1),
        (regex(r"\s*", "y"), 2),
        (replace("", "xy"), 3),
        (sequence(replace("a", "aaa"), replace("a", "aa")), 6),
    ],
)
def test_how_much_longer_steps_make_a_text(normalizer, times):
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
