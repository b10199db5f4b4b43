"""The files of a checkpoint: other formats, the bytes that are written, and nonsense that is refused."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs

from cupytron import checkpoint, checkpoint_format, manifest
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from cupytron.manifest import MANIFEST, seal
from cupytron.run_folder import RunFolder

FILE = "rank-00000.safetensors"
FORMAT_1 = Path(__file__).parent / "format-1" / "step-00000004"  # as version 0.1.0 wrote it


def write(folder, **about):
    """Two tensors of one file: "a" (6, 2) in two flat ranges, and "b" (5,) in float64."""
    a, b = np.arange(12, dtype=np.float32), np.arange(5.0)
    box = ((0, 6), (0, 2))
    pieces = [
        Piece("a", (6, 2), box, 0, 7, a[:7]),
        Piece("a", (6, 2), box, 7, 12, a[7:]),
        Piece("b", (5,), ((0, 5),), 0, 5, b),
    ]
    checkpoint.write(folder, pieces, {"step": 1, **about})


def body_of(folder):
    return json.loads((folder / MANIFEST).read_bytes())["body"]


def craft(folder, head):
    """Give the checkpoint's file another beginning, and make all hashes fit."""
    path = folder / FILE
    old = path.read_bytes()
    values = old[8 + int.from_bytes(old[:8], "little") :]
    path.write_bytes(head + values)
    body = body_of(folder)
    body["files"][FILE] = {
        "bytes": len(head + values),
        "header": hashlib.sha256(head).hexdigest(),
        "sha256": hashlib.sha256(head + values).hexdigest(),
    }
    (folder / MANIFEST).write_bytes(seal(body))


def header(folder):
    content = (folder / FILE).read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def encoded(header):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# format 1


def test_format_1_is_read():
    found = Checkpoint(FORMAT_1)
    assert found.about["format"] == 1
    found.verify()
    shapes = found.shapes()
    assert len(shapes) == 48 and shapes["weight/embedding.weight"] == ((39, 4), np.float32)
    # the digest that version 0.1.0 itself prints
    assert found.digest()["all"] == (
        "6c91e7a5bad64cf79facffeab1322069a8b2736a83523493da42212580d1e625"
    )


@pytest.mark.parametrize("name", [FILE, MANIFEST])
def test_damage_in_format_1_is_found(tmp_path, name):
    size = (FORMAT_1 / name).stat().st_size
    for at in range(0, size, size // 15):
        shutil.copytree(FORMAT_1, tmp_path / "a", dirs_exist_ok=True)
        content = bytearray((FORMAT_1 / name).read_bytes())
        content[at] ^= 1
        (tmp_path / "a" / name).write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=f"{name} is damaged"):
            Checkpoint(tmp_path / "a").verify()


def test_a_run_goes_on_from_format_1(tmp_path):
    """The run ends with the same bits as one resumed from the same tensors in today's format."""
    data = runs.make_data(tmp_path)
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(FORMAT_1, RunFolder(old).place(4))
    found = Checkpoint(FORMAT_1)
    about = {k: v for k, v in found.about.items() if k not in ("format", "pieces", "files")}
    pieces = [
        Piece(name, a.shape, tuple((0, n) for n in a.shape), 0, a.size, a.reshape(-1))
        for name, a in found.tensors()
    ]
    checkpoint.write(RunFolder(new).place(4), pieces, about)
    sizes = ("model.d_model=4", "model.num_heads=1", "model.num_layers=1", "model.dropout=0.0")
    digests = []
    for out in (old, new):
        assert runs.run_here(data, out, *sizes, "train.max_steps=8").step == 8
        digests.append(Checkpoint(RunFolder(out).place(8)).digest())
    assert digests[0] == digests[1]
    metrics = RunFolder(old).read_metrics()
    assert [m["step"] for m in metrics if "loss" in m] == [5, 6, 7, 8]


@pytest.mark.parametrize("version", [3, 99])
def test_a_later_format_is_no_damage(tmp_path, version):
    write(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_bytes(seal({"format": version, "other": "things"}))
    with pytest.raises(UnreadableCheckpoint, match=f"format {version} is newer than 2.*use the"):
        Checkpoint(tmp_path / "a")


@pytest.mark.parametrize("version", [None, "2", 0, -1, True, 2.0])
def test_a_format_that_nobody_wrote_is_damage(tmp_path, version):
    write(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_bytes(seal({**body_of(tmp_path / "a"), "format": version}))
    with pytest.raises(DamagedCheckpoint, match="missing or wrong entry: 'format'"):
        Checkpoint(tmp_path / "a")


# what is written


def test_the_manifest_does_not_list_pieces_and_the_header_does(tmp_path):
    write(tmp_path / "a", note="x")
    body = body_of(tmp_path / "a")
    assert body["format"] == 2 and set(body) == {"format", "files", "step", "note"}
    assert set(body["files"][FILE]) == {"bytes", "header", "sha256"}
    pieces = json.loads(header(tmp_path / "a")["__metadata__"]["pieces"])
    assert pieces == [
        ["a", [6, 2], "float32", [[0, 6], [0, 2]], [0, 7]],
        ["a", [6, 2], "float32", [[0, 6], [0, 2]], [7, 12]],
        ["b", [5], "float64", [[0, 5]], [0, 5]],
    ]


def test_opening_reads_no_list(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a" / FILE).unlink()
    assert Checkpoint(tmp_path / "a").step == 1


def test_what_nobody_could_read_is_not_written(tmp_path, monkeypatch):
    write(tmp_path / "a")
    monkeypatch.setattr(checkpoint_format, "MAX_HEADER", 300)
    with pytest.raises(CheckpointError, match=r"3 pieces in a header of \d+ bytes.*at most 300"):
        write(tmp_path / "a")
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "MAX_BYTES", 2000)
    with pytest.raises(CheckpointError, match=r"manifest\.json would have .* bytes for 1 files"):
        write(tmp_path / "a", note="x" * 2000)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="was not saved, since nobody could read it"):
        write(tmp_path / "a", step="first")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    Checkpoint(tmp_path / "a").verify()


def test_a_manifest_that_is_too_large_is_no_damage(tmp_path, monkeypatch):
    """Earlier versions wrote such large manifests for large jobs."""
    write(tmp_path / "a", note="x" * 2000)
    monkeypatch.setattr(manifest, "MAX_BYTES", 2000)
    with pytest.raises(UnreadableCheckpoint, match="at most 2000"):
        Checkpoint(tmp_path / "a")


# crafted files, whole by their own hashes


def crafted_headers():
    """(what is wrong, change of the header, change of its list)."""

    def no_list(header, pieces):
        del header["__metadata__"]

    def dtype(header, pieces):
        header["000002/b"]["dtype"] = "F32"

    def listed_dtype(header, pieces):
        pieces[2][2] = "object"

    def swapped(header, pieces):
        header["000000/a"], header["000001/a"] = header["000001/a"], header["000000/a"]

    def swapped_pieces(header, pieces):
        pieces[0], pieces[1] = pieces[1], pieces[0]

    def more(header, pieces):
        header["000003/c"] = header["000002/b"]

    def fewer(header, pieces):
        pieces.pop()

    def longer(header, pieces):
        header["000002/b"]["shape"] = [1 << 62]

    def absurd(header, pieces):
        pieces[2][1] = [1 << 62]

    def many_dims(header, pieces):
        pieces[2][1], pieces[2][3] = [1] * 40, [[0, 1]] * 40

    def offsets(header, pieces):
        header["000002/b"]["data_offsets"] = [0, 40]

    def outside(header, pieces):
        pieces[2][3] = [[0, 6]]

    def negative(header, pieces):
        pieces[0][4] = [-1, 6]

    def not_a_number(header, pieces):
        pieces[2][4] = [0, 5.0]

    def true(header, pieces):
        pieces[2][4] = [False, 5]

    def name(header, pieces):
        pieces[2][0] = 7

    def nested(header, pieces):
        header["__metadata__"]["pieces"] = "[" * 100_000

    def no_text(header, pieces):
        header["__metadata__"]["pieces"] = 5

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize("change", crafted_headers(), ids=lambda change: change.__name__)
def test_crafted_headers_are_refused(tmp_path, change):
    write(tmp_path / "a")
    changed = header(tmp_path / "a")
    before = changed["__metadata__"]["pieces"]
    pieces = json.loads(before)
    change(changed, pieces)
    if "__metadata__" in changed and changed["__metadata__"]["pieces"] == before:
        text = json.dumps(pieces, separators=(",", ":"))
        changed["__metadata__"]["pieces"] = text
    craft(tmp_path / "a", encoded(changed))
    for use in (Checkpoint.verify, Checkpoint.shapes, Checkpoint.digest):
        with pytest.raises(DamagedCheckpoint, match=f"{FILE} is damaged: its"):
            use(Checkpoint(tmp_path / "a"))


def test_crafting_alone_is_not_what_is_refused(tmp_path):
    write(tmp_path / "a")
    craft(tmp_path / "a", encoded(header(tmp_path / "a")))
    Checkpoint(tmp_path / "a").verify()


def test_files_that_disagree_about_a_tensor_are_refused(tmp_path):
    for name, dtype in (("a", np.float32), ("b", np.float64)):
        piece = Piece("x", (4,), ((0, 4),), 0, 2, np.ones(2, dtype))
        checkpoint.write(tmp_path / name, [piece], {"step": 1})
    second = "rank-00001.safetensors"
    shutil.copy(tmp_path / "b" / FILE, tmp_path / "a" / second)
    body = body_of(tmp_path / "a")
    body["files"][second] = body_of(tmp_path / "b")["files"][FILE]
    (tmp_path / "a" / MANIFEST).write_bytes(seal(body))
    with pytest.raises(DamagedCheckpoint, match="pieces of x disagree about its shape or dtype"):
        Checkpoint(tmp_path / "a").verify()


@pytest.mark.parametrize(
    "name", ["../a", "/dev/zero", "rank-0.safetensors", "rank-00000.safetensors\n", "", "f"]
)
def test_only_our_own_names_are_opened(tmp_path, name):
    write(tmp_path / "a")
    body = body_of(tmp_path / "a")
    body["files"] = {name: body["files"][FILE]}
    (tmp_path / "a" / MANIFEST).write_bytes(seal(body))
    with pytest.raises(DamagedCheckpoint, match="has a missing or wrong entry: a file's name"):
        Checkpoint(tmp_path / "a")


@pytest.mark.parametrize("change", [-4, 4])
def test_a_file_that_ends_elsewhere_than_its_pieces_is_damaged(tmp_path, change):
    """Its size and its hashes are sealed as they are, so they prove nothing."""
    write(tmp_path / "a")
    path, body = tmp_path / "a" / FILE, body_of(tmp_path / "a")
    content = path.read_bytes()
    content = content + b"\0" * change if change > 0 else content[:change]
    path.write_bytes(content)
    body["files"][FILE].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (tmp_path / "a" / MANIFEST).write_bytes(seal(body))
    with pytest.raises(DamagedCheckpoint, match="its pieces end elsewhere than the file"):
        Checkpoint(tmp_path / "a").verify()


def test_a_dim_beside_one_of_zero_fits_64_bits():
    with pytest.raises(ValueError, match="a piece of x"):
        checkpoint_format.listed("x", [0, 10**30], "float32", [[0, 0], [0, 10**30]], [0, 0])


@pytest.mark.parametrize("name", [FILE, MANIFEST])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling link"])
def test_what_is_not_a_file_is_not_opened(tmp_path, name, kind):
    write(tmp_path / "a")
    path = tmp_path / "a" / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(DamagedCheckpoint, match=f"{name} is missing"):
        Checkpoint(tmp_path / "a").verify()
