"""Files that cannot be read, are cut, or vanish while they are read: each gives its own error."""

import errno
import io
import os
import shutil

import numpy as np
import pytest

from cupytron import checkpoint, checkpoint_files, durable, manifest, reading
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.errors import DamagedCheckpoint, GoneCheckpoint, UnreadableCheckpoint
from cupytron.manifest import MANIFEST

FILE = "rank-00000.safetensors"
BOX = ((0, 1000),)


def write(folder, value=1.0):
    values = np.full(1000, value, np.float32)
    checkpoint.write(
        folder, [Piece("a", (1000,), BOX, 0, 1000, values)], {"step": 1, "value": value}
    )


def verify(folder):
    Checkpoint(folder).verify()


def read(folder):
    return Checkpoint(folder).read("a", BOX, 0, 1000)


@pytest.fixture
def failing(monkeypatch):
    """A function that makes some reads of a file fail, and returns the pauses between the tries."""
    pauses = []
    monkeypatch.setattr(reading.time, "sleep", pauses.append)

    def fail(name, number, times=10**9):
        left = times

        class Failing(io.FileIO):
            def readinto(self, buffer):
                nonlocal left
                if left > 0:
                    left -= 1
                    raise OSError(number, os.strerror(number))
                return super().readinto(buffer)

        original = durable.open_file

        def opened(path, follow=True):
            if path.name != name:
                return original(path, follow)
            return io.BufferedReader(Failing(path))

        for module in (manifest, checkpoint_files):
            monkeypatch.setattr(module, "open_file", opened)
        return pauses

    return fail


@pytest.mark.parametrize("use", [verify, read])
@pytest.mark.parametrize("name", [FILE, MANIFEST])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
class TestErrorsOfAMoment:
    def test_are_tried_again(self, tmp_path, failing, use, name, number):
        write(tmp_path / "a")
        pauses = failing(name, number, times=2)
        use(tmp_path / "a")
        assert pauses == [0.2, 0.4]

    def test_that_stay_are_no_damage(self, tmp_path, failing, use, name, number):
        write(tmp_path / "a")
        failing(name, number)
        words = rf"{name} cannot be read \({os.strerror(number)}\)"
        with pytest.raises(UnreadableCheckpoint, match=words):
            use(tmp_path / "a")


@pytest.mark.parametrize("name", [FILE, MANIFEST])
def test_no_permission_is_no_damage(tmp_path, failing, name):
    write(tmp_path / "a")
    pauses = failing(name, errno.EACCES)
    with pytest.raises(UnreadableCheckpoint, match="Permission denied"):
        verify(tmp_path / "a")
    assert pauses == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [FILE, MANIFEST])
def test_a_file_of_somebody_elses_is_no_damage(tmp_path, name):
    write(tmp_path / "a")
    (tmp_path / "a" / name).chmod(0)
    with pytest.raises(UnreadableCheckpoint, match="Permission denied"):
        verify(tmp_path / "a")


# beside a run that replaces and removes


def removed(folder):
    checkpoint.discard(folder)


def replaced(folder):
    write(folder, 2.0)


@pytest.mark.parametrize("happens", [removed, replaced])
@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize("use", [Checkpoint.verify, Checkpoint.digest])
def test_what_is_removed_or_replaced_is_gone_not_damaged(tmp_path, happens, verified, use):
    write(tmp_path / "a")
    found = Checkpoint(tmp_path / "a")
    if verified:
        found.verify()
    happens(tmp_path / "a")
    with pytest.raises(GoneCheckpoint):
        use(found)


def test_values_of_another_checkpoint_are_not_returned(tmp_path):
    """Lists and sizes are the same, values are not: only the manifest shows it."""
    write(tmp_path / "a", 1.0)
    found = Checkpoint(tmp_path / "a")
    found.verify()
    assert found.read("a", BOX, 0, 9)[0] == 1.0
    write(tmp_path / "a", 2.0)
    with pytest.raises(GoneCheckpoint, match="was replaced while it was read"):
        found.read("a", BOX, 0, 9)


def test_a_copy_of_the_same_checkpoint_will_do(tmp_path):
    write(tmp_path / "a")
    found = Checkpoint(tmp_path / "a")
    found.verify()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b").rename(tmp_path / "a")
    assert found.read("a", BOX, 0, 9)[0] == 1.0


def test_one_that_never_was_is_not_damaged(tmp_path):
    with pytest.raises(GoneCheckpoint, match="there is no such checkpoint"):
        Checkpoint(tmp_path / "a")


# damage


@pytest.mark.parametrize("use", [verify, read])
def test_a_file_that_goes_alone_is_damage(tmp_path, use):
    write(tmp_path / "a")
    (tmp_path / "a" / FILE).unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{FILE} is missing"):
        use(tmp_path / "a")


def test_a_file_that_is_cut_after_it_was_verified_is_damage(tmp_path):
    write(tmp_path / "a")
    found = Checkpoint(tmp_path / "a")
    found.verify()
    os.truncate(tmp_path / "a" / FILE, 3000)
    assert found.read("a", BOX, 0, 9)[0] == 1.0
    with pytest.raises(DamagedCheckpoint, match=f"{FILE} ends too early: it has been cut"):
        found.read("a", BOX, 0, 1000)


@pytest.mark.parametrize("left", [0, 5, 100, 3000])
def test_a_file_that_is_cut_while_it_is_hashed_is_damage(tmp_path, monkeypatch, left):
    write(tmp_path / "a")
    fstat = os.fstat

    def cut(descriptor):
        status = fstat(descriptor)
        if status.st_size > 4000:  # the file, not its manifest
            os.truncate(tmp_path / "a" / FILE, left)
        return status

    found = Checkpoint(tmp_path / "a")
    monkeypatch.setattr(checkpoint_files.os, "fstat", cut)
    with pytest.raises(DamagedCheckpoint, match=f"{FILE} is damaged"):
        found.verify()
