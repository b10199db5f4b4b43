"""Checkpoints of many ranks: any mesh reads any other's, and a rank that fails fails all."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_ranks
import numpy as np
import pytest
from checkpoint_ranks import pieces_of
from hypothesis import given, settings
from hypothesis import strategies as st
from launchers import NAMES, launch

from cupytron import checkpoint, piece_table
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.checkpoint_files import CheckpointFiles
from cupytron.checkpoint_format import Listed, volume
from cupytron.comm import run_ranks
from cupytron.errors import CheckpointError, DamagedCheckpoint

SIZES = [1, 2, 3, 4]


@pytest.mark.parametrize("size", SIZES)
def test_ranks_write_and_read(tmp_path, size):
    run_ranks(size, lambda comm: checkpoint_ranks.check_round_trip(comm, tmp_path))


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_with_nan_fails_all(tmp_path, size):
    run_ranks(size, lambda comm: checkpoint_ranks.check_a_failing_rank_fails_all(comm, tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_processes_write_and_read(tmp_path, name):
    body = [sys.executable, checkpoint_ranks.__file__, str(tmp_path)]
    command, env = launch(name, 2, body)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written and read by 2 ranks" in done.stdout


def test_the_digest_does_not_know_how_many_ranks_wrote(tmp_path):
    digests = []
    for tp, dp in ((1, 1), (2, 1), (1, 3), (2, 2), (3, 1)):
        place = tmp_path / f"{tp}-{dp}"
        run_ranks(
            tp * dp,
            lambda comm, place=place, tp=tp, dp=dp: checkpoint.write(
                place, pieces_of(comm.rank, tp, dp), {"step": 1}, comm
            ),
        )
        digests.append(Checkpoint(place).digest())
    assert all(digest == digests[0] for digest in digests)


def everyone_fails(size, body, kind):
    """The message that all ranks raise."""

    def caught(comm):
        with pytest.raises(kind) as error:
            body(comm)
        return type(error.value), str(error.value)

    said = run_ranks(size, caught, timeout=10)
    assert set(said) == {said[0]}
    return said[0][1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["rank-{last:05d}.safetensors", "manifest.json", "folder"])
def test_a_full_disk_fails_all_and_leaves_the_old(tmp_path, monkeypatch, size, name):
    def write(comm):
        checkpoint.write(tmp_path / "a", pieces_of(comm.rank, size, 1), {"step": 1}, comm)

    run_ranks(size, write)
    before = Checkpoint(tmp_path / "a").digest()
    name, rank = name.format(last=size - 1), size - 1 if name.startswith("rank") else 0
    full = OSError(errno.ENOSPC, "No space left on device", name)

    def refuse(original, where):
        def wrapped(path, *rest):
            if where(Path(path)):
                raise full
            return original(path, *rest)

        return wrapped

    def named(path):
        return path.name == name

    for module, function, where in (
        (checkpoint, "write_tensors", named),
        (checkpoint, "write_synced", named),
        (checkpoint, "sync_folder", lambda path: name == "folder"),
    ):
        monkeypatch.setattr(module, function, refuse(getattr(module, function), where))
    message = everyone_fails(size, write, OSError)
    assert "No space left on device" in message
    assert size == 1 or f"rank {rank}: " in message
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert Checkpoint(tmp_path / "a").digest() == before


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_do_not_share_the_folder_are_told(tmp_path, size):
    def write(comm):
        own = tmp_path / f"machine-{min(comm.rank, 1)}" / "a"
        checkpoint.write(own, pieces_of(comm.rank, size, 1), {"step": 1}, comm)

    assert "a file system that all ranks share" in everyone_fails(size, write, CheckpointError)
    assert not list((tmp_path / "machine-0").iterdir())


def test_a_folder_of_the_same_name_elsewhere_is_not_taken_for_the_shared_one(tmp_path):
    def write(comm):
        own = tmp_path / f"machine-{comm.rank}" / "a"
        if comm.rank:
            own.with_name(f".tmp-a-{os.getpid()}").mkdir(parents=True)
        checkpoint.write(own, pieces_of(comm.rank, 2, 1), {"step": 1}, comm)

    assert "a file system that all ranks share" in everyone_fails(2, write, CheckpointError)


def test_a_bug_on_one_rank_ends_the_others(tmp_path):
    def broken():
        yield from pieces_of(1, 2, 1)
        raise KeyError("oh")

    def write(comm):
        pieces = broken() if comm.rank else pieces_of(0, 2, 1)
        with pytest.raises((KeyError, ValueError)) as error:
            checkpoint.write(tmp_path / "a", pieces, {"step": 1}, comm)
        return type(error.value).__name__, str(error.value)

    said = run_ranks(2, write, timeout=10)
    assert said[0] == ("CommunicationError", "ended because rank 1 failed: KeyError: 'oh'")
    assert said[1] == ("KeyError", "'oh'") and not list(tmp_path.iterdir())


def test_a_rank_without_pieces_writes_no_file(tmp_path):
    def write(comm):
        pieces = pieces_of(0, 1, 1) if comm.rank == 1 else []
        checkpoint.write(tmp_path / "a", pieces, {"step": 1}, comm)
        Checkpoint(tmp_path / "a").verify(comm)

    run_ranks(3, write)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "manifest.json",
        "rank-00001.safetensors",
    ]


@pytest.mark.parametrize("damaged", [0, 2])
@pytest.mark.parametrize("size", SIZES)
def test_damage_is_found_by_all_ranks(tmp_path, size, damaged):
    run_ranks(
        3,
        lambda comm: checkpoint.write(
            tmp_path / "a", pieces_of(comm.rank, 3, 1), {"step": 1}, comm
        ),
    )
    path = tmp_path / "a" / f"rank-{damaged:05d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    message = everyone_fails(
        size, lambda comm: Checkpoint(tmp_path / "a").verify(comm), CheckpointError
    )
    assert f"{path.name} is damaged" in message


# ranks that see different files


def on_machines(folder, size):
    """A checkpoint copied to two machines' disks, and a function that gives a rank its machine's copy."""
    run_ranks(
        3,
        lambda comm: checkpoint.write(folder / "0", pieces_of(comm.rank, 3, 1), {"step": 1}, comm),
    )
    shutil.copytree(folder / "0", folder / "1")
    return lambda comm: Checkpoint(folder / f"{int(comm.rank >= size // 2)}")


@pytest.mark.parametrize("machine", [0, 1])
@pytest.mark.parametrize("damaged", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_a_damaged_copy_is_found_by_its_own_ranks(tmp_path, size, damaged, machine):
    opened = on_machines(tmp_path, size)
    run_ranks(size, lambda comm: opened(comm).verify(comm))
    path = tmp_path / f"{machine}" / f"rank-{damaged:05d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    message = everyone_fails(size, lambda comm: opened(comm).verify(comm), DamagedCheckpoint)
    assert f"{path} is damaged" in message.replace(": rank-", "/rank-")
    assert int(message.split(":")[0].removeprefix("rank ")) // (size // 2) == machine


@pytest.mark.parametrize("copies", [1, 2])
def test_files_are_hashed_once_by_those_who_share_them(tmp_path, monkeypatch, copies):
    """Afterwards no rank has to read a header to find the pieces."""
    opened = on_machines(tmp_path, 4)
    hashed, headers = [], []
    verified_head, table = CheckpointFiles._verified_head, CheckpointFiles.table

    def noted(self, entry, file):
        hashed.append((self.folder.name, entry.name))
        return verified_head(self, entry, file)

    def listed(self, numbers):
        headers.append(numbers)
        return table(self, numbers)

    monkeypatch.setattr(CheckpointFiles, "_verified_head", noted)
    monkeypatch.setattr(CheckpointFiles, "table", listed)

    def verify(comm):
        found = Checkpoint(tmp_path / "0") if copies == 1 else opened(comm)
        found.verify(comm)
        for name, array in checkpoint_ranks.tensors().items():
            box = tuple((0, n) for n in array.shape)
            got = found.read(name, box, 0, array.size)
            np.testing.assert_array_equal(got, array.reshape(-1))

    run_ranks(4, verify)
    assert len(hashed) == len(set(hashed)) == 3 * copies
    assert headers == []


@pytest.mark.parametrize("other", [1, 2])
def test_ranks_that_see_another_checkpoint_are_named(tmp_path, other):
    for name, value in (("a", 1), ("b", 2)):
        about = {"step": 20, "value": value}
        checkpoint.write(tmp_path / name, pieces_of(0, 1, 1), about)

    def verify(comm):
        Checkpoint(tmp_path / ("b" if comm.rank >= other else "a")).verify(comm)

    def caught(comm):
        with pytest.raises(CheckpointError) as error:
            verify(comm)
        return type(error.value), str(error.value)

    for kind, message in run_ranks(3, caught, timeout=10):
        assert kind is CheckpointError  # no damage, so nobody falls back
        assert message.startswith(f"rank {other} sees another checkpoint of step 20 than rank 0")
        assert "a file system that all ranks share" in message


# any pieces, any request


@st.composite
def cut_tensors(draw):
    """A tensor cut into boxes along every dim, unevenly, and each box into flat ranges; requests."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    array = np.arange(np.prod(shape), dtype=draw(st.sampled_from(["f4", "f8"]))).reshape(shape)

    def cuts(n):
        return sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))})

    grid = [list(itertools.pairwise(c)) or [(0, 0)] for c in map(cuts, shape)]
    pieces = []
    for index in np.ndindex(*map(len, grid)):
        box = tuple(spans[i] for spans, i in zip(grid, index, strict=True))
        flat = array[tuple(slice(a, b) for a, b in box)].reshape(-1)
        bounds = cuts(flat.size)
        ranges = list(itertools.pairwise(bounds))
        if draw(st.booleans()):
            ranges.append((flat.size, flat.size))  # a rank whose share is empty
        pieces += [Piece("a", shape, box, a, b, flat[a:b]) for a, b in ranges]
    pieces = draw(st.permutations(pieces))
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        box = tuple(tuple(sorted(draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in shape)
        flat = array[tuple(slice(a, b) for a, b in box)].reshape(-1)
        start, stop = sorted(draw(st.tuples(*[st.integers(0, flat.size)] * 2)))
        requests.append((box, start, stop, flat[start:stop]))
    return array, pieces, requests


@settings(max_examples=150, deadline=None)
@given(case=cut_tensors())
def test_any_pieces_give_any_part(tmp_path_factory, case):
    array, pieces, requests = case
    folder = tmp_path_factory.getbasetemp() / "cut" / "a"  # each case replaces the one before
    if not pieces:
        pieces = [Piece("a", array.shape, tuple((0, n) for n in array.shape), 0, 0, array.ravel())]
    checkpoint.write(folder, pieces, {"step": 1})
    found = Checkpoint(folder)
    found.verify()
    assert found.shapes() == {"a": (array.shape, array.dtype)}
    np.testing.assert_array_equal(dict(found.tensors())["a"], array)
    for box, start, stop, want in requests:
        got = found.read("a", box, start, stop)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, want)


def listed(shape, box, start, stop):
    return Listed("a", shape, "float32", box, start, stop)


def wrong_with(pieces):
    """The result of `untiled` for pieces of one tensor."""
    table = piece_table.table_of(0, pieces, [0] * len(pieces))
    return piece_table.untiled("a", piece_table.by_tensor(table)["a"])


@settings(max_examples=100, deadline=None)
@given(case=cut_tensors(), data=st.data())
def test_pieces_that_do_not_tile_are_found(case, data):
    array, pieces, _ = case
    pieces = [listed(array.shape, p.box, p.start, p.stop) for p in pieces]
    held = [n for n, p in enumerate(pieces) if p.start < p.stop]
    if not held:
        return
    assert wrong_with(pieces) is None
    chosen = data.draw(st.sampled_from(held))
    rest = [p for n, p in enumerate(pieces) if n != chosen]
    assert wrong_with([*pieces, pieces[chosen]]) == "a is held twice in part"
    if rest:
        assert "a is not complete" in wrong_with(rest)
    # as many elements as there should be, and yet not all of them
    size = pieces[chosen].stop - pieces[chosen].start
    others = [p for p in rest if p.stop - p.start == size]
    if others:
        assert wrong_with([*rest, others[0]]) == "a is held twice in part"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_boxes_tile_or_not_as_counting_says(data):
    """Boxes are drawn at random, some of them moved from their place; elements are counted one by one."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    count = np.zeros(shape, int)
    pieces = []
    for _ in range(data.draw(st.integers(1, 4))):
        box = tuple(sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape)
        box = tuple(map(tuple, box))
        if volume(box):
            count[tuple(slice(a, b) for a, b in box)] += 1
        pieces.append(listed(shape, box, 0, volume(box)))
    # perhaps add each element that no box holds as a box of its own
    if data.draw(st.booleans()):
        for index in np.argwhere(count == 0):
            pieces.append(listed(shape, tuple((int(i), int(i) + 1) for i in index), 0, 1))
            count[tuple(index)] = 1
    wrong = wrong_with(pieces)
    assert (wrong is None) == bool((count == 1).all())
    if wrong and "not complete" in wrong:
        assert (count == 0).any()
    elif wrong:
        assert (count > 1).any()


def test_boxes_that_overlap_are_found():
    both = [listed((4, 4), ((0, 4), (0, 3)), 0, 12), listed((4, 4), ((3, 4), (0, 4)), 0, 4)]
    assert wrong_with(both) == "a is held twice in part"


def test_many_boxes_are_compared_at_once():
    """40,000 boxes, which are 800 million pairs of boxes."""
    n = 200
    shape = (2 * n, 3 * n)
    pieces = [
        listed(shape, ((2 * i, 2 * i + 2), (3 * j, 3 * j + 3)), 0, 6)
        for i in range(n)
        for j in range(n)
    ]
    assert wrong_with(pieces) is None
    pieces[777] = pieces[778]
    assert wrong_with(pieces) == "a is held twice in part"


def test_only_what_overlaps_is_read(tmp_path):
    """A rank reads its own part whole, though another rank's file is gone meanwhile."""
    run_ranks(
        3,
        lambda comm: checkpoint.write(
            tmp_path / "a", pieces_of(comm.rank, 3, 1), {"step": 1}, comm
        ),
    )
    found, table = Checkpoint(tmp_path / "a"), checkpoint_ranks.tensors()["weight/table"]
    found.verify()
    (tmp_path / "a" / "rank-00002.safetensors").unlink()
    np.testing.assert_array_equal(
        found.read("weight/table", ((3, 9), (1, 4)), 2, 17), table[3:9, 1:].reshape(-1)[2:17]
    )
    with pytest.raises(DamagedCheckpoint, match=r"rank-00002\.safetensors is missing"):
        found.read("weight/table", ((3, 11), (1, 4)), 0, 24)


def test_requests_for_what_is_not_there_are_refused(tmp_path):
    pieces = [p for p in pieces_of(0, 2, 1) if p.tensor != "weight/norm"]
    checkpoint.write(tmp_path / "a", pieces, {"step": 1})
    found = Checkpoint(tmp_path / "a")
    for name, box, start, stop, words in (
        ("weight/table", ((6, 8), (0, 4)), 0, 8, "weight/table is not complete: 28 elements"),
        ("weight/norm", ((0, 7),), 0, 7, "has no tensor weight/norm"),
        ("weight/up", ((0, 5), (0, 10)), 0, 1, "has no elements"),
        ("weight/up", ((0, 5),), 0, 1, "has no elements"),
        ("weight/up", ((0, 5), (0, 2)), 0, 11, "has no elements"),
        ("weight/up", ((0, 5), (0, 2)), 3, 2, "has no elements"),
    ):
        with pytest.raises(CheckpointError, match=words):
            found.read(name, box, start, stop)
