"""Checkpoints: what is written is read back, and 200 kinds of damage are each found and named."""

import json
import random
import shutil

import numpy as np
import pytest

from cupytron import checkpoint
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.errors import CheckpointError, UnreadableCheckpoint
from cupytron.manifest import seal
from cupytron.metrics import MetricsWriter
from cupytron.run_folder import RunFolder


def make_pieces(rng, scale=1.0):
    """Two tensors; the first in a mesh's pieces: two column shards, one of them in two flat ranges."""
    a, b = rng.normal(size=(6, 8)) * scale, rng.normal(size=5).astype(np.float32)
    left, right = a[:, :3].reshape(-1), a[:, 3:].reshape(-1)
    pieces = [
        Piece("weight/a", (6, 8), ((0, 6), (0, 3)), 0, 18, left),
        Piece("weight/a", (6, 8), ((0, 6), (3, 8)), 0, 11, right[:11]),
        Piece("weight/a", (6, 8), ((0, 6), (3, 8)), 11, 30, right[11:]),
        Piece("weight/b", (5,), ((0, 5),), 0, 5, b),
    ]
    return {"weight/a": a, "weight/b": b}, pieces


def test_logical_tensors_come_back(tmp_path, rng):
    tensors, pieces = make_pieces(rng)
    checkpoint.write(tmp_path / "step-00000007", pieces, {"step": 7, "note": "\u00e9"})
    found = Checkpoint(tmp_path / "step-00000007")
    found.verify()
    assert found.step == 7 and found.about["note"] == "\u00e9"
    read = dict(found.tensors())
    assert list(read) == ["weight/a", "weight/b"]
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_the_digest_is_of_the_logical_tensors_not_of_their_pieces(tmp_path, rng):
    tensors, pieces = make_pieces(rng)
    whole = [
        Piece(name, a.shape, tuple((0, n) for n in a.shape), 0, a.size, a.reshape(-1))
        for name, a in tensors.items()
    ]
    checkpoint.write(tmp_path / "a", pieces, {"step": 1})
    checkpoint.write(tmp_path / "b", whole, {"step": 1})
    first, second = Checkpoint(tmp_path / "a").digest(), Checkpoint(tmp_path / "b").digest()
    assert first == second and set(first) == {"weight/a", "weight/b", "all"}
    tensors["weight/b"][0] = np.nextafter(tensors["weight/b"][0], np.float32(9))
    checkpoint.write(tmp_path / "c", whole, {"step": 1})
    third = Checkpoint(tmp_path / "c").digest()
    assert third["weight/a"] == first["weight/a"]
    assert third["weight/b"] != first["weight/b"] and third["all"] != first["all"]


def test_files_are_safetensors_and_nothing_is_a_pickle(tmp_path, rng):
    from safetensors.numpy import load_file

    _, pieces = make_pieces(rng)
    checkpoint.write(tmp_path / "a", pieces, {"step": 1})
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "manifest.json",
        "rank-00000.safetensors",
    ]
    stored = load_file(tmp_path / "a" / "rank-00000.safetensors")
    assert [len(a) for a in stored.values()] == [18, 11, 19, 5]


def test_values_that_are_not_finite_are_not_saved(tmp_path, rng):
    _, pieces = make_pieces(rng)
    checkpoint.write(tmp_path / "a", pieces, {"step": 1})
    before = Checkpoint(tmp_path / "a").digest()
    pieces[2].values[4] = np.nan
    with pytest.raises(CheckpointError, match="weight/a holds values that are not finite"):
        checkpoint.write(tmp_path / "a", pieces, {"step": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert Checkpoint(tmp_path / "a").digest() == before


def test_a_tensor_with_a_missing_part_is_found(tmp_path, rng):
    _, pieces = make_pieces(rng)
    checkpoint.write(tmp_path / "a", [pieces[0], *pieces[2:]], {"step": 1})
    with pytest.raises(CheckpointError, match="weight/a is not complete"):
        Checkpoint(tmp_path / "a").verify()


def test_writing_again_replaces(tmp_path, rng):
    for scale in (1.0, 2.0):
        tensors, pieces = make_pieces(rng, scale)
        checkpoint.write(tmp_path / "a", pieces, {"step": 1})
    np.testing.assert_array_equal(
        dict(Checkpoint(tmp_path / "a").tensors())["weight/a"], tensors["weight/a"]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_checkpoint_of_another_format_says_so(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    body = {"format": 99, "step": 1}
    (folder / "manifest.json").write_bytes(seal(body))
    with pytest.raises(UnreadableCheckpoint, match="format 99 is newer than 2"):
        Checkpoint(folder)


def damages():
    """200 ways to damage a checkpoint: bit flips, truncations, missing, empty and swapped files."""
    draw = random.Random(7)
    files = ("manifest.json", "rank-00000.safetensors")
    yield from (("missing", name, 0) for name in files)
    yield from (("empty", name, 0) for name in files)
    yield from (("swapped", name, 0) for name in files)
    yield from (("longer", name, 0) for name in files)
    for number in range(192):
        name = files[number % 2]
        yield ("cut" if number % 6 < 2 else "flip", name, draw.random())


@pytest.mark.parametrize("kind", ["missing", "empty", "swapped", "longer", "cut", "flip"])
def test_damage_is_found_and_named(tmp_path, rng, kind):
    _, pieces = make_pieces(rng)
    whole = tmp_path / "run" / "checkpoints" / "step-00000003"
    checkpoint.write(whole, pieces, {"step": 3, "val_loss": 1.5})
    folder, draw = RunFolder(tmp_path / "run"), random.Random(3)
    copy = tmp_path / "whole"
    shutil.copytree(whole, copy)
    tried = 0
    for _, name, at in (d for d in damages() if d[0] == kind):
        shutil.rmtree(whole)
        shutil.copytree(copy, whole)
        path = whole / name
        content = bytearray(path.read_bytes())
        if kind == "missing":
            path.unlink()
        elif kind == "swapped":
            path.write_bytes(
                (
                    copy / ("manifest.json" if "rank" in name else "rank-00000.safetensors")
                ).read_bytes()
            )
        else:
            if kind == "flip":
                content[int(at * len(content))] ^= 1 << draw.randrange(8)
            elif kind == "longer":
                content += b"\n"
            else:
                content = content[: 0 if kind == "empty" else int(at * len(content))]
            path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            folder.find("3", warn=lambda text: None)
        message = str(caught.value)
        assert "step-00000003" in message and "\n" not in message
        assert "missing" in message or "damaged" in message or "bytes in place of" in message, (
            message
        )
        warnings = []
        assert folder.newest(warnings.append) is None and len(warnings) == 1
        tried += 1
    assert tried == sum(d[0] == kind for d in damages()) > 0


def test_there_are_200_damages():
    assert len(list(damages())) == 200


def test_crafted_manifests_are_refused(tmp_path):
    """Whole by their own hash, and nonsense all the same."""
    piece = {
        "tensor": "weight/a",
        "shape": [4],
        "dtype": "float32",
        "box": [[0, 4]],
        "range": [0, 4],
        "key": "a",
        "file": "f",
    }
    nonsense = [
        {},
        {"step": "x"},
        {"step": 1, "pieces": 3},
        {"step": 1, "pieces": [{}]},
        {"step": 1, "pieces": [], "files": []},
        {"step": 1, "pieces": [], "files": {"f": {"bytes": "many"}}},
        *(
            {"step": 1, "pieces": [{**piece, **change}], "files": {}}
            for change in (
                {"box": [[0, 5]]},
                {"box": [[3, 2]]},
                {"box": [[0, 4], [0, 4]]},
                {"range": [0, 5]},
                {"range": [-1, 4]},
                {"dtype": "object"},
                {"file": "../../elsewhere"},
                {"shape": None},
            )
        ),
    ]
    for number, body in enumerate(nonsense):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "manifest.json").write_bytes(seal({"format": 1, **body}))
        with pytest.raises(CheckpointError, match=r"manifest\.json has a missing or wrong entry"):
            Checkpoint(folder)
    for text in ("[" * 100_000, "null", "[]", '{"body": 1, "sha256": 2}', "\x00"):
        (tmp_path / "0" / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            Checkpoint(tmp_path / "0")


def test_a_hostile_header_is_not_parsed(tmp_path, rng):
    """A safetensors header of many megabytes would take many times its size in memory."""
    _, pieces = make_pieces(rng)
    checkpoint.write(tmp_path / "a", pieces, {"step": 1})
    path = tmp_path / "a" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[:8] = (1 << 30).to_bytes(8, "little")
    path.write_bytes(content)
    found = Checkpoint(tmp_path / "a")
    found._verified = True  # as if its hash had been crafted too
    with pytest.raises(CheckpointError, match="header is too large"):
        list(found.tensors())


class TestRunFolder:
    def write(self, folder, step, rng, val_loss=None):
        folder.create()
        checkpoint.write(
            folder.place(step), make_pieces(rng)[1], {"step": step, "val_loss": val_loss}
        )

    def test_newest_best_and_by_step(self, tmp_path, rng):
        folder = RunFolder(tmp_path / "run")
        for step, loss in ((10, 2.0), (20, 1.5), (30, None)):
            self.write(folder, step, rng, loss)
        warn = []
        assert folder.find("last", warn.append).step == 30
        assert folder.find("best", warn.append).step == 20
        assert folder.find("10", warn.append).step == 10
        for which in ("40", "first", "-1", "\u0663"):
            with pytest.raises(CheckpointError, match="choose best, last or one of 10, 20, 30"):
                folder.find(which, warn.append)
        assert not warn

    def test_a_damaged_newest_falls_back_with_a_warning(self, tmp_path, rng):
        folder = RunFolder(tmp_path / "run")
        for step in (10, 20):
            self.write(folder, step, rng)
        (folder.place(20) / "rank-00000.safetensors").write_bytes(b"")
        warnings = []
        assert folder.find("last", warnings.append).step == 10
        assert (
            len(warnings) == 1 and "step-00000020" in warnings[0] and "falling back" in warnings[0]
        )

    def test_pruning_keeps_the_newest_and_the_best(self, tmp_path, rng):
        folder = RunFolder(tmp_path / "run")
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
            self.write(folder, step, rng, loss)
        folder.prune(keep=2)
        assert folder.steps() == [2, 4, 5]
        folder.prune(keep=1)
        assert folder.steps() == [2, 5]

    def test_later_damaged_steps_do_not_push_out_good_ones(self, tmp_path, rng):
        """A run that fell back to step 10 saves step 15: the damaged 20 must not count as newest."""
        folder = RunFolder(tmp_path / "run")
        for step in (10, 20):
            self.write(folder, step, rng)
        folder.set_aside_after(10)
        self.write(folder, 15, rng)
        folder.prune(keep=1)
        assert folder.steps() == [15]
        assert (folder.checkpoints / "damaged-step-00000020").is_dir()

    def test_a_renamed_checkpoint_is_not_believed(self, tmp_path, rng):
        folder = RunFolder(tmp_path / "run")
        self.write(folder, 10, rng)
        folder.place(10).rename(folder.place(99))
        with pytest.raises(CheckpointError, match="holds step 10"):
            folder.find("99", warn=print)

    def test_what_a_killed_save_left_is_cleared(self, tmp_path, rng):
        folder = RunFolder(tmp_path / "run")
        self.write(folder, 10, rng)
        (folder.checkpoints / ".tmp-step-00000020-123").mkdir()
        (folder.checkpoints / ".old-step-00000005-123").mkdir()
        assert folder.steps() == [10]
        folder.create()
        assert [p.name for p in folder.checkpoints.iterdir()] == ["step-00000010"]

    def test_metrics_after_the_resumed_step_are_dropped(self, tmp_path):
        folder = RunFolder(tmp_path)
        lines = [json.dumps({"step": s, "loss": 1.0}) for s in range(5)]
        folder.metrics.write_text("\n".join(lines) + '\n{"step": 5, "lo')
        assert [r["step"] for r in folder.read_metrics()] == [0, 1, 2, 3, 4]
        folder.keep_metrics(last_step=2)
        writer = MetricsWriter(folder.metrics)
        writer.write({"step": 3})
        writer.close()
        assert [r["step"] for r in folder.read_metrics()] == [0, 1, 2, 3]
