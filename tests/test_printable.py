"""Text of strangers' files does nothing to a terminal, whichever command prints it."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import make_data, run_here

from cupytron import checkpoint, process
from cupytron.checkpoint import Piece
from cupytron.cli import say
from cupytron.cli.main import _run
from cupytron.config_io import read_toml, toml_value
from cupytron.printable import printable
from cupytron.terminal import Progress

CLI = Path(say.__file__).parent
# red, a title, C1's CSI, a reversal of direction, a line that looks like one of ours
EVIL = "x\x1b[31m\x1b]0;owned\x07\x9b2J\u202eabc\u2066\u2028\x7f\nwarning: all is well\r"
FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069]")


def shown(arguments, capsys):
    """What a command prints, which may do nothing to a terminal and fake no line."""
    code = _run([str(word) for word in arguments])
    out, err = capsys.readouterr()
    assert not FORBIDDEN.search(out + err), (arguments, out, err)
    # a traceback may have several lines
    faked = re.search("^warning: all is well", out + err, re.M) and "--debug" not in arguments
    assert not faked, (arguments, out, err)
    return code, out, err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(data, tmp_path):
    """A trained run whose folder's name is EVIL."""
    folder = tmp_path / EVIL
    run_here(data, folder, "train.max_steps=1", "checkpoint.interval=1")
    return folder


def test_escapes():
    assert printable("a\x1b[31m\n\u202e\udc80\x9b\tb") == r"a\x1b[31m\n\u202e\udc80\x9b\tb"
    assert printable("a\x1b\n\tb", keep="\n\t") == "a\\x1b\n\tb"
    plain = "na\u00efve \u6f22\u5b57\u3000\u05d0 \U0001f680"
    assert printable(plain) == plain


def test_commands_print_through_one_module():
    prints = re.compile(r"\bprint\(|\becho\(|\bsecho\(|print_exc|sys\.std(out|err)\.write")
    for path in CLI.glob("*.py"):
        text = path.read_text()
        assert path.name == "say.py" or not prints.search(text), path


def test_of_a_data_set(data, tmp_path, capsys):
    place = tmp_path / EVIL
    shutil.copytree(data, place)
    for name in ("train.json", "val.json"):
        path = place / name
        found = json.loads(path.read_text())
        found |= {"tokenizer": EVIL, "sources": [EVIL]}
        path.write_text(json.dumps(found))
    code, out, _ = shown(["data", "inspect", place], capsys)
    assert code == 0 and out.count(r"x\x1b[31m\x1b]0;owned\x07") == 3
    code, out, _ = shown(["data", "inspect", place, "--json"], capsys)
    assert json.loads(out)["sources"] == [EVIL]
    found["tokens"] = EVIL
    path.write_text(json.dumps(found))
    assert shown(["data", "inspect", place], capsys)[0] == 1


def test_of_settings(tmp_path, capsys):
    assert shown(["config", "validate", tmp_path / EVIL], capsys)[0] == 2
    (tmp_path / EVIL).write_text(f"[model]\n{json.dumps(EVIL)} = 1\n[{json.dumps(EVIL)}]\n")
    code, _, err = shown(["config", "validate", tmp_path / EVIL], capsys)
    assert code == 2 and err.count("unknown") == 2
    for word in (EVIL, f"model.{EVIL}=1", f"model.family={EVIL}", f"train.seed={EVIL}"):
        assert shown(["config", "show", "--set", word], capsys)[0] == 2
    assert shown(["config", "show", "--preset", EVIL], capsys)[0] == 2
    # also in the bytes that Python could not decode
    assert shown(["config", "show", "--config", "\udc80\x1b"], capsys)[0] == 2


def test_settings_that_are_shown_can_be_read_again(tmp_path, capsys):
    code, out, _ = shown(["config", "show", "--data", EVIL], capsys)
    (tmp_path / "x.toml").write_text(out)
    assert code == 0 and read_toml(tmp_path / "x.toml")["data"]["path"] == EVIL
    assert printable(toml_value(EVIL)) == toml_value(EVIL)


def test_of_wrong_usage(capsys):
    for words in ([EVIL], [f"--{EVIL}"], ["eval", "x", f"--{EVIL}"], ["report", "x", EVIL]):
        code, _, err = shown(words, capsys)
        assert code == 2 and r"\x1b" in err
    prepare = ["data", "prepare", EVIL, "--out", EVIL]
    assert shown([*prepare, "--bin-dtype", EVIL], capsys)[0] == 2
    assert shown([*prepare, "--tokenizer", EVIL], capsys)[0] == 2
    assert shown(prepare, capsys)[0] == 1


def test_of_a_run(run, tmp_path, capsys):
    for words in (["checkpoint", "ls"], ["checkpoint", "verify"], ["checkpoint", "digest"]):
        assert shown([*words, run], capsys)[0] == 0
    assert shown(["report", run, "--text"], capsys)[0] == 0
    page = (run / "report.html").read_text()
    assert not FORBIDDEN.search(page) and r"x\x1b[31m" in page
    assert shown(["report", run, "--no-sample", "--png", tmp_path / "x.png"], capsys)[0] == 0
    shutil.copytree(run, other := tmp_path / f"{EVIL}2")
    assert shown(["compare", run, other, "--out", tmp_path / "x.html"], capsys)[0] == 0
    page = (tmp_path / "x.html").read_text()
    assert not FORBIDDEN.search(page) and page.count(r"x\x1b[31m") > 4
    assert shown(["checkpoint", "ls", tmp_path / f"no{EVIL}"], capsys)[0] == 1
    assert shown(["checkpoint", "digest", run, "--checkpoint", EVIL], capsys)[0] == 1
    assert shown(["--debug", "checkpoint", "digest", run, "--checkpoint", EVIL], capsys)[0] == 1
    assert shown(["eval", run, "--data", tmp_path / EVIL / EVIL], capsys)[0] == 1


def test_of_a_tensor(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("")
    piece = Piece(EVIL, (4,), ((0, 4),), 0, 4, np.ones(4, np.float32))
    checkpoint.write(tmp_path / "checkpoints" / "step-00000001", [piece], {"step": 1})
    code, out, _ = shown(["checkpoint", "digest", tmp_path], capsys)
    assert code == 0 and len(out.splitlines()) == 2
    code, out, _ = shown(["checkpoint", "digest", tmp_path, "--json"], capsys)
    assert EVIL in json.loads(out)


def test_of_a_tokenizer(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    model = {"type": "BPE", "vocab": {"a": 0, EVIL: 1}, "merges": []}
    (tmp_path / "text.txt").write_text("aaa")
    for changed in (model, {**model, "type": EVIL}, {**model, "merges": [EVIL]}):
        (tmp_path / EVIL).write_text(json.dumps({"version": "1.0", "model": changed}))
        words = ["data", "prepare", tmp_path / "text.txt", "--out", tmp_path / "out"]
        shown([*words, "--tokenizer", tmp_path / EVIL, "--separator", f"{EVIL}2"], capsys)


@pytest.mark.parametrize("terminal", [True, False])
def test_samples_on_a_terminal_and_in_a_pipe(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    say.pass_on(f"a\tb\n{EVIL}")
    text = capsys.readouterr().out
    assert text == "a\tb\n" + (printable(EVIL, "\n") if terminal else EVIL)


def test_progress_and_failures(capsys, monkeypatch):
    with Progress(1) as shown:
        shown.line(EVIL)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and not FORBIDDEN.search(out)
    monkeypatch.setenv("OPENBLAS_CORETYPE", EVIL)
    assert EVIL not in printable(process.describe(process.prepare(blas_kernel="off")))
