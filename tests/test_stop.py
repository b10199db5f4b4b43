"""Signals that stop a run: heard from the first moment, answered at once, and what a second one does."""

import os
import signal
import subprocess
import sys
import time

import pytest
from launchers import launch
from runs import STARTED, command, make_data

from cupytron import signals
from cupytron.run_folder import RunFolder
from cupytron.signals import Signals
from cupytron.stop import StopRequest

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
LONG = ["train.max_steps=100000", "checkpoint.interval=0", "train.eval_interval=0"]

# a command with changes: what stands in CHANGES is executed first
PROGRAM = """
import os, signal, sys, time
from cupytron.cli.main import run
{changes}
run(sys.argv[1:])
"""
STUCK_IN_STEP_3 = """
from cupytron import signals
from cupytron.launcher import launched_rank
from cupytron.trainer import Trainer
signals.AGAIN = 0.6
inner = Trainer.compute_gradients
def slow(self, *batch):
    if self.step == 2 and launched_rank() == {rank}:
        print("in the long step", flush=True)
        time.sleep(100)
    return inner(self, *batch)
Trainer.compute_gradients = slow
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def program(tmp_path, data, changes, *settings):
    """The command line of a training run with changes, and its run's folder."""
    script, out = tmp_path / "program.py", tmp_path / "run"
    script.write_text(PROGRAM.format(changes=changes))
    return [sys.executable, str(script), *command(data, out, *LONG, *settings)[1:]], RunFolder(out)


def start(argv, environment=None):
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    STARTED.append(process)
    return process


def read_until(process, words):
    """The lines up to the first with these words; the test's time limit ends a wait in vain."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"{words!r} was not said:\n{''.join(lines)}")


class Heard(Signals):
    """Signals with a clock of its own: what was said, and what ended."""

    def __init__(self):
        super().__init__()
        self.said, self.ended = [], []

    def _say(self, text, any_rank=False):
        self.said.append(text)

    def _end(self, number):
        self.ended.append(number)


@pytest.mark.parametrize(
    ("times", "lines", "ends"),
    [
        ([(TERM, 0)], 1, 0),
        ([(TERM, 0), (TERM, 0.01)], 1, 0),  # a launcher delivers one signal twice
        ([(INT, 0), (INT, 1)], 2, 0),  # a person is told that it goes on
        ([(INT, 0), (INT, 5)], 1, 1),
        ([(INT, 0), (INT, 1), (TERM, 6)], 2, 1),
        ([(USR1, 0), (USR1, 60)], 1, 0),
        ([(USR1, 0), (TERM, 60)], 1, 0),  # Slurm's warning, then its time limit: the save goes on
        ([(USR1, 0), (TERM, 60), (TERM, 66)], 1, 1),
    ],
)
def test_a_second_signal_counts_only_after_some_seconds(times, lines, ends):
    heard = Heard()
    for number, at in times:
        heard.hear(number, 100.0 + at)
    assert (len(heard.said), len(heard.ended)) == (lines, ends), heard.said
    name = times[0][0].name
    assert heard.said[0].startswith(f"{name}: stopping before the first step")


def test_a_run_learns_of_a_signal_that_came_before_it():
    with signals.listening(speaks=False):
        os.kill(os.getpid(), USR1)
        time.sleep(0)
        with StopRequest() as stop:
            assert stop.received == USR1
    assert signals.here() is None and signal.getsignal(USR1) == signal.SIG_DFL


def test_handlers_and_wakeup_are_put_back():
    before = [signal.getsignal(n) for n in signals.SIGNALS]
    with StopRequest():
        assert signal.getsignal(TERM) not in before
    assert [signal.getsignal(n) for n in signals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_before_numpy_is_imported_is_remembered(tmp_path, data):
    changes = (
        "from cupytron import process\n"
        "inner = process.prepare\n"
        "def prepare(*words):\n"
        "    assert 'numpy' not in sys.modules\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return inner(*words)\n"
        "process.prepare = prepare\n"
    )
    argv, folder = program(tmp_path, data, changes)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done
    assert "SIGUSR1: stopping before the first step" in done.stderr
    assert "stopped by SIGUSR1 at step 0, saved" in done.stdout and folder.steps() == [0]


@pytest.mark.parametrize(
    ("number", "code"), [(INT, 130), pytest.param(TERM, -TERM, marks=pytest.mark.slow)]
)
def test_a_signal_is_answered_in_the_step_and_a_late_second_one_ends_it(
    tmp_path, data, number, code
):
    argv, folder = program(tmp_path, data, STUCK_IN_STEP_3.format(rank=0))
    process = start(argv)
    read_until(process, "in the long step")
    process.send_signal(number)
    read_until(process, f"{number.name}: stopping after this step")
    process.send_signal(number)  # the same one, delivered twice
    time.sleep(0.8)
    assert process.poll() is None
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == code, rest
    assert f"{number.name} again: stopped at once, without a save" in rest
    assert "Traceback" not in rest and folder.steps() == []


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_late_second_signal_ends_ranks_that_wait_inside_mpi(tmp_path, data, rank):
    """The rank that does not sleep waits for the other one in MPI, where Python runs no handler."""
    argv, folder = program(
        tmp_path, data, STUCK_IN_STEP_3.format(rank=rank), "parallel.timeout=300"
    )
    argv, environment = launch("mpich", 2, argv)
    process = start(argv, environment)
    read_until(process, "in the long step")
    process.send_signal(USR1)
    read_until(process, "SIGUSR1: stopping after this step")
    process.send_signal(TERM)
    time.sleep(1)
    process.send_signal(TERM)
    rest = process.communicate(timeout=60)[0]
    # MPICH's launcher counts signals, too, and may be the first to end the job
    assert process.returncode in (128 + TERM, TERM), rest
    assert rest.count("SIGTERM again: stopped at once, without a save") == 1, rest
    assert folder.steps() == []
