"""Tokenizers: round trips, streams, separators, hashes, and files that cannot be used."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupytron.data import DataError, load_tokenizer
from cupytron.data.bpe import LibraryTokenizer, train
from cupytron.data.pieces import GPT2_PLACES, cut, training_pieces
from cupytron.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    collect_characters,
    tokenizer_from,
)

CORPUS = [
    "the cat sat on the mat, the dog's hat.\r\n\r\nna\u00efve caf\u00e9 \u6f22\u5b57 1234\n"
] * 20
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\r\t's<|>"))
HARD = [
    "",
    "a",
    "\0",
    "\ufeffbom\r\n",
    "\U0001f469\u200d\U0001f680 \u0e33",
    "x<|endoftext|>y",
    "<|endoftext|>",
    " \u00a0\u3000\u2028\x1c\n\n\n  a",
]


@pytest.fixture(scope="module")
def bpe():
    return train(CORPUS, 290)


def simple_library_tokenizer(**changes):
    """A small word-level tokenizer of the library, not ours."""
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {"[UNK]": 0, "a": 1, "b": 2, "</s>": 3},
            "unk_token": "[UNK]",
        },
    }
    return content | changes


def special(i, content):
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": i, "content": content, "special": True} | flags


def test_byte_ids_are_the_utf8_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a\u00e9") == [97, 195, 169]
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.separator) == ("byte", 257, 256)
    assert tokenizer.decode([97, 256, 98]) == "a<|endoftext|>b"


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.separator not in ids
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == text
        assert tokenizer.text_lengths()[ids].sum() == len(text.encode())
    if text:
        chars = CharTokenizer("".join(sorted(set(text))))
        assert chars.decode(chars.encode(text)) == text
        assert chars.text_lengths()[chars.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("text", HARD)
def test_round_trip_of_hard_texts(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.separator not in ids


@given(st.lists(st.integers(0, 256), max_size=12))
@settings(max_examples=150, deadline=None)
def test_stream_of_any_ids_adds_up_to_decode(bpe, ids):
    for tokenizer in (ByteTokenizer(), bpe):
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_stream_holds_incomplete_characters_back():
    stream = ByteTokenizer().stream()
    assert [stream.push(i) for i in "\U0001f680".encode()] == ["", "", "", "\U0001f680"]
    assert stream.push(0xF0) == "" and stream.finish() == "\ufffd"


def test_char_vocabulary_is_sorted_and_names_what_it_lacks():
    tokenizer = CharTokenizer(collect_characters(["hello", "\u6f22", ""]))
    assert tokenizer.content["characters"] == "ehlo\u6f22"
    assert tokenizer.encode("hole") == [1, 3, 2, 0] and tokenizer.separator is None
    assert tokenizer.encode("") == []
    for text in ("help", "he\u6f23", "\U0001f680\0", "\ud800"):
        with pytest.raises(DataError, match=r"not in the vocabulary of 5 characters.*byte") as info:
            tokenizer.encode(text)
        missing = next(c for c in text if c not in "ehlo\u6f22")
        assert repr(missing) in str(info.value) or ascii(missing) in str(info.value)


def test_lone_surrogates_are_refused(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        with pytest.raises(DataError, match=r"'\\ud800'"):
            tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("ids", [[-1], [0, 1 << 40], [257]])
def test_decode_refuses_ids_outside_the_vocabulary(ids):
    with pytest.raises(DataError, match="vocabulary of 257"):
        ByteTokenizer().decode(ids)


def test_bpe_training_is_deterministic_and_keeps_its_size(bpe):
    assert train(CORPUS, 290).hash == bpe.hash
    assert bpe.vocab_size == 290 and bpe.kind == "bpe" and bpe.separator is not None
    assert train(["ab"], 1000).vocab_size < 1000
    # every byte has an id, seen in training or not
    assert bpe.decode(bpe.encode("\x00\U0001f680")) == "\x00\U0001f680"


def test_bpe_cut_pieces_have_the_ids_of_the_whole(bpe):
    text = (CORPUS[0] + "  x\n\n  -- (a) _ b_ c 's  ") * 4000
    blocks = [text[i : i + 50_000] for i in range(0, len(text), 50_000)]
    pieces = [piece.text for piece in bpe.cut(blocks)]
    assert "".join(pieces) == text and len(pieces) > 5
    ids = [i for piece in pieces for i in bpe.encode(piece)]
    assert ids == bpe.encode(text)
    # only white space after punctuation: GPT-2's pattern splits there too
    text = "\u6f22\u5b57\u3002\n" * 30_000
    pieces = [piece.text for piece in bpe.cut([text])]
    assert len(pieces) > 1 and [i for p in pieces for i in bpe.encode(p)] == bpe.encode(text)
    # a text without a place for a cut: all of it comes, in pieces that share some text
    pieces = list(bpe.cut(["-" * 70_000] * 4))
    assert "".join(p.text[p.before :] for p in pieces) == "-" * 280_000
    assert max(len(p.text) for p in pieces) <= 1 << 16
    assert [p.after for p in pieces[:-1]] == [p.before for p in pieces[1:]]
    assert pieces[0].before == pieces[-1].after == 0


def acgt(count):
    rng = np.random.default_rng(1)
    return "".join(np.array(list("ACGT"))[rng.integers(0, 4, count)])


def test_pieces_to_train_on_are_short_where_there_is_no_place_to_cut():
    """Training time grows with the square of a word's length: 262,144 letters took 8 s, and now 0.4 s."""
    text = acgt(1 << 18)
    pieces = list(training_pieces([text[:100_000], text[100_000:]]))
    assert "".join(pieces) == text and max(map(len, pieces)) == 1 << 11
    # the words beside such a stretch are still cut as before
    words = "the cat sat on the mat\n" * 100
    pieces = list(training_pieces([words + text + words]))
    assert "".join(pieces) == words + text + words
    short = {piece.strip() for piece in pieces if len(piece) < 10 and piece.strip().islower()}
    assert short == set(words.split()) and max(map(len, pieces)) <= 1 << 13


@pytest.mark.parametrize("words", [CORPUS[0], "\u6f22\u5b57\u3002\n", "a b" + "x" * 5000 + " "])
def test_training_on_text_with_spaces_is_what_it_is_on_the_whole(words):
    """Training sees the pieces that are encoded; the tokenizer is that of the uncut text, bit for bit."""
    text = words * (70_000 // len(words))
    blocks = [text[i : i + 30_000] for i in range(0, len(text), 30_000)]
    pieces = list(training_pieces(blocks))
    assert pieces == [piece.text for piece in cut(blocks, GPT2_PLACES)] and len(pieces) > 1
    assert train(pieces, 290).content == train([text], 290).content


def test_save_and_load_keep_hash_and_ids(tmp_path, bpe):
    for tokenizer in (ByteTokenizer(), CharTokenizer("\0a\u6f22"), bpe):
        path = tmp_path / f"{tokenizer.kind}.json"
        tokenizer.save(path)
        loaded = load_tokenizer(path)
        assert (loaded.hash, loaded.kind) == (tokenizer.hash, tokenizer.kind)
        assert (loaded.vocab_size, loaded.separator) == (tokenizer.vocab_size, tokenizer.separator)
        assert loaded.encode("a\u6f22") == tokenizer.encode("a\u6f22")
        # the layout of the file does not matter
        path.write_text(json.dumps(dict(reversed(tokenizer.content.items())), indent=3))
        assert load_tokenizer(path).hash == tokenizer.hash
    assert len({t.hash for t in (ByteTokenizer(), CharTokenizer("a"), CharTokenizer("b"))}) == 3


def test_library_files_are_not_cut_short_filled_up_or_random(bpe):
    content = json.loads(json.dumps(bpe.content))
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    content["model"]["dropout"] = 0.9
    tokenizer = LibraryTokenizer(content, "file")
    text = "the cat sat on the mat"
    assert tokenizer.encode(text) == bpe.encode(text)
    assert tokenizer.hash != bpe.hash


def test_library_tokenizers_of_other_kinds():
    tokenizer = tokenizer_from(simple_library_tokenizer(), "file")
    assert tokenizer.kind == "wordlevel" and tokenizer.text_lengths() is None
    assert tokenizer.separator is None
    ids = tokenizer.encode("a b z")
    assert ids == [1, 2, 0]
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids) == "a b [UNK]"


def test_text_never_becomes_the_separator_in_a_library_file():
    with_separator = simple_library_tokenizer(added_tokens=[special(3, "</s>")])
    tokenizer = tokenizer_from(with_separator, "file")
    assert tokenizer.separator == 3
    # the word is in the model's own vocabulary too
    assert 3 not in tokenizer.encode("a </s> b\0")
    assert tokenizer.encode("a b") == [1, 2]


BAD = {
    "empty": b"",
    "not json": b"{",
    "not utf-8": b"\xff{}",
    "list": b"[]",
    "nothing known": b"{}",
    "version": b'{"cupytron_tokenizer": 2, "kind": "byte"}',
    "kind": b'{"cupytron_tokenizer": 1, "kind": "word"}',
    "extra key": b'{"cupytron_tokenizer": 1, "kind": "byte", "x": 1}',
    "no characters": b'{"cupytron_tokenizer": 1, "kind": "char", "characters": ""}',
    "unsorted": b'{"cupytron_tokenizer": 1, "kind": "char", "characters": "ba"}',
    "repeated": b'{"cupytron_tokenizer": 1, "kind": "char", "characters": "aa"}',
    "surrogate": b'{"cupytron_tokenizer": 1, "kind": "char", "characters": "\\ud800"}',
    "characters as list": b'{"cupytron_tokenizer": 1, "kind": "char", "characters": [1]}',
    "deep": b"[" * 100_000,
    "digits": b'{"model": ' + b"1" * 5000 + b"}",
    "model is null": b'{"model": null}',
    "empty vocabulary": json.dumps(
        simple_library_tokenizer(model={"type": "WordLevel", "vocab": {}, "unk_token": "x"})
    ).encode(),
    "huge id": json.dumps(
        simple_library_tokenizer(
            model={"type": "WordLevel", "vocab": {"a": 4_000_000_000}, "unk_token": "a"}
        )
    ).encode(),
    "missing merge": json.dumps(
        simple_library_tokenizer(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]})
    ).encode(),
    # the library panics on this one
    "bad charsmap": json.dumps(
        simple_library_tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    ).encode(),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_error(tmp_path, name):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(BAD[name])
    with pytest.raises(DataError, match=r"tokenizer\.json") as info:
        load_tokenizer(path)
    assert "\n" not in str(info.value)


def test_panics_while_encoding_are_errors(bpe):
    class Panic(BaseException):
        pass

    class Library:
        def encode_batch_fast(self, *_, **__):
            raise Panic("index out of bounds\nsecond line")

    tokenizer = LibraryTokenizer(bpe.content, "file.json")
    tokenizer._tokenizer = Library()
    with pytest.raises(DataError, match=r"file\.json.*index out of bounds$"):
        tokenizer.encode("a")


def test_missing_and_oversized_files(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(tmp_path / "none.json")
    monkeypatch.setattr("cupytron.data.tokenizers.MAX_FILE_BYTES", 10)
    (tmp_path / "large.json").write_text(json.dumps(ByteTokenizer().content))
    with pytest.raises(DataError, match="larger than 10 bytes"):
        load_tokenizer(tmp_path / "large.json")


def test_bpe_without_the_library_says_what_to_install(monkeypatch, bpe):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for make in (lambda: train(["a"], 300), lambda: tokenizer_from(bpe.content, "file")):
        with pytest.raises(DataError, match="pip install tokenizers"):
            make()
