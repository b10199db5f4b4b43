"""If `prepare` is stopped or killed, the output is the old data set or the new one, and nothing is left."""

import builtins
import errno
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import runs

from cupytron import durable
from cupytron.cli import main
from cupytron.data import DataError, open_dataset, prepare_dataset, work
from cupytron.data.stopping import OrderlyStop, Stopped
from cupytron.data.work import WorkFolder, remove_dead
from cupytron.durable import exchange

KILLED_WHILE_REPLACING = """
import os, pathlib, sys
from cupytron.data import prepare_dataset, work
rename = pathlib.Path.rename
def rename_and_die(path, target):
    rename(path, target)
    os.kill(os.getpid(), 9)
work.exchange = lambda *_: False
pathlib.Path.rename = rename_and_die
prepare_dataset(["b.txt"], "out", overwrite=True)
"""
KILLED_WHILE_COUNTING = """
import os
from cupytron.data import prepare_dataset, writer
writer._count = lambda *_: os.kill(os.getpid(), 9)
prepare_dataset(["b.txt"], "out", overwrite=True)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with two texts, and a data set of the first."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    prepare_dataset(["a.txt"], "out")
    return tmp_path


def text(folder="out"):
    """The text, of the two, that a data set was made from."""
    dataset = open_dataset(folder, verify=True)
    (value,) = set(dataset.train.tokens[:].tolist()) | set(dataset.val.tokens[:].tolist())
    return chr(value)


def names(folder="."):
    return sorted(os.listdir(folder))


def killed(code):
    result = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert result.returncode == -signal.SIGKILL


def signalling(number, function=lambda *_: None):
    """A function that first sends this process a signal."""

    def call(*arguments, **options):
        signal.raise_signal(number)
        return function(*arguments, **options)

    return call


def test_names_are_exchanged_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or file system cannot exchange names")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


def test_a_system_that_cannot_exchange_says_so(tmp_path, monkeypatch):
    class Old:
        pass

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Old())
    assert not exchange(tmp_path, tmp_path)


def test_a_replaced_data_set_has_its_name_at_every_moment(here, monkeypatch):
    """Earlier versions renamed the old folder first, and a kill then left neither data set."""
    if not exchange(here / "a.txt", here / "b.txt"):
        pytest.skip("this system or file system cannot exchange names")
    exchange(here / "a.txt", here / "b.txt")
    for name in ("rename", "replace", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, self_checking(getattr(os, name)))
    prepare_dataset(["b.txt"], "out", overwrite=True)
    monkeypatch.undo()
    os.chdir(here)
    assert text() == "b" and names() == ["a.txt", "b.txt", "out"]


def self_checking(function):
    def call(*arguments, **options):
        assert Path("out/train.json").exists()
        result = function(*arguments, **options)
        assert Path("out/train.json").exists()
        return result

    return call


@pytest.mark.parametrize("fails", [False, True])
def test_without_exchange_the_old_one_comes_back_where_the_new_one_fails(here, monkeypatch, fails):
    rename = Path.rename

    def second_fails(path, target):
        if fails and path.name == "new":
            raise OSError(5, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(work, "exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", second_fails)
    if fails:
        with pytest.raises(DataError, match="out: Input/output"):
            prepare_dataset(["b.txt"], "out", overwrite=True)
    else:
        prepare_dataset(["b.txt"], "out", overwrite=True)
    assert text() == ("a" if fails else "b") and names() == ["a.txt", "b.txt", "out"]


def test_what_a_kill_left_without_a_name_is_told_and_brought_back(here):
    killed(KILLED_WHILE_REPLACING)
    (left,) = here.glob(".out.*.tmp")
    assert names() == [left.name, "a.txt", "b.txt"]
    with pytest.raises(
        DataError, match=rf"out: no such folder; .*killed.* mv .*{left.name}/old out"
    ):
        open_dataset("out")
    said = []
    with pytest.raises(DataError, match="give --overwrite"):
        prepare_dataset(["b.txt"], "out", report=said.append)
    assert text() == "a" and names() == ["a.txt", "b.txt", "out"]
    assert "bringing back" in said[0] and left.name in said[1]


def test_what_a_kill_left_behind_is_removed_by_the_next(here):
    killed(KILLED_WHILE_COUNTING)
    (left,) = here.glob(".out.*.tmp")
    assert text() == "a" and (left / "new" / "train.bin").stat().st_size
    prepare_dataset(["b.txt"], "other")  # another output is none of its business
    assert left.exists()
    prepare_dataset(["b.txt"], "out", overwrite=True)
    assert text() == "b" and names() == ["a.txt", "b.txt", "other", "out"]


def test_the_work_of_the_living_is_not_touched(here):
    with WorkFolder(here / "out") as living:
        (living.new / "train.bin").touch()
        assert prepare_dataset(["b.txt"], "out", overwrite=True).notes == []
        assert (living.new / "train.bin").exists()
    assert text() == "b" and names() == ["a.txt", "b.txt", "out"]


def test_folders_without_a_lock(here):
    """An empty one was killed at its first moment. Others are of earlier versions, and may be in use."""
    (here / ".out.00000000.tmp").mkdir()
    (here / ".out.00000001.tmp" / "new").mkdir(parents=True)
    (here / ".out.0000000g.tmp").mkdir()  # somebody else's
    (here / ".out.00000002.tmp").touch()
    notes = prepare_dataset(["b.txt"], "out", overwrite=True).notes
    assert len(notes) == 1 and "00000001.tmp: left by another data prepare" in notes[0]
    assert not (here / ".out.00000000.tmp").exists()
    for name in ("00000001", "0000000g", "00000002"):
        assert (here / f".out.{name}.tmp").exists()


def test_a_kill_while_removing_leaves_what_the_next_removes(here, monkeypatch):
    """The lock is removed last."""
    killed(KILLED_WHILE_COUNTING)

    def interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr("shutil.rmtree", interrupt)
        remove_dead(here / "out", print)
    (left,) = here.glob(".out.*.tmp")
    assert names(left) == ["lock", "new"]
    assert remove_dead(here / "out", print) == [] and names() == ["a.txt", "b.txt", "out"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
@pytest.mark.parametrize(
    "where", ["writer._count", "prepare._open_sources", "work.WorkFolder.publish"]
)
def test_a_signal_ends_the_command_and_leaves_nothing(
    here, monkeypatch, capsys, number, code, where
):
    handlers = [signal.getsignal(n) for n in (1, 2, 15)]
    publish = WorkFolder.publish
    whole = where == "work.WorkFolder.publish"  # the signal waits for the end of it
    function = signalling(number, publish) if whole else signalling(number)
    monkeypatch.setattr(f"cupytron.data.{where}", function)
    with pytest.raises(SystemExit) as info:
        main.run(["data", "prepare", "b.txt", "--out", "out", "--overwrite"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert info.value.code == code
    name = signal.Signals(number).name
    assert error.startswith(
        "error: interrupted" if number == signal.SIGINT else f"error: stopped by {name}; nothing"
    )
    assert text() == ("b" if whole else "a") and names() == ["a.txt", "b.txt", "out"]
    assert [signal.getsignal(n) for n in (1, 2, 15)] == handlers


def test_more_signals_do_not_interrupt_the_clean_up(here, monkeypatch):
    monkeypatch.setattr("cupytron.data.writer._count", signalling(signal.SIGTERM))
    for name in ("unlink", "rmdir"):
        call = signalling(signal.SIGHUP, signalling(signal.SIGINT, getattr(os, name)))
        monkeypatch.setattr(os, name, call)
    with pytest.raises(Stopped, match="143"):
        prepare_dataset(["b.txt"], "out", overwrite=True)
    assert text() == "a" and names() == ["a.txt", "b.txt", "out"]


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with OrderlyStop() as stop, stop.released():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_signals_stay_as_they_are(here):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(prepare_dataset(["b.txt"], "out", overwrite=True))
    )
    thread.start()
    thread.join(60)
    assert len(results) == 1 and text() == "b"


def test_all_is_on_disk_before_the_name_is_given(here, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def record_sync(file):
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        events.append(("new" if path.parent.name == "new" else "", path.name))
        return fsync(file)

    def record_exchange(new, out):
        events.append(("named", out.name))
        return exchange(new, out)

    def record_rename(path, target):
        events.append(("named", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(work, "exchange", record_exchange)
    monkeypatch.setattr(Path, "rename", record_rename)
    files = ["train.bin", "val.bin", "train.json", "val.json", "tokenizer.json"]
    for out, overwrite in (("out", True), ("deep/er/fresh", False)):
        events.clear()
        prepare_dataset(["b.txt"], out, overwrite=overwrite)
        named = events.index(("named", Path(out).name))
        before, after = events[:named], events[named:]
        last = max(before.index(("new", name)) for name in files)
        assert ("", "new") in before[last:]
        assert ("", Path(out).absolute().parent.name) in after
    # the folders above the output, which are made on the way
    assert [name for _, name in events[:2]] == [here.name, "deep"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_moments(here):
    """After each of 30 kills the data set is whole, and after one more prepare nothing else is there."""
    for name in "ab":
        (here / f"{name}.txt").write_text(name * 6_000_000)
    command = [runs.cupytron(), "data", "prepare", "X", "--out", "out", "--overwrite"]

    def start(name):
        command[3] = f"{name}.txt"
        return runs.start(command)

    began = time.monotonic()
    process = start("a")
    while not list(here.glob(".out.*.tmp")):
        assert process.poll() is None
        time.sleep(0.001)
    imported = time.monotonic()
    assert process.wait(120) == 0
    seconds = time.monotonic() - imported
    print(f"{imported - began:.2f} s to begin, {seconds:.2f} s of work")
    chance = random.Random(1)
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP] * 10
    ends = []
    for turn, number in enumerate(numbers):
        before, wanted, left = text(), "ab"[turn % 2], set(here.glob(".out.*.tmp"))
        process = start(wanted)
        while process.poll() is None and not set(here.glob(".out.*.tmp")) - left:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 1.05 * seconds))
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
        ends.append((number.name, process.returncode, text()))
        assert text() in (before, wanted), out
        if number == signal.SIGKILL:
            assert process.returncode in (0, -9)
        else:
            assert process.returncode in (0, 128 + number, -number), out
            assert list(here.glob(".out.*.tmp")) == [], out
    print(ends)
    assert start("b").wait(120) == 0
    assert text() == "b" and names() == ["a.txt", "b.txt", "out"]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "name", ["train.bin", "val.bin", "tokenizer.json", "train.json", "val.json"]
)
@pytest.mark.parametrize("call", ["open", "write"])
def test_a_full_disk_is_told_with_the_file_and_the_way_on(here, monkeypatch, call, name):
    def full_open(path, mode="r", *more, **options):
        if not str(path).endswith(name) or "w" not in mode:
            return real_open(path, mode, *more, **options)
        if call == "open":
            raise OSError(FULL.errno, FULL.strerror, str(path))
        return real_open("/dev/full", mode, *more, **options)

    real_open = open
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", full_open)
    with pytest.raises(DataError) as info:
        prepare_dataset(["b.txt"], "out", overwrite=True)
    assert str(info.value) == (
        f"{here}/out/{name}: No space left on device, while the data set was written; make room there, "
        "and give the same command again"
    )
    assert text() == "a" and names() == ["a.txt", "b.txt", "out"]


@pytest.mark.parametrize(
    ("failing", "place"),
    [("above", "above"), (".new.*.tmp", "above/new"), ("lock", "above/new"), ("new", "above/new")],
)
def test_a_full_disk_is_told_before_there_is_a_file(here, monkeypatch, failing, place):
    def failing_when_named(real):
        def call(path, *more, **options):
            if fnmatch(os.path.basename(path), failing):
                raise OSError(FULL.errno, FULL.strerror, str(path))
            return real(path, *more, **options)

        return call

    monkeypatch.setattr(os, "mkdir", failing_when_named(os.mkdir))
    monkeypatch.setattr(work, "open", failing_when_named(open), raising=False)
    with pytest.raises(DataError, match="make room there, and give the same command again") as info:
        prepare_dataset(["b.txt"], "above/new")
    assert str(info.value).startswith(f"{here}/{place}: No space left on device")


def test_a_source_that_cannot_be_read_is_named(here, monkeypatch):
    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(durable, "open_file", lambda path: Broken())
    with pytest.raises(DataError, match=r"b\.txt: cannot read: Input/output error"):
        prepare_dataset(["b.txt"], "new")
