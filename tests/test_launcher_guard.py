"""A launcher that hangs after its ranks have ended is ended; any other one is left alone."""

import subprocess
import sys
import time

import pytest

from cupytron import launcher_guard
from cupytron.launcher_guard import guard

PARENT = "import subprocess, sys, time; child = subprocess.Popen(['sleep', sys.argv[1]]); {}"


def launcher(after, seconds, tmp_path):
    """A process with a child that ends after some seconds; it says so on stderr, a file."""
    with open(tmp_path / "stderr", "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT.format(after), str(seconds)], stderr=file
        )
    end = time.monotonic() + 30
    while not launcher_guard._has_children(process.pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


def started(process):
    return launcher_guard._status(process.pid)[2]


@pytest.mark.parametrize("after", ["time.sleep(1000)", "child.wait(); time.sleep(1000)"])
def test_a_launcher_that_hangs_is_ended_and_told(tmp_path, after):
    process = launcher(after, 3, tmp_path)
    try:
        assert guard(process.pid, started(process), idle=0.5, give_up=60)
        assert process.wait(10) == -9
    finally:
        process.kill()
    said = f"error: the launcher (process {process.pid}) hung after its ranks had ended; it was killed\n"
    assert (tmp_path / "stderr").read_text() == said


def test_a_launcher_at_work_is_left_alone(tmp_path):
    process = launcher("time.sleep(1000)", 20, tmp_path)
    try:
        assert not guard(process.pid, started(process), idle=0.3, give_up=1.5)
        assert not guard(process.pid, "1", idle=0, give_up=60)  # another process of that id
        assert process.poll() is None
    finally:
        subprocess.run(["pkill", "-P", str(process.pid)], check=False)
        process.kill()


def test_a_launcher_that_ends_ends_its_guard(tmp_path):
    process = launcher("child.wait()", 3, tmp_path)
    known = started(process)
    begin = time.monotonic()
    assert not guard(process.pid, known, idle=30, give_up=60)
    assert time.monotonic() - begin < 30
    assert process.wait() == 0


def test_the_program_outlives_the_rank_that_leaves_it_behind(tmp_path, monkeypatch):
    process = launcher("time.sleep(1000)", 3, tmp_path)
    code = (
        "import sys; from cupytron import launcher_guard; launcher_guard.IDLE = 0.5\n"
        "launcher_guard.leave(int(sys.argv[1]))"
    )
    try:
        subprocess.run([sys.executable, "-c", code, str(process.pid)], check=True, timeout=60)
        assert process.wait(30) == -9
    finally:
        process.kill()
