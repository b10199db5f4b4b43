"""A save that is killed at any point, or whose calls fail, leaves a whole checkpoint under its name."""

import errno
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from cupytron import checkpoint, checkpoint_folders, durable
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.errors import CheckpointError
from cupytron.manifest import MANIFEST

STEP = "step-00000020"
# Python's audit events before calls that change a folder
CALLS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}


def save(folder, value):
    values = np.full(6, value, np.float32)
    pieces = [Piece("weight/a", (6,), ((0, 6),), 0, 6, values)]
    checkpoint.write(folder / STEP, pieces, {"step": 20, "value": value})


def value_of(folder):
    """The value of the checkpoint in `folder`, which is verified."""
    found = Checkpoint(folder / STEP)
    assert set(dict(found.tensors())["weight/a"]) == {found.about["value"]}
    return found.about["value"]


@pytest.fixture(params=["exchanged", "set aside"])
def replacing(request, monkeypatch):
    """How a save takes the place of another: names are exchanged, or the old folder is set aside."""
    if request.param == "set aside":
        monkeypatch.setattr(checkpoint_folders, "exchange", lambda one, other: False)
    return request.param


def killed_at(number, work):
    """Run work() in a process that is killed at its call of this number; returns whether it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = number

    def count(event, arguments):
        nonlocal left
        if event in CALLS:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)
    try:
        work()
    finally:
        os._exit(0)


def test_a_save_that_is_killed_anywhere_loses_nothing(tmp_path, replacing):
    seen, restored = set(), 0
    for number in range(100):
        folder = tmp_path / f"{number}"
        save(folder, 1)
        killed = killed_at(number, lambda folder=folder: save(folder, 2))
        said = checkpoint.recover(folder)
        assert [p.name for p in folder.iterdir()] == [STEP]
        seen.add(value_of(folder))
        restored += len(said)
        assert all(STEP in line and "restored" in line for line in said)
        if not killed:
            break
    assert not killed and number >= 8 and seen == {1, 2}
    assert restored == (replacing == "set aside")


def test_names_are_exchanged_here(tmp_path):
    """Where names cannot be exchanged, the test that no name is ever missing would prove nothing."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not durable.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system has no RENAME_EXCHANGE")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        durable.exchange(tmp_path / "a", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("function", ["rename", "fsync"])
def test_a_save_whose_calls_fail_leaves_the_old(tmp_path, monkeypatch, replacing, function):
    save(tmp_path, 1)
    original, left = getattr(os, function), 0

    def fails(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            left = 1000  # the calls after it, which put things right, succeed
            raise OSError(errno.EIO, "Input/output error")
        return original(*arguments, **options)

    monkeypatch.setattr(os, function, fails)
    failed = 0
    for number in range(20):
        left = number
        try:
            save(tmp_path, 2)
        except OSError as error:
            assert "Input/output error" in str(error)
            failed += 1
        else:
            break
        left = 1000
        assert [p.name for p in tmp_path.iterdir()] == [STEP] and value_of(tmp_path) == 1
    assert value_of(tmp_path) == 2
    expected = {"fsync": 4, "rename": 0 if replacing == "exchanged" else 2}
    assert failed == expected[function]


def test_what_is_written_is_synced_before_it_is_named_and_before_the_old_goes(
    tmp_path, monkeypatch
):
    folder = tmp_path / "run" / "checkpoints"
    happened = []

    def note(module, name, what):
        original = getattr(module, name)

        def noted(*arguments, **options):
            happened.append((name, what(*arguments)))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, noted)

    def opened(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    note(os, "fsync", opened)
    note(os, "rename", lambda one, other: Path(other).name)
    note(checkpoint_folders, "exchange", lambda one, other: Path(other).name)
    note(checkpoint_folders, "_remove", lambda path: path.name)
    save(folder, 1)
    temporary = f".tmp-{STEP}-{os.getpid()}"
    written = [("fsync", "rank-00000.safetensors"), ("fsync", MANIFEST), ("fsync", temporary)]
    assert happened[:3] == written
    # the first save also syncs the folders above, whose names may be new
    assert happened[3:6] == [("fsync", "run"), ("fsync", tmp_path.name), *happened[5:6]]
    assert happened[-2:] == [("rename", STEP), ("fsync", "checkpoints")]
    happened.clear()
    save(folder, 2)
    if ("exchange", STEP) in happened and ("rename", STEP) not in happened:
        named = [("exchange", STEP), ("fsync", "checkpoints"), ("_remove", temporary)]
        assert happened == [*written, *named]


class TestRecover:
    def test_there_need_be_no_folder(self, tmp_path):
        assert checkpoint.recover(tmp_path / "checkpoints") == []

    def test_only_whole_ones_whose_place_is_free_come_back(self, tmp_path):
        for name in ("00000010", "00000020", "00000030", "00000040"):
            save(tmp_path / "from", 5)
            (tmp_path / "from" / STEP).rename(tmp_path / f".old-step-{name}-77.abc")
        save(tmp_path / "from", 6)
        (tmp_path / "from" / STEP).rename(tmp_path / STEP)
        (tmp_path / "from").rmdir()
        (tmp_path / ".old-step-00000030-77.abc" / "rank-00000.safetensors").unlink()
        path = tmp_path / ".old-step-00000040-77.abc" / MANIFEST
        path.write_bytes(path.read_bytes()[:-9])
        for name in (".old-", ".old-x", ".trash-step-00000050-77", ".tmp-step-00000060-77"):
            (tmp_path / name).mkdir()
        (tmp_path / ".trash-link-1").symlink_to(tmp_path / STEP)
        (tmp_path / ".tmp-file-1").touch()
        said = checkpoint.recover(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", STEP]
        assert len(said) == 1 and "step-00000010: restored" in said[0]
        assert value_of(tmp_path) == 6

    def test_what_cannot_be_read_now_is_left_there_and_told(self, tmp_path, monkeypatch):
        save(tmp_path, 5)
        (tmp_path / STEP).rename(tmp_path / f".old-{STEP}-77")

        def refuse(folder):
            raise checkpoint_folders.UnreadableCheckpoint(f"{folder}: Permission denied")

        monkeypatch.setattr(checkpoint_folders, "read_manifest", refuse)
        (said,) = checkpoint.recover(tmp_path)
        assert said.endswith("Permission denied; it is left there")
        monkeypatch.undo()
        assert len(checkpoint.recover(tmp_path)) == 1 and value_of(tmp_path) == 5

    def test_a_removal_that_is_killed_is_no_checkpoint(self, tmp_path):
        for number in range(10):
            save(tmp_path, 1)
            killed = killed_at(number, lambda: checkpoint.discard(tmp_path / STEP))
            if number:
                assert checkpoint.recover(tmp_path) == [] and not list(tmp_path.iterdir())
            if not killed:
                break
        assert not killed and number > 3
        with pytest.raises(CheckpointError, match="there is no such checkpoint"):
            Checkpoint(tmp_path / STEP)
