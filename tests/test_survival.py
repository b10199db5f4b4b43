"""Killed with kill -9 at a random moment, or in the middle of a save, a run resumes to the same weights.

CUPYTRON_KILLS says how many kills (the acceptance run asks for 10; half of them during a save).
"""

import os
import random
import subprocess

import pytest
from runs import command, kill_when, make_data, start

from cupytron.run_folder import RunFolder

KILLS = int(os.environ.get("CUPYTRON_KILLS", "2"))
SETTINGS = [
    "train.max_steps=60",
    "checkpoint.interval=5",
    "train.eval_interval=20",
    "model.d_model=64",  # large enough for a save to take a while
    "model.dropout=0.2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    subprocess.run(command(data, out, *SETTINGS), check=True, capture_output=True, timeout=100)
    return RunFolder(out).find("last", print).digest()


def saving(folder):
    return any(folder.checkpoints.glob(".tmp-*")) if folder.checkpoints.is_dir() else False


@pytest.mark.parametrize("number", range(KILLS))
def test_kill_9_and_resume(data, unbroken, tmp_path, number):
    draw = random.Random(number)
    folder = RunFolder(tmp_path / "run")
    during_save = number % 2 == 1
    for _ in range(20):
        process = start(command(data, folder.path, *SETTINGS))
        after = draw.randrange(5, 55)

        def ready(after=after):
            if during_save:
                return len(folder.steps()) >= 1 + after // 20 and saving(folder)
            return len(folder.read_metrics()) >= 1 and max(folder.steps(), default=0) >= after - 5

        killed = kill_when(process, ready)
        process.communicate(timeout=60)
        # a kill "during a save" must have left the half-written folder behind
        if killed and (not during_save or saving(folder)):
            break
        assert not killed or folder.steps() != [60], "finished before it could be killed"
    else:
        pytest.fail("could not kill it at the wanted moment in 20 tries")
    assert max(folder.steps(), default=0) < 60
    done = subprocess.run(
        command(data, folder.path, *SETTINGS), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert folder.find("last", print).digest() == unbroken
    assert not saving(folder)
    steps = [r["step"] for r in folder.read_metrics() if "loss" in r]
    assert steps == list(range(1, 61))
