"""What a command shows while it works: fields that fit, phases that last, counters, a terminal."""

import io
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest
from runs import command, make_data, run_here

from cupytron import progress, terminal
from cupytron.data import open_dataset
from cupytron.progress import Count, Doing
from cupytron.run_folder import RunFolder
from cupytron.terminal import Display, Field, Progress, clock, doing_fields, fit

RECORD = {
    "step": 12,
    "loss": 3.5939,
    "lr": 1.27e-4,
    "grad_norm": 0.7,
    "tokens_per_second": 3613.0,
    "gflops_per_second": 0.1,
    "gflops_per_second_causal": 0.1,
    "peak_memory_bytes": 2**20,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def test_the_least_important_fields_are_left_out_first():
    fields = [Field("step 1/9"), Field("loss 2.0", 1), Field("lr 1", 3), Field("left 0:01", 2)]
    assert fit(fields) == "step 1/9  loss 2.0  lr 1  left 0:01"
    assert fit(fields, 30) == "step 1/9  loss 2.0  left 0:01"
    assert fit(fields, 20) == "step 1/9  loss 2.0"
    assert fit(fields, 10) == "step 1/9"
    assert fit(fields, 4) == "step"


def test_a_step_s_line_has_what_a_person_waits_for(capsys):
    progress.phase("at the beginning of a test")
    with Progress(20) as shown:
        shown.step(RECORD)
        shown.step({**RECORD, "step": 20})
    first, last = capsys.readouterr().out.splitlines()
    assert first == "step 12/20  loss 3.5939  lr 1.27e-04  3,613 tokens/s  left ?"
    assert last.endswith("left 0:00")
    assert len(shown.text(39)) <= 39 and "loss" in shown.text(39) and "left" in shown.text(39)


@pytest.mark.parametrize(
    ("doing", "line"),
    [
        (Doing(3, "in the step", 12.0, None, ""), "in step 4  for 0:12"),
        (Doing(0, "evaluating", 4.0, Count(25, 100, "tokens", 4.0), ""), "left 0:12"),
        (
            Doing(7, "saving", 4.0, Count(2**20, 2**22, "bytes", 1.0), ""),
            "step 7, saving  1 of 4 MB",
        ),
        (Doing(0, "opening", 3.0, None, "all_reduce on dp"), "waiting in all_reduce on dp"),
    ],
)
def test_a_phase_that_lasts_is_shown(doing, line):
    assert line in fit(list(doing_fields(doing)))
    assert len(fit(list(doing_fields(doing)), 40)) <= 40


def test_clocks_count_hours_and_minutes():
    assert [clock(s) for s in (0.4, 59.6, 3661, 90_000)] == [
        "0:00",
        "1:00",
        "1:01:01",
        "25:00:00",
    ]


def test_counts_begin_anew_with_a_phase_and_with_the_next_piece_of_work():
    progress.note(1, "reading")
    progress.count(5, 10, "bytes")
    assert progress.doing().counted[:3] == (5, 10, "bytes")
    began = progress._now.count[3]
    time.sleep(0.01)
    progress.note(1, "reading")  # the same phase goes on
    progress.count(7, 10, "bytes")
    assert progress._now.count[3] == began
    progress.count(1, 10, "bytes")
    assert progress._now.count[3] > began
    progress.note(1, "writing")
    assert progress.doing().counted is None


def test_plain_lines_come_ever_more_seldom(monkeypatch):
    for name, value in (("LONG", 0.05), ("EVERY", 0.1), ("_TICK", 0.01)):
        monkeypatch.setattr(terminal, name, value)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    progress.note(3, "evaluating")
    progress.count(0, 100, "tokens")
    with Display(stderr=True):
        deadline = time.monotonic() + 60
        while stream.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    took = progress.doing().seconds
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 3 and lines[0].startswith("step 3, evaluating  0 of 100 tokens")
    assert took >= 0.1 + 0.2 + 0.4


def test_a_short_phase_and_a_quiet_command_say_nothing(monkeypatch):
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    monkeypatch.setattr(terminal, "_TICK", 0.01)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    progress.note(4, "evaluating")
    with Display(stderr=True):
        time.sleep(0.1)
    monkeypatch.setattr(terminal, "LONG", 0.0)
    with Display(quiet=True, stderr=True) as quiet:
        quiet.line("a line")
        time.sleep(0.1)
    assert stream.getvalue() == ""


def test_a_stream_that_its_owner_closed_ends_no_run(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Display(stderr=True) as display:
        stream.close()
        display.line("a line")
        assert display.quiet


def test_work_of_every_kind_is_counted(data, tmp_path, monkeypatch):
    seen = set()
    inner = progress.count

    def count(done, total, unit):
        assert 0 <= done <= total and total > 0
        seen.add((progress.doing().phase, unit))
        inner(done, total, unit)

    monkeypatch.setattr(progress, "count", count)
    open_dataset(data, verify=True)
    settings = ["train.max_steps=4", "train.eval_interval=4"]
    run_here(data, tmp_path / "run", *settings)
    run_here(data, tmp_path / "run", *settings, "train.max_steps=5")
    units = {unit for _, unit in seen}
    assert units == {"tokens", "bytes", "tensors", "micro-batches"}
    assert {("evaluating", "tokens"), ("saving", "bytes"), ("in the step", "micro-batches")} <= seen
    assert ("reading the checkpoint", "tensors") in seen


def test_the_record_keeps_what_the_line_leaves_out(data, tmp_path):
    run_here(data, tmp_path / "run", "train.max_steps=3", "train.log_interval=2")
    records = [r for r in RunFolder(tmp_path / "run").read_metrics() if "loss" in r]
    extra = {"gflops_per_second", "gflops_per_second_causal", "peak_memory_bytes"}
    assert [extra <= set(r) for r in records] == [
        True,
        True,
        True,
    ]  # the first, every second, the last


def in_terminal(argv, columns, times):
    """What a command writes to a terminal of so many columns, until so many live lines have come."""
    main, side = pty.openpty()
    ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        argv, stdout=side, stderr=side, stdin=side, env={**environment, "TERM": "xterm"}
    )
    os.close(side)
    text, deadline = b"", time.monotonic() + 100
    try:
        while text.count(b"left") < times and time.monotonic() < deadline:
            if select.select([main], [], [], 1)[0]:
                text += os.read(main, 65536)
    finally:
        process.kill()
        process.wait()
        os.close(main)
    return text.decode()


def test_the_live_line_never_wraps(data, tmp_path):
    argv = command(data, tmp_path / "run", "train.max_steps=1000", "train.eval_interval=0")
    text = in_terminal(argv, 40, 5)
    assert "\x1b[1A" not in text  # nothing that was drawn took two lines
    parts = text.replace("\x1b[2K", "").replace("\n", "\r").split("\r")
    live = [part for part in parts if "/1000" in part]
    assert live and all(len(part) < 40 and "left" in part for part in live), live
