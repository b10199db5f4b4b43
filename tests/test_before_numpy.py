"""Commands that compute prepare the process (threads, BLAS kernel, malloc) before NumPy is imported."""

import subprocess
import sys

import pytest
from runs import TINY, make_data, run_here

PROGRAM = """
import sys
from cupytron import process
from cupytron.cli.main import run
inner = process.prepare
def prepare(*words):
    print("prepared", "late" if "numpy" in sys.modules else "in time", flush=True)
    return inner(*words)
process.prepare = prepare
run(sys.argv[1:])
"""
SETTINGS = [word for setting in TINY for word in ("--set", setting)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_here(make_data(folder), folder / "run", "train.max_steps=4")
    return folder / "run"


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "RUN"],
        ["sample", "RUN", "--max-new-tokens", "1"],
        ["train", "--out", "RUN"],
        ["bench", "--steps", "1", *SETTINGS, "--set", "model.vocab_size=20"],
        ["verify", "--steps", "1"],
    ],
    ids=lambda words: words[0],
)
def test_the_process_is_prepared_before_numpy(run, words):
    words = [str(run) if word == "RUN" else word for word in words]
    program = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert "prepared in time" in done.stdout and done.returncode == 0, done.stdout + done.stderr
