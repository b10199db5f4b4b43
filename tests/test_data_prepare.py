"""`prepare_dataset`: what each source becomes, the split, memory, and what stops it."""

import contextlib
import hashlib
import http.server
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from cupytron.data import DataError, corpora, open_dataset, prepare_dataset
from cupytron.data.tokenizers import ByteTokenizer, CharTokenizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def stream(folder="out"):
    """All tokens of a prepared folder, as ints."""
    dataset = open_dataset(folder, verify=True)
    return np.concatenate([dataset.train.tokens, dataset.val.tokens]).tolist()


def test_text_is_kept_byte_for_byte(here):
    text = "\ufeffa\r\nb\r\0c\u2028\U0001f680".encode()
    write(here / "a.txt", text)
    prepare_dataset(["a.txt"], "out")
    assert bytes(stream()) == text
    assert sorted(p.name for p in here.iterdir()) == ["a.txt", "out"]


@pytest.mark.parametrize("fraction", [0, 0.1, 0.3, 0.5, 0.999])
def test_split_is_the_last_fraction_and_counts_bytes(here, fraction):
    text = ("\u6f22\u00e9a" * 400)[:1000]
    write(here / "a.txt", text)
    for tokenizer in ("byte", "char", "bpe:260"):
        prepare_dataset(["a.txt"], "out", tokenizer, fraction, overwrite=True)
        dataset = open_dataset("out", verify=True)
        total = dataset.train.num_tokens + dataset.val.num_tokens
        assert dataset.train.num_tokens == int(total * (1 - fraction))
        assert dataset.train.num_bytes + dataset.val.num_bytes == len(text.encode())
        ids = dataset.tokenizer.encode(text)
        assert stream() == ids
        lengths = dataset.tokenizer.text_lengths()
        assert dataset.val.num_bytes == lengths[ids[dataset.train.num_tokens :]].sum()
        assert dataset.train.tokens.dtype == np.uint16


def test_documents_are_separated_where_the_tokenizer_has_a_separator(here):
    for name, text in {"a": "x", "b": "", "c": "y<|endoftext|>"}.items():
        write(here / f"{name}.txt", text)
    names = ["a.txt", "b.txt", "c.txt"]
    prepare_dataset(names, "byte")
    assert stream("byte") == [ord("x"), 256, *b"y<|endoftext|>"]
    prepare_dataset(names, "bpe", "bpe:257")
    ids = stream("bpe")
    separator = open_dataset("bpe").separator
    assert ids.count(separator) == 1 and ids[1] == separator
    assert open_dataset("bpe").train.num_bytes + open_dataset("bpe").val.num_bytes == 15
    prepare_dataset(names, "char", "char")
    assert len(stream("char")) == 15 and open_dataset("char").separator is None


def test_folder_is_read_in_order_and_skips_what_is_no_text(here):
    for name, data in {
        "b.txt": "2",
        "a.txt": "1",
        "z/a.txt": "4",
        "c/d.py": "3",
        "image.png": b"\x89PNG\xff",
        "nul.txt": b"a\0b",
        "late.txt": b"a" * (1 << 20) + b"\xff",
        "tokens.bin": b"aa",
        ".hidden": "x",
        ".git/config": "x",
        "runs/demo/config.toml": "x",
        "runs/demo/checkpoints/saved": "x",
    }.items():
        write(here / "in" / name, data)
    os.symlink(here / "in", here / "in" / "loop")
    result = prepare_dataset(["in"], "in/out")
    assert bytes(i for i in stream("in/out") if i < 256) == b"1234"
    assert result.notes == [
        "in: skipped 1 file of token ids (give it by name): tokens.bin",
        "in: skipped 3 files that are not UTF-8 text: image.png, late.txt, nul.txt",
        "in: skipped 2 hidden files and folders: .git, .hidden",
        "in: skipped 1 link to a folder (give the folder by name): loop",
        "in: skipped 1 run's folder: runs/demo",
        "the validation split has 1 token, and a loss needs 2; give a larger --val-fraction or more text",
    ]
    # the output is no source
    prepare_dataset(["in"], "in/out", overwrite=True)
    assert bytes(i for i in stream("in/out") if i < 256) == b"1234"


def test_jsonl_is_a_document_a_line(here):
    lines = [{"text": "a\r\n"}, {"text": "", "x": 1}, {"text": "\u00e9", "body": "z"}]
    data = "\ufeff" + "\r\n\n".join(json.dumps(line) for line in lines)
    write(here / "a.jsonl", data)
    prepare_dataset(["a.jsonl"], "out")
    assert stream() == [*b"a\r\n", 256, 0xC3, 0xA9]
    write(here / "b" / "b.jsonl", '{"body": "q"}')
    prepare_dataset(["b"], "out", text_field="body", overwrite=True, val_fraction=0)
    assert stream() == [ord("q")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not JSON"),
        ("[1]", "line 3: list, not an object"),
        ('{"body": "a"}', "line 3: no field 'text'; its fields: 'body'"),
        ('{"text": 1}', "line 3: field 'text' is int"),
        ('{"text": "a\\ud800"}', r"line 3: '\\ud800'"),
        (b'{"text": "\xff"}', "line 3: not UTF-8 at byte 10"),
        ("[" * 100_000, "line 3: not JSON"),
    ],
)
def test_bad_jsonl_names_the_line(here, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    write(here / "a.jsonl", b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match="a.jsonl, " + message):
        prepare_dataset(["a.jsonl"], "out")
    assert os.listdir() == ["a.jsonl"]


def test_nanogpt_bin_with_vocab_size_or_tokenizer(here):
    ids = np.array([1, 2, 0, 2] * 5, "<u2")
    write(here / "a.bin", ids.tobytes())
    # loading this would fail, and might do anything else
    write(here / "meta.pkl", pickle.dumps({"vocab_size": 2})[:-3])
    result = prepare_dataset(["a.bin"], "out", vocab_size=3, val_fraction=0.5)
    dataset = open_dataset("out", verify=True)
    assert stream() == ids.tolist() and dataset.vocab_size == 3
    assert dataset.tokenizer is None and dataset.train.num_bytes is None
    assert not (here / "out" / "tokenizer.json").exists() and len(result.notes) == 1

    CharTokenizer("a\u00e9\u6f22").save("chars.json")
    prepare_dataset(["a.bin"], "out", "chars.json", val_fraction=0.5, overwrite=True)
    dataset = open_dataset("out")
    assert dataset.tokenizer.decode(dataset.val.tokens[:3]) == "a\u6f22\u00e9"
    assert dataset.train.num_bytes == 2 * (2 + 3 + 1 + 3) + (2 + 3)

    # no second separator after a document that ends with one
    ByteTokenizer().save("bytes.json")
    write(here / "b.bin", np.array([65, 256], "<u2").tobytes())
    write(here / "c.txt", "c")
    prepare_dataset(["b.bin", "c.txt", "b.bin"], "out", "bytes.json", 0, overwrite=True)
    assert stream() == [65, 256, ord("c"), 256, 65, 256]


def test_large_vocabulary_takes_uint32(here):
    write(here / "a.bin", np.array([65535, 1], "<u2").tobytes())
    prepare_dataset(["a.bin"], "out", vocab_size=65537)
    assert open_dataset("out").train.tokens.dtype == np.uint32 and stream() == [65535, 1]
    prepare_dataset(["a.bin"], "out", vocab_size=65536, overwrite=True)
    assert open_dataset("out").train.tokens.dtype == np.uint16


BAD = [
    (["none.txt"], {}, "none.txt: no such file.*named corpora are python-docs"),
    (["./none.txt"], {}, "none.txt: no such file"),
    (["empty.txt"], {}, "no text in the sources"),
    (["empty.txt"], {"tokenizer": "char"}, "no text in the sources"),
    (["empty.bin"], {"vocab_size": 3}, "no text in the sources"),
    (["void"], {}, "no UTF-8 text files"),
    (["latin.txt"], {}, "not UTF-8 text at byte 1048577; .*iconv"),
    (["latin.txt"], {"tokenizer": "bpe:300"}, "not UTF-8 text at byte 1048577"),
    (["cut.txt"], {}, "not UTF-8 text at byte 1;"),
    (["odd.bin"], {"vocab_size": 70}, "3 bytes are not a whole number of uint16"),
    (["ids.bin"], {"vocab_size": 70}, "token 600001 has id 70, outside the vocabulary of 70"),
    (["ids.bin"], {}, "give --vocab-size N, or the tokenizer"),
    (["ids.bin"], {"tokenizer": "byte"}, "give --vocab-size N, or the tokenizer"),
    (["a.txt"], {"vocab_size": 70}, "a.txt: text needs a tokenizer"),
    (["a.txt"], {"vocab_size": 70, "tokenizer": "byte"}, "exclude each other"),
    (["a.txt"], {"vocab_size": 0}, "vocab_size=0"),
    (["a.txt"], {"val_fraction": 1}, "val_fraction=1 "),
    (["a.txt"], {"val_fraction": -0.1}, "val_fraction=-0.1"),
    (["a.txt"], {"val_fraction": float("nan")}, "val_fraction=nan"),
    (["one.txt"], {"val_fraction": 0.5}, "leave none to train on"),
    (["a.txt"], {"tokenizer": "word"}, "tokenizer=word is neither byte, char"),
    (["a.txt"], {"tokenizer": "bpe:x"}, "tokenizer=bpe:x: SIZE"),
    (["a.txt"], {"tokenizer": "bpe:256"}, "tokenizer=bpe:256: SIZE"),
    (["a.txt"], {"tokenizer": "bpe:" + "9" * 5000}, "SIZE must be"),
    (["a.txt"], {"tokenizer": "a.txt"}, "a.txt: a tokenizer is not JSON"),
    (["run"], {}, "run: is a run's folder, whose settings and records are no corpus"),
    (
        ["a.txt"],
        {"tokenizer": "run"},
        "tokenizer=run is a folder; give the file in it, run/tokenizer.json",
    ),
    (["a.txt"], {"tokenizer": "chars.json"}, "not in the vocabulary of 1 characters: 'a'"),
    (["pipe"], {}, "not a regular file"),
    (["a.txt", ""], {}, "a source is empty; give a file or a folder"),
    ([], {}, "no sources given"),
]


@pytest.mark.parametrize(("sources", "settings", "message"), BAD)
def test_bad_input_is_one_error_and_leaves_nothing(here, sources, settings, message):
    write(here / "empty.txt", "")
    write(here / "empty.bin", "")
    write(here / "a.txt", "abc")
    write(here / "one.txt", "a")
    write(here / "latin.txt", b"a" * (1 << 20) + "\u00e9".encode()[:1] + b"\xff")
    write(here / "cut.txt", b"a\xc3")
    write(here / "odd.bin", b"abc")
    ids = np.zeros(600_002, "<u2")
    ids[-1] = 70
    write(here / "ids.bin", ids.tobytes())
    write(here / "void" / "x.png", b"\xff")
    CharTokenizer("z").save("chars.json")
    for name in ("config.toml", "tokenizer.json", "checkpoints/x"):
        write(here / "run" / name, "")
    os.mkfifo("pipe")
    # the first byte of the character and the one after it stand in two blocks
    if sources == ["latin.txt"]:
        message = message.replace("1048577", "1048576")
    before = sorted(os.listdir())
    with pytest.raises(DataError, match=message) as info:
        prepare_dataset(sources, "out", **settings)
    assert sorted(os.listdir()) == before and "\n" not in str(info.value)


def test_output_folder_is_never_overwritten_by_chance(here):
    write(here / "a.txt", "abcdef")
    write(here / "b.txt", "ghijkl")
    write(here / "mine" / "train.bin", "x")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="holds other files"):
            prepare_dataset(["a.txt"], "mine", overwrite=overwrite)
        with pytest.raises(DataError, match="a file; choose a folder"):
            prepare_dataset(["a.txt"], "b.txt", overwrite=overwrite)
    (here / "out").mkdir()
    prepare_dataset(["a.txt"], "out")
    with pytest.raises(DataError, match="give --overwrite"):
        prepare_dataset(["b.txt"], "out")
    # a failure leaves the old one
    with pytest.raises(DataError):
        prepare_dataset(["none"], "out", overwrite=True)
    assert bytes(stream()) == b"abcdef"
    prepare_dataset(["b.txt"], "out", overwrite=True)
    assert bytes(stream()) == b"ghijkl"
    write(here / "out" / "notes.md", "mine")
    with pytest.raises(DataError, match="holds other files"):
        prepare_dataset(["b.txt"], "out", overwrite=True)


def test_interrupted_prepare_leaves_nothing(here, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cupytron.data.writer._count", interrupt)
    write(here / "a.txt", "abcdef")
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(["a.txt"], "out")
    assert os.listdir() == ["a.txt"]


def test_the_same_text_gives_the_same_files(here):
    write(here / "a.txt", "the cat sat on the mat. " * 100)
    for tokenizer in ("byte", "char", "bpe:280"):
        results = [prepare_dataset(["a.txt"], out, tokenizer, overwrite=True) for out in "xy"]
        assert results[0].train == results[1].train and results[0].val == results[1].val


def test_python_corpora(here, monkeypatch):
    write(here / "python-docs", "a file of that name")
    result = prepare_dataset(["python-docs"], "docs", "char")
    assert result.train.tokens + result.val.tokens > 300_000
    assert result.notes[0] == "python-docs is the named corpus; write ./python-docs for the file"
    assert re.match(r"the \d+ documents run together: this char tokenizer", result.notes[1])
    prepare_dataset(["./python-docs"], "file", val_fraction=0)
    assert bytes(stream("file")) == b"a file of that name"

    library = here / "lib"
    for name in ("b.py", "a.py", "json/c.py", "test/d.py", "site-packages/e.py", "f.txt"):
        write(library / name, name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    prepare_dataset(["python-stdlib"], "stdlib")
    assert bytes(i for i in stream("stdlib") if i < 256) == b"a.pyb.pyjson/c.py"
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(here / "none"))
    with pytest.raises(DataError, match="python-stdlib: no Python source"):
        prepare_dataset(["python-stdlib"], "none")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="python-docs: this Python has no"):
        prepare_dataset(["python-docs"], "none")


@pytest.fixture
def server(monkeypatch):
    """A loopback server that sends `server.text`, or drops the line if that is None."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/input.txt":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.text)))
            self.end_headers()
            self.wfile.write(server.text)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.text = b"First Citizen:\n"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_shakespeare_is_downloaded_and_checked(here, monkeypatch, server):
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv(corpora.SHAKESPEARE_URL_VARIABLE, f"{address}/input.txt")
    with pytest.raises(DataError, match=r"SHA-256.*give the file instead"):
        prepare_dataset(["shakespeare"], "out")
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(server.text).hexdigest())
    prepare_dataset(["shakespeare"], "out", "char")
    dataset = open_dataset("out")
    assert dataset.tokenizer.decode(stream()) == "First Citizen:\n"
    assert os.listdir() == ["out"]
    monkeypatch.setenv(corpora.SHAKESPEARE_URL_VARIABLE, f"{address}/other.txt")
    with pytest.raises(DataError, match=r"cannot download .*Not Found.*give the file instead"):
        prepare_dataset(["shakespeare"], "new")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x", "http://[/", "file:///etc/hostname", "http://127.0.0.1:x/"]
)
def test_shakespeare_without_a_network_says_what_to_do(here, monkeypatch, url):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv(corpora.SHAKESPEARE_URL_VARIABLE, url)
    with pytest.raises(DataError, match=r"give the file instead|not an http"):
        prepare_dataset(["shakespeare"], "out")
    assert os.listdir() == []


@pytest.mark.parametrize("start", [b"", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_a_server_that_drips_is_given_up(here, monkeypatch, start):
    """Whether it drips its first line, its headers or its text."""
    done = threading.Event()

    def drip(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(start)
            while not done.wait(0.05):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv(corpora.SHAKESPEARE_URL_VARIABLE, address)
        monkeypatch.setattr(corpora, "_DOWNLOAD_SECONDS", 0.5)
        try:
            with pytest.raises(
                DataError, match=r"not done after 0.5 seconds.*give the file instead"
            ):
                prepare_dataset(["shakespeare"], "out")
        finally:
            done.set()
            thread.join()
    assert os.listdir() == []


PEAK = """
import resource, sys
from cupytron.data import prepare_dataset
prepare_dataset([sys.argv[1]], sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_bpe_training_sees_a_sample_of_a_large_corpus(here, monkeypatch):
    write(here / "a.txt", "".join(f"word{i} " for i in range(20_000)))
    whole = prepare_dataset(["a.txt"], "whole", "bpe:400")
    monkeypatch.setattr("cupytron.data.prepare._TRAINING_BYTES", 30_000)
    sample = prepare_dataset(["a.txt"], "sample", "bpe:400")
    assert sample.train.tokenizer_hash != whole.train.tokenizer_hash
    text = (here / "a.txt").read_text()
    assert open_dataset("sample").tokenizer.decode(stream("sample")) == text


@pytest.mark.parametrize(
    ("tokenizer", "sizes"), [("byte", (6, 60)), ("char", (6, 60)), ("bpe:300", (1, 6))]
)
def test_memory_does_not_grow_with_the_corpus(here, tokenizer, sizes):
    """Six or ten times the text, for the same peak within a few MiB (sizes in MiB)."""
    line = "The quick brown fox jumps over the lazy dog; na\u00efve caf\u00e9.\n".encode()
    peaks = []
    for size in sizes:
        with open("text.txt", "wb") as file:
            for _ in range(size):
                file.write(line * ((1 << 20) // len(line)))
        command = [sys.executable, "-c", PEAK, "text.txt", f"out{size}", tokenizer]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout) * 1024)
    assert peaks[1] - peaks[0] < 16 << 20, peaks


def test_a_mount_point_is_refused_before_the_work(tmp_path):
    """The finished folder could not take its place."""
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(DataError, match="a mount point; choose a folder inside it"):
        prepare_dataset([tmp_path / "text.txt"], "/proc", tokenizer="byte")
