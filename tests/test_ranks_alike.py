"""Ranks compare the copies of the data set on all machines, and their OpenBLAS kernels."""

import shutil
import subprocess
import threading

import pytest
from launchers import launch
from runs import ENVIRONMENT, command, make_data

from cupytron import mesh_run
from cupytron.comm import run_ranks
from cupytron.data import DataError
from cupytron.errors import ConfigError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def damaged_copy(data, place, name="train.bin"):
    """A copy of a data set in which two tokens have changed places: the ids stay possible ones."""
    shutil.copytree(data, place)
    content = bytearray((place / name).read_bytes())
    content[:4] = content[2:4] + content[:2]
    assert bytes(content) != (data / name).read_bytes()
    (place / name).write_bytes(content)
    return place


def failures(size, body):
    """The error of every rank."""
    found = [None] * size

    def caught(world):
        try:
            body(world)
        except Exception as error:
            found[world.rank] = error

    run_ranks(size, caught)
    return found


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_damaged_copy_of_the_data_is_found_on_any_rank(tmp_path, data, name, rank):
    bad = damaged_copy(data, tmp_path / "copy", name)
    paths = [bad if r == rank else data for r in range(3)]
    for error in failures(3, lambda world: mesh_run.open_data(paths[world.rank], world)):
        assert isinstance(error, DataError)
        assert str(error).startswith(f"rank {rank} on ") and f"{name}: its SHA-256 is" in str(error)


def test_a_copy_is_hashed_once_on_each_machine(monkeypatch, tmp_path, data):
    shutil.copytree(data, tmp_path / "copy")
    here, hashed = threading.local(), []
    monkeypatch.setattr(mesh_run, "host", lambda: here.name)
    opened = mesh_run.open_dataset

    def counted(path, verify):
        if verify:
            hashed.append(here.rank)
        return opened(path, verify=verify)

    monkeypatch.setattr(mesh_run, "open_dataset", counted)

    def body(world, hosts, paths):
        here.name, here.rank = hosts[world.rank], world.rank
        mesh_run.open_data(paths[world.rank], world)

    copy = tmp_path / "copy"
    for hosts, paths, expected in [
        ("aaaa", [data] * 4, [0]),
        ("aabb", [data] * 4, [0, 2]),
        ("aaaa", [data, data, copy, copy], [0, 2]),
        ("abab", [data, data, copy, copy], [0, 1, 2, 3]),
    ]:
        hashed.clear()
        run_ranks(4, lambda world, h=hosts, p=paths: body(world, h, p))
        assert sorted(hashed) == expected


def test_a_rank_without_the_data_is_named_on_every_rank(tmp_path, data):
    paths = [data, tmp_path / "nothing"]
    for error in failures(2, lambda world: mesh_run.open_data(paths[world.rank], world)):
        assert "rank 1 on" in str(error) and "no such folder" in str(error)


def test_another_arithmetic_is_told_and_refused_where_bits_are_promised():
    def body(world, exact):
        kernel = "Haswell" if world.rank else "SkylakeX"
        return mesh_run.check_arithmetic(world, {**ENVIRONMENT, "blas_loaded": kernel}, exact)

    for lines in run_ranks(2, lambda world: body(world, False)):
        assert (
            len(lines) == 1 and "rank 1 on" in lines[0] and "Haswell, rank 0 SkylakeX" in lines[0]
        )
    for error in failures(2, lambda world: body(world, True)):
        assert isinstance(error, ConfigError) and "train.deterministic: rank 1" in str(error)
    alike = run_ranks(2, lambda world: mesh_run.check_arithmetic(world, ENVIRONMENT, True))
    assert alike == [[], []]


def test_a_damaged_local_copy_ends_the_job_before_it_trains(tmp_path, data):
    """Two working folders stand for two machines, each with its own copy under the same path."""
    for rank in (0, 1):
        (tmp_path / f"n{rank}").mkdir()
    shutil.copytree(data, tmp_path / "n0" / "data")
    damaged_copy(data, tmp_path / "n1" / "data")
    train = command("data", tmp_path / "run", "parallel.dp=2")
    (mpirun, *_), env = launch("mpich", 1, train)
    parts = [["-n", "1", "-wdir", str(tmp_path / f"n{rank}"), *train] for rank in (0, 1)]
    done = subprocess.run(
        [mpirun, *parts[0], ":", *parts[1]], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rank 1 on" in done.stderr and "train.bin: its SHA-256" in done.stderr
    assert not (tmp_path / "run").exists()
