"""The examples: short, losses that fall, the same in one process and in two; names in coming-from.md."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from launchers import NAMES, launch

from cupytron import backend
from cupytron.cli.main import cli
from cupytron.comm import SelfCommunicator, run_ranks
from cupytron.config import RunConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = ["tensor_parallel", "data_parallel", "zero", "pipeline"]
ALONE = {}  # what each prints in one process


def output(command, env=os.environ):
    env = {**env, "OPENBLAS_NUM_THREADS": "1"}  # or the threads of two ranks fight for the cores
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alone(script):
    if script not in ALONE:
        ALONE[script] = output([sys.executable, str(EXAMPLES / f"{script}.py")])
    return ALONE[script]


def losses(text):
    """All losses printed, to their eight digits."""
    return re.findall(r"\b\d\.\d{8}\b", text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_is_short_and_its_loss_falls(script):
    assert len((EXAMPLES / f"{script}.py").read_text().splitlines()) < 40
    first, *_, last = map(float, losses(alone(script)))
    assert last < first / 4
    assert losses(alone(script))[0] == losses(alone(SCRIPTS[0]))[0]  # from the same weights


def test_the_model_s_gradients_are_checked_and_a_wrong_backward_is_named(tmp_path):
    """The other examples cannot see it: on any mesh its wrong numbers are the same."""
    said = output([sys.executable, str(EXAMPLES / "own_model.py")])
    assert said.startswith("OwnModel: backward is right, 9 gradients")
    right = (EXAMPLES / "own_model.py").read_text()
    head, tail = right.split("def backward(self, dm, stash)")
    wrong = f"{head}def backward(self, dm, stash){tail.replace('/ 2', '/ 3', 1)}"
    assert wrong != right
    (tmp_path / "own_model.py").write_text(wrong)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "own_model.py")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "Memory memory, x: a token's dy gives" in done.stderr
    for script in SCRIPTS:
        assert "do not prove that a backward is right" in (EXAMPLES / f"{script}.py").read_text()
    assert "own_model.py checks that they are the right ones" in alone("data_parallel")


@pytest.mark.parametrize("launcher", NAMES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_print_the_losses_of_one(script, launcher):
    command = [sys.executable, str(EXAMPLES / f"{script}.py")]
    text = output(*launch(launcher, 2, command))
    assert losses(text) == losses(alone(script))
    if script == "tensor_parallel":
        assert "up.weight (32, 128), on each of 2: (32, 64)" in text
    if script == "data_parallel":
        assert "2 replicas, and one process has the same bits: True" in text
    if script == "zero":
        held = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", text)]
        whole, *_ = held  # two arrays of the optimizer, gradients, weights: four equal ones
        assert held == [whole, whole * 3 // 4, whole * 5 // 8, whole // 2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_threads_have_the_losses_of_one_process(script, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    train = importlib.import_module(script).train
    choices = {"zero": [(1,), (3,)], "pipeline": [("1f1b",), ("zb-h1",)]}
    for choice in choices.get(script, [()]):
        with backend.one_blas_thread():
            one = train(SelfCommunicator(), *choice, steps=8)
            both = run_ranks(2, lambda world, choice=choice: train(world, *choice, steps=8))
        for two in both:
            if script == "data_parallel":
                assert two == one
            else:
                np.testing.assert_allclose(two[0], one[0], rtol=0, atol=1e-12)


def test_coming_from_names_what_there_is():
    """Settings, flags and classes in the middle column of its tables."""
    page = (EXAMPLES.parent / "docs" / "coming-from.md").read_text()
    ours = [row.split(" | ")[1] for row in page.splitlines() if row.count(" | ") == 2]
    names = {name for cell in ours for name in re.findall(r"`([^`]+)`", cell)}
    words = {word for name in names for word in re.findall(r"[\w.-]+", name)}
    runner, sections = CliRunner(), RunConfig.model_fields
    commands = [["train"], ["sample"], ["data", "prepare"]]
    flags = "".join(runner.invoke(cli, [*command, "--help"]).output for command in commands)
    keys = runner.invoke(cli, ["config", "show", "--keys"]).output
    code = "\n".join(path.read_text() for path in EXAMPLES.parent.glob("cupytron/**/*.py"))
    functions = ("model.loss", "optim.apply")
    assert len(words) > 100
    for word in sorted(words):
        if word.startswith("--"):
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", flags), word
        elif word.partition(".")[0] in sections and "." in word and word not in functions:
            assert f"{word} = " in keys, word
        elif re.fullmatch(r"[A-Z]\w*[a-z]\w*(\.\w+)?", word):
            name, _, method = word.partition(".")
            assert re.search(rf"class {name}\b", code), word
            assert re.search(rf"def {method}\b", code), word
