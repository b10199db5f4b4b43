"""Tokenizers of every kind: the text after a prompt, the ids of documents that are cut, counted bytes."""

import json
import unicodedata

import numpy as np
import pytest
import tokenizer_files
from hypothesis import given, settings
from hypothesis import strategies as st

from cupytron.data import open_dataset, pieces, prepare_dataset
from cupytron.data.pieces import Joiner
from cupytron.data.tokenizers import tokenizer_from

KINDS = list(tokenizer_files.MAKERS)
PROMPTS = ["", "hello world", "The cat", " the", "caf\u00e9 \u6f22", "hello </s> world", "cat,"]


def load(kind):
    return tokenizer_from(tokenizer_files.content(kind), kind)


def file(folder, content):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def streamed(tokenizer, prompt, ids):
    stream = tokenizer.stream(prompt)
    return "".join(map(stream.push, ids)) + stream.finish()


# --- text goes on as all ids are decoded


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_goes_on_as_its_ids_and_the_new_ones_are_decoded(kind):
    """The new ids are random: special ones, halves of characters and bytes among them."""
    tokenizer = load(kind)
    rng = np.random.default_rng(1)
    text_ids = tokenizer.encode("the cat \u6f22\u5b57 lowest hello")
    went_on = 0
    for trial in range(90):
        prompt = tokenizer.encode(PROMPTS[trial % len(PROMPTS)])
        ids = rng.integers(0, tokenizer.vocab_size, rng.integers(0, 9)).tolist()
        if trial % 3 == 0:
            ids = text_ids[trial % 5 :] + ids
        before, after = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
        text = streamed(tokenizer, prompt, ids)
        went_on += after.startswith(before)
        assert after.endswith(text)
        if after.startswith(before):
            assert before + text == after, (prompt, ids)
    assert went_on > 70


@pytest.mark.parametrize(
    "kind", ["llama2", "metaspace first", "metaspace always", "unigram", "wordpiece"]
)
def test_the_space_between_prompt_and_text_is_kept(kind):
    tokenizer = load(kind)
    prompt, new = tokenizer.encode("hello world"), tokenizer.encode("the cat")
    assert "hello world" + streamed(tokenizer, prompt, new) == "hello world the cat"
    # without a prompt, a text is decoded as the beginning of a document
    assert streamed(tokenizer, [], new) == "the cat"


@pytest.fixture(scope="module")
def gpt2():
    return load("gpt2")


@given(st.lists(st.sampled_from([65, *range(256)]), max_size=12), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_bytes_of_a_prompt_are_completed(gpt2, values, cut):
    """Any bytes are ids, and the prompt ends anywhere, even inside a character."""
    tokenizer = gpt2
    ids = [tokenizer.token_bytes.index(bytes([b])) for b in values]
    text = streamed(tokenizer, ids[:cut], ids[cut:])
    before, after = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    assert after.endswith(text)
    if after.startswith(before):
        assert before + text == after


def test_a_run_of_byte_tokens_is_decoded_as_a_whole():
    """If one byte in a row of byte tokens is wrong, the library replaces all of the row."""
    tokenizer = load("llama2")
    ids = tokenizer.encode("\u6f22")[1:]
    assert len(ids) == 3
    for new in (ids + ids, ids + ids[:1], ids[:2], ids[:1] + tokenizer.encode("the") + ids):
        assert "hello" + streamed(tokenizer, tokenizer.encode("hello"), new) == tokenizer.decode(
            tokenizer.encode("hello") + new
        )


# --- ids do not depend on cuts

LONG = {
    "words": "The cat sat on the mat, lowest hello world <mark> caf\u00e9s 1234.\n",
    "no white space": "thecathelloworld\u6f22lowest,<mark>",
    "one letter": "-",
    "runs of spaces": "hello   \n\n\t  " + " " * 90 + "world the ",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", LONG)
def test_ids_of_long_documents_are_those_of_the_whole(monkeypatch, tmp_path, kind, text):
    """Documents of seven short pieces or more are cut at every offset from words and added tokens."""
    monkeypatch.setattr(pieces, "_PIECE", 97)
    monkeypatch.setattr(pieces, "_LONGEST_PIECE", 571)
    monkeypatch.setattr(pieces, "_OVERLAP", 150)
    document = (LONG[text] * 4000)[:5000]
    content = tokenizer_files.content(kind)
    assert len(list(load(kind).cut([document]))) >= 7
    (tmp_path / "text.txt").write_text(document)
    prepare_dataset([tmp_path / "text.txt"], tmp_path / "out", file(tmp_path, content), 0)
    ids = open_dataset(tmp_path / "out").train.tokens[:].tolist()
    assert ids == tokenizer_files.whole(content, document)


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "wordpiece"])
def test_ids_of_long_documents_with_pieces_as_they_are(tmp_path, kind):
    text = "The cat, hello world <mark> lowest caf\u00e9s 12345;\n two  spaces" * 2
    document = (text * 300)[:12_000] + "acgt" * 18_000 + text
    content = tokenizer_files.content(kind)
    (tmp_path / "text.txt").write_text(document)
    result = prepare_dataset([tmp_path / "text.txt"], tmp_path / "out", file(tmp_path, content), 0)
    ids = open_dataset(tmp_path / "out").train.tokens[:].tolist()
    assert ids == tokenizer_files.whole(content, document)
    assert not any("had to be cut" in note for note in result.notes)


def test_a_place_that_could_not_be_joined_is_told(monkeypatch, tmp_path):
    """A word of WordPiece above 100 characters is one unknown token, wherever it is cut."""
    monkeypatch.setattr(pieces, "_LONGEST_PIECE", 700)
    monkeypatch.setattr(pieces, "_OVERLAP", 100)
    monkeypatch.setattr(pieces, "_LONGEST_JOINED", 2000)
    document = "the cat " + "x" * 5000 + " hello world"
    (tmp_path / "text.txt").write_text(document)
    content = tokenizer_files.content("wordpiece")
    result = prepare_dataset([tmp_path / "text.txt"], tmp_path / "out", file(tmp_path, content), 0)
    assert any("had to be cut at" in note for note in result.notes)
    dataset = open_dataset(tmp_path / "out")
    text = dataset.tokenizer.decode(dataset.train.tokens[:].tolist())
    assert text.startswith("the cat [UNK]") and text.endswith("[UNK] hello world")


def test_joined_texts_are_the_document(monkeypatch):
    """No character is lost or doubled, also where pieces have no token in common."""
    monkeypatch.setattr(pieces, "_LONGEST_PIECE", 300)
    monkeypatch.setattr(pieces, "_OVERLAP", 40)
    monkeypatch.setattr(pieces, "_LONGEST_JOINED", 800)
    tokenizer = load("wordpiece")
    document = "the cat sat " * 60 + "x" * 3000 + " lowest hello" * 80
    joiner = Joiner(lambda text: tokenizer.encode_tokens([text])[0])
    joined = [
        text
        for piece in tokenizer.cut([document])
        for text, _ in joiner.add(piece, tokenizer.encode_tokens([piece.text])[0])
    ]
    assert "".join(joined) == document and joiner.unproved


# --- bytes are counted where the ids have just those of the text


def prepared(folder, content, documents, **options):
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    options.setdefault("val_fraction", 0)
    return prepare_dataset([path], folder / "out", file(folder, content), **options)


PLAIN = ["The cat, sat on 12 mats.\n", "hello  world", "caf\u00e9 \u6f22 \U0001f680"]
DROPPED = [chr(c) for c in (0xF1, 0xF2, 0xF3)]  # first bytes of characters that are rare


def without_symbols(content):
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    names = {token: i for token, i in vocabulary.items() if not any(c in token for c in DROPPED)}
    kept = [m for m in merges if not any(c in part for part in m for c in DROPPED)]
    model = content["model"] | {"vocab": names, "merges": kept}
    return content | {"model": model}


LOSSLESS = {
    "gpt2": lambda: tokenizer_files.content("gpt2"),
    "gpt4": lambda: tokenizer_files.content("gpt4"),
    "nfc": lambda: tokenizer_files.content("nfc"),
    "empty normalizer": lambda: (
        tokenizer_files.content("gpt4") | {"normalizer": {"type": "Sequence", "normalizers": []}}
    ),
    "missing symbols": lambda: without_symbols(tokenizer_files.content("gpt2")),
    "digits": lambda: tokenizer_files.byte_level(
        tokenizer_files.pre_tokenizers.Digits(individual_digits=True),
        tokenizer_files.ByteLevel(add_prefix_space=False),
    ),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_bytes_are_counted_of_tokenizers_that_keep_them(tmp_path, name):
    result = prepared(tmp_path, LOSSLESS[name](), PLAIN, val_fraction=0.3)
    assert result.notes == []
    assert result.train.bytes + result.val.bytes == sum(len(text.encode()) for text in PLAIN)


LOSSY = {
    "prefix space": (lambda: tokenizer_files.content("prefix space"), PLAIN, "' The cat"),
    "white space": (
        lambda: tokenizer_files.byte_level(
            tokenizer_files.pre_tokenizers.Whitespace(),
            tokenizer_files.ByteLevel(add_prefix_space=False),
        ),
        PLAIN,
        "'The cat, sat on 12",
    ),
    "commas": (
        lambda: tokenizer_files.byte_level(
            tokenizer_files.Split(",", "removed"),
            tokenizer_files.ByteLevel(add_prefix_space=False),
        ),
        PLAIN,
        "'The cat, sat",
    ),
    "lstrip": (
        lambda: tokenizer_files.content("gpt2 added"),
        [*PLAIN, "a <mark> b"],
        "'a <mark> b' becomes 'a<mark>b'",
    ),
    "nfc": (
        lambda: tokenizer_files.content("nfc"),
        [*PLAIN, unicodedata.normalize("NFD", "caf\u00e9")],
        "'cafe",
    ),
    "lower case": (
        lambda: tokenizer_files.byte_level(normalizer=tokenizer_files.normalizers.Lowercase()),
        PLAIN,
        "becomes 'the cat",
    ),
    "missing symbols": (
        lambda: without_symbols(tokenizer_files.content("gpt2")),
        [*PLAIN, "flag \U000e0067"],
        "'flag",
    ),
    "unigram": (lambda: tokenizer_files.content("unigram"), PLAIN, "unigram tokenizer may not"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_bytes_that_are_not_kept_are_told_and_not_counted(tmp_path, name):
    make, documents, part = LOSSY[name]
    result = prepared(tmp_path, make(), documents, val_fraction=0.3)
    assert result.train.bytes is None and result.val.bytes is None
    (note,) = result.notes
    assert part in note and "bytes of text are not counted" in note


def test_bytes_of_ids_without_their_text_are_counted_if_common_texts_are_kept(tmp_path):
    np.array([5, 6, 7], "<u2").tofile(tmp_path / "ids.bin")
    for kind, counted in (("gpt2", True), ("nfc", True), ("prefix space", False)):
        path = file(tmp_path, tokenizer_files.content(kind))
        out = tmp_path / kind
        result = prepare_dataset([tmp_path / "ids.bin"], out, path, 0)
        assert (result.train.bytes is not None) == counted
        assert len(result.notes) == (not counted)
