"""cupytron verify --model FILE:CLASS: a user's own model on a mesh, its gradients checked first."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from launchers import launch

from cupytron.cli.main import cli

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_model.py"
HEAD = """
from cupytron.layer import Chain, Layer, Parameter, normal
from cupytron.nn import Embedding, Head, LayerNorm, Linear
import beside

class Own(Chain):
    def __init__(self):
        self.embedding = Embedding(beside.V, 8, std=1.0)
        self.linear = Linear(8, 8, std=0.3)
        self.norm = LayerNorm(8)
        self.head = Head(self.embedding.weight)

    def loss(self, logits, targets, scale):
        return self.head.loss(logits, targets, scale)
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A file, whose text a test may add to."""
    (tmp_path / "beside.py").write_text("V = 13\n")
    file = tmp_path / "mine.py"
    file.write_text(HEAD)
    # what loading it leaves behind
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield file
    for name in ("mine", "beside", "own_model"):
        sys.modules.pop(name, None)


def verify(model, *words):
    return CliRunner().invoke(cli, ["verify", "--model", str(model), "--steps", "2", *words])


@pytest.mark.parametrize(
    "mesh",
    [
        "",
        "--tp 2 --dp 2 --zero 3",
        "--pp 2 --dp 2 --zero 1 --schedule zb-h1",
        "--dp 4 --deterministic --zero 2",
    ],
)
def test_the_example_has_the_same_numbers_on_any_mesh(model, mesh):
    done = verify(f"{EXAMPLE}:OwnModel", *mesh.split())
    assert done.exit_code == 0, done.output
    assert done.output.startswith("OwnModel: backward is right, 9 gradients")
    assert "the same numbers" in done.output and "gradient of up.weight" in done.output
    assert ("tp=1 x pp=1 x dp=2" in done.output) == (not mesh)


def test_a_tied_table_and_a_module_beside_the_file(model):
    done = verify(f"{model}:Own", "--pp", "2", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["ok"] and found["largest"] < 1e-12
    assert {"embedding.weight", "linear.bias"} <= {d["tensor"] for d in found["differences"]}


def test_real_processes(model):
    words = ["verify", "--model", f"{model}:Own", "--dp", "2", "--zero", "2"]
    program = [str(Path(sys.executable).parent / "cupytron"), *words]
    argv, environment = launch("mpich", 2, program)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same numbers") == 1


def test_a_wrong_backward_is_named_before_anything_else(model):
    text = "\nclass Wrong(Linear):\n    def backward(self, dy, stash):\n"
    text += "        return -super().backward(dy, stash)\n"
    model.write_text(HEAD.replace("self.linear = Linear", "self.linear = Wrong") + text)
    done = verify(f"{model}:Own")
    assert done.exit_code == 1
    assert "Wrong linear, x: its gradient has the wrong sign" in str(done.exception)
    assert "same numbers" not in done.output


@pytest.mark.parametrize(
    ("text", "name", "words", "message"),
    [
        (
            "",
            "Own",
            ["--tp", "2"],
            "Own: tp=2 has to know which layers are cut; set tensor_plan = ",
        ),
        ("", "Other", [], "has no class 'Other'; there are .*Own"),
        (
            "def Number(): return 3\n",
            "Number",
            [],
            "Number: makes a int; a model is a cupytron.layer",
        ),
        (
            "Bare = LayerNorm\nBare = lambda: LayerNorm(8)\n",
            "Bare",
            [],
            "makes a LayerNorm; a model is",
        ),
        ("", "Own", ["--pp", "9"], "share out and the pipeline 9 parts; use fewer"),
        (
            "class Blind(Own):\n    def __init__(self):\n        self.linear = Linear(8, 8)\n",
            "Blind",
            [],
            "Blind: its vocabulary is not known; set vocab_size = N in the class",
        ),
    ],
)
def test_what_cannot_be_verified_is_said_with_a_way_out(model, text, name, words, message):
    model.write_text(HEAD + text)
    done = verify(f"{model}:{name}", *words)
    assert done.exit_code != 0 and isinstance(done.exception, ValueError), done.exception
    with pytest.raises(ValueError, match=message):
        raise done.exception


@pytest.mark.parametrize("name", ["nothing.py:Own", "mine.py", ":Own"])
def test_a_file_that_is_none_is_refused(model, name):
    done = verify(model.parent / name if name[0] != ":" else name)
    with pytest.raises(ValueError, match=r"give FILE:CLASS, such as model.py:Model"):
        raise done.exception


def test_help_says_that_the_file_is_executed():
    text = " ".join(CliRunner().invoke(cli, ["verify", "--help"]).output.split())
    assert "FILE is executed: name only a Python file that you trust." in text
