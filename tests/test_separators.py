"""The token between documents: which one is taken, where the choice is kept, a note if there is none."""

import json

import numpy as np
import pytest
import tokenizer_files
from tokenizers import Tokenizer

from cupytron.cli import main
from cupytron.data import DataError, load_tokenizer, open_dataset, prepare_dataset
from cupytron.data.tokenizers import content_hash, tokenizer_from
from cupytron.data.writer import _Writer

DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
DOCUMENTS = ["the cat sat", "on the mat\n", "hello world"]


def write(folder, content, documents=DOCUMENTS):
    """A tokenizer file and a source of some documents."""
    (folder / "tokenizer.json").write_text(json.dumps(content))
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "text.jsonl").write_text("".join(lines))


def prepare(folder, content, separator=None, documents=DOCUMENTS, **options):
    write(folder, content, documents)
    return prepare_dataset(
        [folder / "text.jsonl"],
        folder / "out",
        folder / "tokenizer.json",
        0,
        separator=separator,
        **options,
    )


def in_vocabulary_alone(name):
    """A tokenizer read from vocab.json and merges.txt and saved by the library: it has no added tokens."""
    content = tokenizer_files.content("gpt2")
    vocabulary = {
        name if token == "<|endoftext|>" else token: i
        for token, i in content["model"]["vocab"].items()
    }
    return content | {
        "added_tokens": [],
        "model": content["model"] | {"vocab": vocabulary},
    }


def special(name):
    return tokenizer_files.byte_level(special=["<|other|>", name])


FOUND = {
    "GPT-2": (lambda: tokenizer_files.content("gpt2"), "<|endoftext|>"),
    "nanochat": (lambda: special("<|bos|>"), "<|bos|>"),
    "DeepSeek": (lambda: special(DEEPSEEK), DEEPSEEK),
    "vocabulary alone": (lambda: in_vocabulary_alone("<|endoftext|>"), "<|endoftext|>"),
    "vocabulary alone, DeepSeek": (lambda: in_vocabulary_alone(DEEPSEEK), DEEPSEEK),
    "BERT": (lambda: tokenizer_files.content("wordpiece"), "[SEP]"),
    "an ordinary added token": (
        lambda: tokenizer_files.with_added(special("<x>"), ("<|endoftext|>", {})),
        "<|endoftext|>",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_known_name_stands_between_documents(tmp_path, name):
    make, separator = FOUND[name]
    content = make()
    # the name written out in a text is text
    documents = [*DOCUMENTS, f"a {separator} b"]
    result = prepare(tmp_path, content, documents=documents)
    assert not any("run together" in note for note in result.notes)
    dataset = open_dataset(tmp_path / "out")
    tokenizer = dataset.tokenizer
    ids = dataset.train.tokens[:].tolist()
    assert tokenizer.decode([dataset.separator]) == separator
    assert ids.count(dataset.separator) == len(documents) - 1
    parts = [tokenizer.encode(text) for text in documents]
    assert ids == [i for part in parts for i in (*part, dataset.separator)][:-1]
    if name != "BERT":
        # it is no text
        assert tokenizer.text_lengths()[dataset.separator] == 0
        assert result.train.bytes == sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize("name", FOUND)
def test_the_choice_is_kept_in_tokenizer_json(tmp_path, name):
    """Each reader of the file finds the choice: a run's folder, another data set, the library."""
    content = FOUND[name][0]()
    result = prepare(tmp_path, content)
    saved = tmp_path / "out" / "tokenizer.json"
    loaded = load_tokenizer(saved)
    assert (loaded.separator, loaded.hash) == (result.train.separator, result.train.tokenizer_hash)
    # a file whose separator was found before is kept as it is
    assert (loaded.hash == content_hash(content)) == (name == "GPT-2")
    assert loaded.with_separator(None) is loaded
    library = Tokenizer.from_str(saved.read_text())
    assert library.token_to_id(FOUND[name][1]) == loaded.separator
    assert library.encode("the cat", add_special_tokens=False).ids == loaded.encode("the cat")


def test_a_file_without_a_mark_is_read_as_before():
    """Data sets and runs of earlier versions keep their separator, or go on without one."""
    for content in (special("<|bos|>"), in_vocabulary_alone("<|endoftext|>")):
        assert tokenizer_from(content, "file").separator is None


def test_another_token_is_chosen_by_name(tmp_path):
    content = tokenizer_files.byte_level(special=["<|endoftext|>", "<|doc|>"])
    result = prepare(tmp_path, content, "<|doc|>")
    assert result.train.separator == 1
    # the mark can move
    other = load_tokenizer(tmp_path / "out" / "tokenizer.json").with_separator("<|endoftext|>")
    assert other.separator == 0 and 1 in other.special
    assert json.dumps(other.content).count("cupytron") == 1


def test_a_name_that_is_no_token_is_refused_with_near_ones(tmp_path):
    content = tokenizer_files.byte_level(special=["<|endoftext|>", "<|document|>"])
    with pytest.raises(
        DataError, match=r"separator=<\|documents\|>.*similar names: <\|document\|>"
    ):
        prepare(tmp_path, content, "<|documents|>")
    with pytest.raises(DataError, match=r"separator=zzzz.*special names: <\|document\|>, <\|endof"):
        prepare(tmp_path, content, "zzzz")
    assert not (tmp_path / "out").exists()


def test_a_word_that_bpe_has_learnt_is_no_separator(tmp_path):
    parts = ["<", "/", "s", ">", "a", " ", "</", "s>", "</s>"]
    model = {
        "type": "BPE",
        "vocab": {part: i for i, part in enumerate(parts)},
        "merges": [["<", "/"], ["s", ">"], ["</", "s>"]],
    }
    result = prepare(tmp_path, {"added_tokens": [], "model": model}, documents=["a </s> a", "a"])
    assert result.train.separator is None
    assert result.train.tokens == 6


def test_documents_that_run_together_are_told(tmp_path):
    content = special("<x>")
    result = prepare(tmp_path, content)
    (note,) = result.notes
    assert "the 3 documents run together" in note and "--separator TOKEN" in note
    # one document has nothing to run into
    assert prepare(tmp_path, content, documents=DOCUMENTS[:1], overwrite=True).notes == []
    chars = prepare_dataset([tmp_path / "text.jsonl"], tmp_path / "chars", "char", 0)
    assert chars.notes == []
    write(tmp_path, content)
    chars = prepare_dataset([tmp_path / "text.jsonl"], tmp_path / "chars2", "char", 0)
    assert "run together" in chars.notes[0] and "byte and bpe:SIZE have one" in chars.notes[0]


def test_a_document_that_begins_with_nothing_has_its_separator(tmp_path):
    """70,000 spaces are longer than a piece, and WordPiece has no ids for them."""
    content = tokenizer_files.content("wordpiece")
    documents = ["the cat", " " * 70_000 + "hello world", " ", "the mat"]
    assert prepare(tmp_path, content, documents=documents).train.separator is not None
    dataset = open_dataset(tmp_path / "out")
    text = dataset.tokenizer.decode(dataset.train.tokens[:].tolist())
    assert text == "the cat [SEP] hello world [SEP] the mat"


def test_the_writer_waits_for_the_first_ids_of_a_document(tmp_path):
    none = np.array([], np.uint32)
    parts = [(True, [1]), (True, none), (False, [2]), (True, none), (True, [3]), (True, [9, 4])]
    with open(tmp_path / "out.bin", "wb") as file:
        writer = _Writer(file, "uint16", 9)
        for first, ids in parts:
            writer.write(first, np.array(ids, np.uint32))
    # the last document brings its own
    assert np.fromfile(tmp_path / "out.bin", "<u2").tolist() == [1, 9, 2, 9, 3, 9, 4]
    assert writer.documents == 4


def test_the_flag(tmp_path, monkeypatch, capsys):
    write(tmp_path, tokenizer_files.byte_level(special=["<|doc|>"]))
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as info:
            main.run(["data", "prepare", "text.jsonl", "--out", "out", *words])
        return info.value.code, capsys.readouterr().err

    code, error = call("--separator", "<|doc|>")
    assert code == 2 and "is for --tokenizer FILE" in error
    code, error = call("--tokenizer", "tokenizer.json", "--separator", "<|docs|>")
    assert code == 1 and "similar names: <|doc|>" in error
    assert not (tmp_path / "out").exists()
    assert "--separator TOKEN" in call("--tokenizer", "tokenizer.json")[1]
    words = ("--tokenizer", "tokenizer.json", "--separator", "<|doc|>", "--overwrite")
    code, error = call(*words)
    assert code == 0 and "note" not in error
    assert open_dataset(tmp_path / "out").separator == 0
