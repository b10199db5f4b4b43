"""Whatever ends or stops one rank ends the job within ten seconds, with one message that says where.

CUPYTRON_FAILURES=all runs every combination (the acceptance run does); else a sample.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launchers import NAMES, launch
from runs import command, make_data

from cupytron.comm import run_ranks
from cupytron.stop import StopRequest

ALL = os.environ.get("CUPYTRON_FAILURES") == "all"
RANKS = 2
CODES = {"RuntimeError": 1, "exit": 3, "UsageError": 2, "MemoryError": 1}
CASES = list(itertools.product(CODES, ("start", "step", "save"), (0, RANKS - 1), NAMES))
SAMPLE = [
    ("RuntimeError", "step", 1, "mpich"),
    ("RuntimeError", "start", 0, "openmpi"),
    ("exit", "save", 1, "mpich"),
    ("exit", "step", 1, "openmpi"),
    ("UsageError", "start", 1, "mpich"),
    ("UsageError", "save", 0, "mpich"),
    ("MemoryError", "step", 0, "mpich"),
    ("MemoryError", "save", 1, "openmpi"),
]
PLACES = {"start": "step", "step": r"step 3, in the step", "save": r"step \d+, saving"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


class Job:
    """A training run of two ranks, in which something is made to happen."""

    def __init__(self, tmp_path, data, name, what, *settings):
        self.file = tmp_path / "happened"
        script = str(Path(__file__).with_name("failing_job.py"))
        train = command(data, tmp_path / "run", *settings)[1:]
        arguments, env = launch(
            name, RANKS, [sys.executable, script, *map(str, what), str(self.file), *train]
        )
        done = subprocess.run(
            arguments, env=env, capture_output=True, text=True, errors="replace", timeout=60
        )
        ended = time.time()
        self.code, self.output = done.returncode, done.stdout + done.stderr
        self.messages = re.findall(r"error: rank.*", done.stderr)
        self.seconds = ended - float(self.file.read_text()) if self.file.exists() else 0.0

    def check(self, code, *words):
        """One message with these words (regular expressions), the code, and nothing left."""
        assert self.code == code, self.output
        assert len(self.messages) == 1, self.output
        for word in words:
            assert re.search(word, self.messages[0]), self.messages
        assert self.seconds < 10
        until = time.time() + 2  # the launcher's helpers may end a little later
        while self._left() and time.time() < until:
            time.sleep(0.05)
        assert not self._left()

    def _left(self):
        """Processes of this job that are still there."""
        mark, left = str(self.file).encode(), []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if mark in entry.read_bytes():
                    left.append(entry.parent.name)
            except OSError:
                pass  # it has ended
        return left


@pytest.mark.parametrize(("kind", "phase", "rank", "name"), CASES if ALL else SAMPLE)
def test_a_rank_that_fails_ends_the_job(tmp_path, data, kind, phase, rank, name):
    job = Job(tmp_path, data, name, (kind, phase, rank))
    assert job.file.exists(), job.output
    job.check(CODES[kind], f"error: rank {rank}:", PLACES[phase])
    # a traceback is for what is not the user's doing, and appears once
    assert job.output.count("Traceback") == (kind == "RuntimeError")


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("exit0", 1, r"left the command early, by exit\(0\)"),
        ("KeyboardInterrupt", 130, "interrupt"),
    ],
)
def test_leaving_without_an_error_is_no_success(tmp_path, data, kind, code, words):
    Job(tmp_path, data, "mpich", (kind, "step", 1)).check(code, "error: rank 1:", words, "step 3")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("mpich", 9, r"PID \d+ RUNNING AT \S+\s.*EXIT CODE: 9\s.*Killed \(signal 9\)"),
        (
            "openmpi",
            137,
            r"process rank 1 with PID \d+ on node \S+ exited on\s+signal 9 \(Killed\)",
        ),
    ],
)
def test_of_a_killed_rank_the_launcher_says_the_words_of_the_manual(
    tmp_path, data, name, code, words
):
    """It ends the other ranks before they could say anything (docs/survival.md)."""
    job = Job(tmp_path, data, name, ("killed", "step", 1))
    assert job.code == code and re.search(words, job.output, re.DOTALL), job.output
    assert job.seconds < 10 and not job.messages


@pytest.mark.parametrize(
    ("name", "rank"), list(itertools.product(NAMES, (0, 1))) if ALL else [(n, 1) for n in NAMES]
)
def test_a_wrong_option_on_one_rank_ends_the_others(tmp_path, data, name, rank):
    """Before MPI is begun with, where the others wait for this rank."""
    job = Job(tmp_path, data, name, ("wrong", "options", rank))
    job.check(2, f"error: rank {rank}:", "no-such-option")


@pytest.mark.parametrize("name", NAMES if ALL else ["mpich"])
@pytest.mark.parametrize(
    ("settings", "folder", "code", "words"),
    [(["optim.lr=-1"], "", 2, "optim.lr"), ([], "missing", 1, "missing")],
)
def test_what_all_ranks_find_wrong_is_said_once(
    tmp_path, data, name, settings, folder, code, words
):
    """Before MPI is begun with, and after."""
    job = Job(tmp_path, data / folder, name, ("nothing", "step", -1), *settings)
    job.check(code, "error: rank 0:", words)


@pytest.mark.parametrize(
    ("kind", "rank", "name"),
    list(itertools.product(("stopped", "asleep"), (0, 1), NAMES))
    if ALL
    else [("stopped", 1, "mpich"), ("asleep", 0, "openmpi")],
)
def test_a_rank_that_makes_no_progress_ends_the_job(tmp_path, data, kind, rank, name):
    job = Job(tmp_path, data, name, (kind, "step", rank), "parallel.timeout=2")
    # a stopped process says nothing: then the one that waits for it speaks, and says in what
    speaks = rank if kind == "asleep" else 1 - rank
    waits = "waiting in " if kind == "stopped" else "in the step"
    job.check(66, f"error: rank {speaks}: no progress for 2 seconds", "after step 2", waits)
    assert "Current thread" in job.output or "most recent call first" in job.output


def test_a_job_that_goes_well_ends_well(tmp_path, data):
    job = Job(tmp_path, data, "mpich", ("nothing", "step", -1), "train.max_steps=2")
    assert (job.code, job.messages) == (0, []), job.output


class TestStopping:
    def test_all_ranks_agree_on_the_largest_signal(self):
        def body(comm):
            stop = StopRequest()
            before = stop.agree(comm)
            stop.received = {1: signal.SIGINT, 2: signal.SIGUSR1}.get(comm.rank)
            alone = stop.signal  # nothing is known before all agree
            return before, alone, stop.agree(comm), stop.signal, stop.agree(comm), stop.exit_code

        for result in run_ranks(3, body):
            assert result == (False, None, True, signal.SIGUSR1, True, 75)

    def test_one_process_needs_no_collective(self):
        from cupytron.comm import SelfCommunicator

        stop, comm = StopRequest(), SelfCommunicator()
        assert not stop.agree(comm)
        stop.received = signal.SIGINT
        assert stop.agree(comm) and stop.exit_code == 130
        assert not comm.calls


def test_the_watchdog_guards_verify_too(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from cupytron.cli.main import run\n"
        "from cupytron.launcher import launched_rank\n"
        "from cupytron.trainer import Trainer\n"
        "inner, calls = Trainer.compute_gradients, []\n"
        "def stops(self, *batch):\n"
        "    calls.append(1)\n"
        "    if self.context.world.size > 1 and launched_rank() == 1:\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return inner(self, *batch)\n"
        "Trainer.compute_gradients = stops\n"
        "run(['verify', '--dp', '2', '--timeout', '2'])\n"
    )
    argv, env = launch("mpich", RANKS, [sys.executable, str(script)])
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 66, done.stderr
    assert (
        "error: rank 0: no progress for 2 seconds" in done.stderr and "on the mesh" in done.stderr
    )
