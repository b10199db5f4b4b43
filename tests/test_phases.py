"""Whatever phase of a run a rank is stopped or fails in, the job ends in time; slow work never ends it.

CUPYTRON_FAILURES=all runs every phase, kind, rank and library (the acceptance run does); else a sample.
"""

import ast
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
from phases import PHASES
from runs import command, make_data

from cupytron import launcher_guard, progress
from cupytron import signs as signs_module
from cupytron.signs import Sign, Signs
from cupytron.watchdog import Watchdog

ALL = os.environ.get("CUPYTRON_FAILURES") == "all"
RANKS, TIMEOUT = 2, 3.0
CASES = [
    case
    for case in itertools.product(PHASES, ("stopped", "RuntimeError"), (0, RANKS - 1), NAMES)
    if case[2] == 0 or not PHASES[case[0]][3]
    # an exception while Python ends is only printed
    if case[:2] != ("exit", "RuntimeError")
]
SAMPLE = [
    ("import", "stopped", 0, "mpich"),
    ("options", "RuntimeError", 1, "mpich"),
    ("process", "stopped", 1, "mpich"),
    ("mpi", "stopped", 1, "mpich"),
    ("mpi", "stopped", 1, "openmpi"),
    ("data", "stopped", 1, "openmpi"),
    ("materialize", "stopped", 1, "mpich"),
    ("restore", "stopped", 0, "mpich"),
    ("folder", "stopped", 0, "openmpi"),
    ("backward", "RuntimeError", 1, "openmpi"),
    ("reduce", "stopped", 0, "openmpi"),
    ("evaluate", "stopped", 0, "mpich"),
    ("write", "stopped", 1, "openmpi"),
    ("prune", "stopped", 0, "mpich"),
    ("trace", "stopped", 1, "mpich"),
    ("end", "stopped", 1, "mpich"),
    ("exit", "stopped", 0, "openmpi"),
    ("exit", "stopped", 1, "mpich"),
]
BEFORE_MPI = list(PHASES)[: list(PHASES).index("mpi") + 1]
SHORT = ["train.max_steps=2", "train.eval_interval=2", "checkpoint.interval=1", "checkpoint.keep=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


class Job:
    """A short training run of two ranks; one of them stops, fails or is slow at a chosen place."""

    def __init__(self, folder, data, name, what, *settings, more=(), timeout=TIMEOUT, limit=150):
        self.file, script = folder / "happened", Path(__file__).with_name("failing_job.py")
        settings = (*SHORT, f"parallel.timeout={timeout:g}", *settings)
        job = [sys.executable, str(script), *map(str, what), str(self.file)]
        train = [*command(data, folder / "run", *settings)[1:], *more]
        argv, env = launch(name, RANKS, [*job, *train])
        busy = slowness()
        done = subprocess.run(
            argv, env=env, capture_output=True, text=True, errors="replace", timeout=limit
        )
        self.ended, self.busy = time.time(), max(busy, slowness())
        self.code, self.output = done.returncode, done.stdout + done.stderr
        self.messages = re.findall(r"error: rank.*", done.stderr)

    def happened(self):
        assert self.file.exists(), self.output
        return float(self.file.read_text())


def functions(path):
    """Names of a file's functions and methods, as the interpreter gives them to a frame."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield from (
                f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)
            )


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "import"])
def test_each_phase_is_a_function_that_is_there(phase):
    """A function that has moved would never be reached, and its phase never tried."""
    name, function, *_ = PHASES[phase]
    assert function in functions(Path(__file__).parents[1] / name)


def slowness():
    """Runnable processes for each core, at least 1: everything takes so many times as long."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def check_ends(folder, data, phase, kind, rank, name):
    more = ["--trace", "0:1"] if phase == "trace" else []
    if phase == "restore":
        done = Job(folder, data, name, ("nothing", "step", -1), timeout=600)
        assert done.code == 0, done.output
    # a resumed run has to have something to do
    more += ["--max-steps", "4"] if phase == "restore" else []
    job = Job(folder, data, name, (kind, f"at:{phase}", rank), more=more)
    seconds = job.ended - job.happened()
    # the other rank ends inside MPI_Init; after that Open MPI's launcher itself may hang, and is then ended
    inside = kind == "stopped" and phase in BEFORE_MPI
    killed = inside and name == "openmpi" and job.code == -signal.SIGKILL
    limit = TIMEOUT + 10 + (launcher_guard.IDLE if killed else 0)
    assert seconds < limit * job.busy, (seconds, job.output)
    assert job.messages, job.output
    if killed:
        assert "hung after its ranks had ended; it was killed" in job.output
    elif kind == "stopped":
        # MPICH's launcher kills the stopped rank, and may report that
        codes = (66, signal.SIGKILL) if inside and name == "mpich" else (66,)
        assert job.code in codes, job.output
    if kind == "stopped":
        assert all("--timeout" in message for message in job.messages)
        assert re.search(r"no progress for 3 seconds \(after step \d", job.messages[0])
    else:
        assert job.code == 1, job.output
        # in work that all ranks do together, each of them knows which rank has failed
        said = f"error: rank {rank}: RuntimeError|ended because rank {rank} failed: RuntimeError"
        assert re.search(f"({said}): made to fail", job.messages[0]), job.messages


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "kind", "rank", "name"), CASES if ALL else SAMPLE)
def test_a_rank_that_stops_or_fails_ends_the_job(tmp_path, data, phase, kind, rank, name):
    check_ends(tmp_path, data, phase, kind, rank, name)


def test_a_rank_that_stops_before_mpi_begins_ends_the_job(tmp_path, data):
    """The one sample of the slow test that `make test` runs."""
    check_ends(tmp_path, data, "process", "stopped", 1, "mpich")


# kind of slow work, rank, MPI library, seconds of a nap, settings, and how many timeouts all naps last at
# least; there are two evaluations
SLOW_WORK = [
    ("start", 0, "openmpi", 0.1, [], 10),
    ("step", 1, "mpich", 0.3, ["train.global_batch=320", "train.max_steps=1"], 10),
    ("evaluate", 1, "openmpi", 0.7, ["train.max_steps=1"], 20),
    ("save", 0, "mpich", 0.3, [], 10),
]
MORE = [
    ("start", 1, "mpich", 0.1, [], 10),
    ("step", 0, "openmpi", 0.3, ["train.global_batch=320", "train.max_steps=1"], 10),
    ("materialize", 0, "openmpi", 1.0, [], 10),
    ("data", 0, "mpich", 1.5, [], 1),
    ("save", 1, "openmpi", 0.3, [], 10),
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "rank", "name", "nap", "settings", "times"), SLOW_WORK + MORE if ALL else SLOW_WORK
)
def test_slow_work_is_not_ended(tmp_path, data, kind, rank, name, nap, settings, times):
    """A step, an evaluation or a save of ten timeouts; one fsync takes one and a half."""
    timeout = 2.0
    long = 1.5 * timeout if kind == "save" else 0.0
    what = f"slow:{nap}:{long}", kind, rank
    job = Job(tmp_path, data, name, what, *settings, timeout=timeout, limit=280)
    assert job.code == 0, job.output
    assert job.happened() > times * timeout


class TestLooking:
    """The watchdog's verdicts, tick by tick, in this process."""

    @pytest.fixture(autouse=True)
    def state(self, monkeypatch):
        monkeypatch.setattr(progress, "_now", progress._Now())

    def dog(self, rank=0, size=2):
        found = Watchdog(10.0, rank, size)
        found.has_met = True
        found.look(1, [])
        return found

    def looks(self, dog, ticks, came=lambda tick: []):
        """The tick at which the job is ended, and why; None: it is not."""
        for tick in range(1, ticks + 1):
            if verdict := dog.look(1, came(tick)):
                return tick, verdict
        return None

    def test_one_without_progress_is_stuck(self):
        progress.note(7, "saving")
        tick, verdict = self.looks(self.dog(), 30)
        assert tick == 10 and verdict == "no progress for 10 seconds (after step 7, saving)"

    def test_one_that_still_loads_modules_is_given_a_little_more(self):
        dog = self.dog()
        dog.has_met = False
        assert self.looks(dog, 30)[0] == 14

    def test_one_with_progress_is_not(self):
        dog = self.dog()
        for _ in range(20):
            assert self.looks(dog, 9) is None
            progress.beat()

    def test_a_call_that_tells_nothing_gets_more_time(self):
        with progress.patiently("in the fsync of x"):
            tick, verdict = self.looks(self.dog(), 200)
        assert tick == 100 and "in the fsync of x" in verdict

    def test_one_that_waits_for_a_slow_rank_is_not_stuck(self):
        with progress.waiting("barrier on world"):
            signs = [[Sign(1, "b", n // 9, "", "saving")] for n in range(201)]
            assert self.looks(self.dog(), 200, signs.__getitem__) is None
            # another rank than 0 does not judge: rank 0 does
            signs = [[Sign(0, "a", 5, "", "saving")]] * 201
            assert self.looks(self.dog(rank=1), 200, signs.__getitem__) is None

    def test_one_that_gives_no_sign_is_named(self):
        def dies(tick):
            progress.beat()
            return [Sign(1, "hostb", tick, "", "after step 3, saving")] if tick < 5 else []

        tick, verdict = self.looks(self.dog(), 30, dies)
        assert tick == 14
        assert "no sign of life from rank 1 on hostb (after step 3, saving)" in verdict

    def test_ranks_that_wait_for_each_other_are_stuck(self):
        with progress.waiting("recv on pp"):
            signs = [[Sign(1, "b", 3, "barrier on world", "in barrier")]] * 31
            tick, verdict = self.looks(self.dog(), 30, signs.__getitem__)
        assert tick in (10, 11) and "all ranks wait: rank 1 on b (in barrier)" in verdict

    def test_without_signs_one_that_waits_is_stuck_a_little_later(self):
        with progress.waiting("barrier on world"):
            assert self.looks(self.dog(rank=0), 30)[0] == 11
            assert self.looks(self.dog(rank=1), 30)[0] == 12
        with progress.waiting("MPI_Init"):
            assert self.looks(self.dog(rank=0), 30)[0] == 15

    def test_a_timeout_of_zero_and_a_rank_that_ends_the_job_are_left_alone(self):
        for change in ({"timeout": 0.0}, {"quiet": True}):
            dog = self.dog()
            vars(dog).update(change)
            assert self.looks(dog, 200) is None


def test_signs_of_life_go_both_ways_and_foreign_ones_are_dropped():
    first, second, foreign = Signs(0), Signs(1), Signs(2)
    second.meet(first.address())
    foreign.meet(first.address()._replace(token="guessed"))
    foreign.exchange(Sign(2, "c", 1, "", "x"), 0.01)
    second.exchange(Sign(1, "b", 5, "", "at work"), 0.01)
    mine = Sign(0, "a", 9, "barrier on world", "waiting")
    # the sign was sent to each of rank 0's addresses
    assert set(first.exchange(mine, 0.2)) == {Sign(1, "b", 5, "", "at work")}
    assert set(second.exchange(Sign(1, "b", 6, "", "at work"), 0.1)) == {mine}
    for signs in (first, second, foreign):
        signs.close()


def test_neighbours_find_each_other_before_mpi_is_there(monkeypatch):
    monkeypatch.setattr(signs_module, "launcher_pid", os.getppid)
    first, second, none = (Signs.of_neighbours(rank, 3) for rank in (0, 1, 1))
    assert none is None  # the name is taken
    says = [Sign(rank, "a", 3, "MPI_Init", "waiting") for rank in (0, 1)]
    second.exchange(says[1], 0.01)
    assert first.exchange(says[0], 0.1) == [says[1]]
    assert second.exchange(says[1], 0.1) == [says[0]]
    first.close()
    second.exchange(says[1], 0.01)  # to nobody
    second.close()
    monkeypatch.setattr(signs_module, "launcher_pid", lambda: None)
    assert Signs.of_neighbours(0, 2) is None


@pytest.mark.timeout(20)
def test_a_rank_does_not_wait_for_a_stopped_neighbour_whose_queue_is_full(monkeypatch):
    monkeypatch.setattr(signs_module, "launcher_pid", os.getppid)
    awake, stopped = (Signs.of_neighbours(rank, 2) for rank in (0, 1))
    queue = Path("/proc/sys/net/unix/max_dgram_qlen").read_text()
    for _ in range(int(queue) + 5):
        awake._socket.settimeout(1000)  # as exchange does, for what is left of its seconds
        awake._send(b"a sign", awake._places[0])
    awake.close()
    stopped.close()


def test_files_that_are_opened_and_removed_are_progress(tmp_path):
    code = (
        "import os, sys\nfrom cupytron import progress\nprogress.count_files()\n"
        "def grows(work):\n    before = progress.beats()\n    work()\n"
        "    return progress.beats() > before\n"
        "path = sys.argv[1]\n"
        "print(grows(lambda: open(path, 'w').close()), grows(lambda: os.remove(path)),"
        " grows(lambda: __import__('wave')), grows(lambda: sum(range(9))))"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "x")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True", "True", "False"], done.stderr
