"""Nothing that lies in the working directory is run: a user may stand in a stranger's folder."""

import ast
import os
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import runs

from cupytron import process
from cupytron.cli.main import COMMANDS
from cupytron.comm import cuda_aware

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("cupytron/**/*.py"), *ROOT.glob("*/*.py")]


@pytest.fixture
def canaries(tmp_path, monkeypatch):
    """A working directory with a module of every name; returns the file that they write to."""
    folder, sung = tmp_path / "stranger", tmp_path / "sung"
    folder.mkdir()
    installed = {name for name in packages_distributions() if name.isidentifier()}
    for name in {*sys.stdlib_module_names, *installed, "cli", "data", "sitecustomize"}:
        code = f"open({str(sung)!r}, 'a').write(__name__ + ' ')\nraise SystemExit(3)\n"
        (folder / f"{name}.py").write_text(code)
    # matplotlib reads it: text would be set by the program `latex`
    (folder / "matplotlibrc").write_text("text.usetex: True\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # these would be the user's own choice
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return sung


def test_the_canaries_sing(canaries):
    subprocess.run([sys.executable, "-c", "import numpy"], timeout=60)
    assert canaries.exists()


def test_children_import_nothing_from_the_working_directory(canaries):
    assert process._seconds(None) is not None
    assert cuda_aware.trial(0, "numpy") is None
    assert not canaries.exists(), canaries.read_text()


def started(path):
    """The words after each sys.executable of a file that stands in a list, as far as they are constants."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.List):
            words = [ast.unparse(word) for word in node.elts]
            if "sys.executable" in words:
                yield [word.strip("'") for word in words[words.index("sys.executable") + 1 :]]


def test_every_child_is_started_without_the_working_directory():
    """A script's own folder comes first in its path, in place of the working directory."""
    shipped = [path for path in SOURCES if path.parts[len(ROOT.parts)] != "tests"]
    lists = [(path, words) for path in shipped for words in started(path)]
    assert len(lists) > 5
    for path, words in lists:
        assert "-P" in words or not {"-c", "-m"} & set(words), path


# each command with what follows it; {data}, {run} and {text} are files that lie elsewhere
LINES = [
    "data prepare {text} --out {new}",
    "data inspect {data}",
    "config show --preset demo",
    "train --data {data} --out {new} --num-layers 1 --num-heads 1 --d-model 8 --sequence-length 8 "
    "--max-steps 1",
    "eval {run}",
    "sample {run} --max-new-tokens 2",
    "checkpoint verify {run}",
    "report {run} --png {new}.png",
    "compare {run} {other} --out {new}.html --png {new}.png",
    "verify --tp 2",
    "schedule",
    "bench --num-layers 1 --num-heads 1 --d-model 8 --sequence-length 8 --set model.vocab_size=8",
    "autotune --num-layers 1 --num-heads 1 --d-model 8 --sequence-length 8 --set model.vocab_size=8",
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    data = runs.make_data(folder)
    found = {"data": data, "run": folder / "run", "text": folder / "text.txt"}
    runs.run_here(data, found["run"], "train.max_steps=2")
    shutil.copytree(found["run"], folder / "other")
    return {**found, "other": folder / "other"}


def test_every_command_has_a_line():
    assert {line.split()[0] for line in LINES} == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_commands_import_nothing_from_the_working_directory(canaries, places, tmp_path, line):
    words = line.format(**places, new=tmp_path / "new").split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [runs.cupytron(), *words], capture_output=True, text=True, timeout=100, env=environment
    )
    assert not canaries.exists(), canaries.read_text()
    assert done.returncode == 0, done.stderr
