"""`cupytron data`: output, exit codes, one line for each error, and what is imported."""

import json
import subprocess
import sys

import pytest

from cupytron.cli import main


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs the command line in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 100)

    def call(*arguments):
        with pytest.raises(SystemExit) as info:
            main.run(["data", *arguments])
        return info.value.code, *capsys.readouterr()

    return call


def test_prepare_and_inspect(call):
    code, out, err = call("prepare", "a.txt", "--out", "d", "--tokenizer", "bpe:300")
    assert code == 0 and out.startswith("d: ") and "validation tokens" in out
    assert "training the tokenizer" in err and "note: the text is enough for" in err
    code, out, err = call("inspect", "d", "--json")
    facts = json.loads(out)
    assert code == 0 and err == ""
    assert facts["train"]["bytes"] + facts["val"]["bytes"] == 1900
    assert facts["train"]["bytes_per_token"] > 2 and facts["excerpt"].startswith("to be or not")
    assert facts["dtype"] == "uint16" and facts["sources"] == ["a.txt"]
    code, out, _ = call("inspect", "d")
    assert code == 0 and "bytes per token" in out and "  to be or not to be" in out
    assert "verified" in out


def test_inspect_without_tokenizer_and_without_validation(call, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\1\0\2\0")
    arguments = ("a.bin", "--out", "d", "--vocab-size", "3", "--val-fraction", "0")
    assert call("prepare", *arguments)[0] == 0
    code, out, _ = call("inspect", "d")
    assert code == 0 and "val         0 tokens" in out and "tokenizer   none" in out
    facts = json.loads(call("inspect", "d", "--json")[1])
    assert facts["excerpt"] is None and facts["val"]["bytes_per_token"] is None


def test_excerpt_sends_no_codes_to_the_terminal(call, tmp_path):
    (tmp_path / "b.txt").write_bytes(b"a\x1b]0;title\x07b\r\n" * 20)
    call("prepare", "b.txt", "--out", "d")
    code, out, _ = call("inspect", "d")
    assert code == 0 and "\x1b" not in out and "\r" not in out and r"a\x1b]0;title\x07b\r" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prepare", "none.txt", "--out", "d"], 1, "none.txt: no such file"),
        (["prepare", "a.txt", "--out", "d", "--val-fraction", "1"], 2, "val_fraction=1.0"),
        (["prepare", "a.txt", "--out", "d", "--val-fraction", "nan"], 2, "val_fraction=nan"),
        (["prepare", "a.txt", "--out", "d", "--tokenizer", "word"], 2, "tokenizer=word"),
        (["prepare", "a.txt", "--out", "d", "--tokenizer", "bpe:9"], 2, "tokenizer=bpe:9"),
        (["prepare", "a.txt", "--out", "d", "--vocab-size", "9"], 1, "text needs a tokenizer"),
        (["prepare", "a.txt", "--out", "a.txt"], 1, "a file; choose a folder"),
        (["inspect", "none"], 1, "none: no such folder"),
        (["inspect", "."], 1, "no train.json"),
    ],
)
def test_errors_are_one_line(call, arguments, code, message):
    found, out, err = call(*arguments)
    assert found == code and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_usage_errors_exit_with_2(call):
    assert call("prepare", "a.txt")[0] == 2
    assert call("prepare", "--out", "d")[0] == 2
    assert call("prepare", "a.txt", "--out", "d", "--val-fraction", "x")[0] == 2


def test_damage_found_by_inspect(call, tmp_path):
    call("prepare", "a.txt", "--out", "d")
    (tmp_path / "d" / "val.bin").write_bytes(bytes(2 * 190))
    code, _, err = call("inspect", "d")
    assert code == 1 and "SHA-256" in err


def test_errors_and_help_import_nothing_heavy():
    code = (
        "import sys, cupytron.data, cupytron.data.errors, cupytron.cli.data;"
        "assert not {'numpy', 'tokenizers', 'cupytron.data.prepare'} & set(sys.modules);"
        "from cupytron.data import *;"
        "assert 'numpy' in sys.modules and 'tokenizers' not in sys.modules;"
        "assert callable(prepare_dataset) and 'Loader' in cupytron.data.__all__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
