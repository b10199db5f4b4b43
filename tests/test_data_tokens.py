"""Ids are read by plain reads: a data set that changes under a run gives an error, and no signal."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import command, make_data, start

from cupytron.data import DataError, Loader, Split, evaluation_batches, open_dataset
from cupytron.data.tokens import FileTokens


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def data(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def readers(dataset):
    """A function for each split that reads it again at each call."""
    evaluation = evaluation_batches(dataset.val, 16, 4)
    return {
        "train": lambda: Loader(dataset.train, 16, 1).batch(0, 64),
        "val": lambda: next(evaluation),
    }


def overwrite(path, at, ids):
    """Overwrite a file in place, as `cp` and rsync --inplace do."""
    with open(path, "r+b") as file:
        file.seek(2 * at)
        file.write(np.asarray(ids, "<u2").tobytes())


def test_elements_and_slices_are_those_of_an_array(tmp_path):
    ids = np.arange(10, 21, dtype="<u4")
    (tmp_path / "a").write_bytes(ids.tobytes() + b"xx")
    tokens = FileTokens(tmp_path / "a", ids.dtype)
    assert len(tokens) == 11 and tokens.dtype == np.uint32
    for index in (0, 10, -1, -11, slice(2, 5), slice(5, 2), slice(-3, None), slice(0, 99)):
        assert np.array_equal(tokens[index], ids[index])
    for index in (11, -12):
        with pytest.raises(IndexError):
            tokens[index]
    with pytest.raises(ValueError, match="step 2"):
        tokens[::2]
    assert np.array_equal(np.asarray(tokens), ids) and np.array_equal(list(tokens), ids)


def test_a_system_that_reads_little_at_once_loses_nothing(tmp_path, monkeypatch):
    """One call of Linux reads at most 2 GiB."""
    ids = np.arange(1000, dtype="<u2")
    (tmp_path / "a").write_bytes(ids.tobytes())
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, at: pread(file, min(count, 7), at))
    assert np.array_equal(FileTokens(tmp_path / "a", ids.dtype)[3:], ids[3:])


def test_offsets_have_64_bits(tmp_path):
    size = (1 << 32) + 99
    with open(tmp_path / "a", "wb") as file:
        file.truncate(2 * size)  # of no blocks on disk
    overwrite(tmp_path / "a", size - 16, range(1, 17))
    tokens = FileTokens(tmp_path / "a", np.dtype("<u2"))
    loader = Loader(Split(tokens), size - 1, seed=1)  # one window, the whole of it
    assert loader.starts(0, 1).dtype == np.int64
    assert tokens[size - 16 : size].tolist() == [*range(1, 17)] and tokens[-1] == 16
    loader = Loader(Split(tokens), 15, seed=1)
    loader.starts = lambda position, count: np.array([size - 16])
    assert loader.batch(0, 1)[1].tolist() == [[*range(2, 17)]]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_that_is_cut_short_is_named(data, split):
    """The memory map of earlier versions ended the process with SIGBUS."""
    read = readers(open_dataset(data))[split]
    read()
    os.truncate(data / f"{split}.bin", 100)
    with pytest.raises(DataError, match=rf"{split}\.bin: its bytes end at 100, .*cut short"):
        read()


@pytest.mark.parametrize("at", [0, 49, 50, 51, 9_000])
def test_the_end_of_a_file_is_told_wherever_it_was_read(data, at):
    tokens = open_dataset(data).train.tokens
    os.truncate(data / "train.bin", 100)
    with pytest.raises(DataError, match=r"train\.bin: its bytes end at 100, and had 37,848 when"):
        tokens[at : at + 60]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("value", "message"), [(60_000, "has id 60000, outside"), (1, "SHA-256")])
def test_ids_that_are_overwritten_are_told(data, split, value, message):
    read = readers(open_dataset(data))[split]
    read()
    overwrite(data / f"{split}.bin", 70, [value] * 500)
    with pytest.raises(DataError, match=rf"{split}\.bin: .*{message}"):
        read()


def test_ids_outside_the_vocabulary_are_told_where_a_file_keeps_its_time(data):
    """Some network file systems return fewer bytes than asked for."""
    read = readers(open_dataset(data))
    for split in ("train", "val"):
        path = data / f"{split}.bin"
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        overwrite(path, 0, [60_000] * (path.stat().st_size // 2))
        os.utime(path, ns=times)
        with pytest.raises(DataError, match=rf"the {split} split has id 60000, .*was changed"):
            read[split]()


def test_what_changes_no_token_is_no_error(data):
    dataset, same = open_dataset(data), open_dataset(data)
    read, again = readers(dataset), readers(same)
    os.utime(data / "train.bin")
    with open(data / "val.bin", "ab") as file:
        file.write(b"xx")
    for split in read:
        for one, other in zip(read[split](), again[split](), strict=True):
            assert np.array_equal(one, other)
    # another data set of that name, as --overwrite makes it: the open one is still the old one
    shutil.rmtree(data)
    for split in read:
        for one, other in zip(read[split](), again[split](), strict=True):
            assert np.array_equal(one, other)


def test_a_file_that_cannot_be_read_is_named(data, monkeypatch):
    read = readers(open_dataset(data))["train"]

    def fail(*_):
        raise OSError(116, "Stale file handle")

    for call in ("pread", "fstat"):
        with monkeypatch.context() as broken, pytest.raises(DataError, match=r"train\.bin.*Stale"):
            broken.setattr(os, call, fail)
            read()
    read()


def test_open_files_are_closed_with_their_data_set(data):
    code = (
        "import os, sys, gc; from cupytron.data import open_dataset\n"
        "count = lambda: len(os.listdir('/proc/self/fd'))\n"
        "before = count(); opened = open_dataset(sys.argv[1]); assert count() == before + 2\n"
        "del opened; gc.collect(); assert count() == before"
    )
    subprocess.run([sys.executable, "-X", "dev", "-c", code, data], check=True, timeout=60)


def test_a_run_whose_data_is_cut_short_says_so(data, tmp_path):
    process = start(
        command(data, tmp_path / "run", "train.max_steps=100000", "train.eval_interval=0")
    )
    while process.poll() is None and not list(tmp_path.glob("run/checkpoints/step-*")):
        time.sleep(0.01)
    os.truncate(data / "train.bin", 1000)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 1, out
    assert (
        "error: " in out and "train.bin: its bytes end at 1,000" in out and "Traceback" not in out
    )
