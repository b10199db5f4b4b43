"""Checkpoints of jobs with thousands of ranks: this process writes each rank's part in turn."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from cupytron import checkpoint, piece_table
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.manifest import MANIFEST

TP = 8  # ranks that share a tensor by columns; the others share these by flat ranges, as ZeRO does
COLUMNS, EACH = 3, 6  # of one rank's box, and elements of one rank's piece


def shape_of(ranks):
    return ranks // TP * EACH // COLUMNS, TP * COLUMNS


def pieces_of(rank, ranks, blocks):
    """A rank's pieces, one of a tensor for each block; values are the elements' places in the tensor."""
    shape = shape_of(ranks)
    dp, tp = divmod(rank, TP)
    box = ((0, shape[0]), (tp * COLUMNS, (tp + 1) * COLUMNS))
    flat = np.arange(dp * EACH, (dp + 1) * EACH)
    places = flat // COLUMNS * shape[1] + tp * COLUMNS + flat % COLUMNS
    for block in range(blocks):
        name = f"weight/blocks.{block}.mlp.up.weight"
        values = (places + block).astype(np.float32)
        yield Piece(name, shape, box, dp * EACH, (dp + 1) * EACH, values)


def write(folder, ranks, blocks):
    """As `checkpoint.write` on so many ranks."""
    temporary = folder.with_name(".tmp")
    temporary.mkdir()
    parts = [
        checkpoint._write_part(temporary, list(pieces_of(rank, ranks, blocks)), rank)
        for rank in range(ranks)
    ]
    assert len(pickle.dumps(parts)) < 400 * ranks  # that every rank gathers
    checkpoint._finish(temporary, folder, {"step": 1}, parts)


def check_values(found, ranks, blocks):
    rng = np.random.default_rng(3)
    shape = shape_of(ranks)
    want = np.arange(shape[0] * shape[1], dtype=np.float32)
    for block in (0, blocks // 2, blocks - 1):
        name = f"weight/blocks.{block}.mlp.up.weight"
        whole = found.read(name, tuple((0, n) for n in shape), 0, want.size)
        np.testing.assert_array_equal(whole, want + block)
        # and as some of the ranks read their own
        for rank in map(int, rng.integers(ranks, size=20)):
            piece = list(pieces_of(rank, ranks, blocks))[block]
            got = found.read(name, piece.box, piece.start, piece.stop)
            np.testing.assert_array_equal(got, piece.values)


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """Nothing is synced: here thousands of files need not reach the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def test_600_ranks(tmp_path):
    ranks, blocks = 600, 8
    folder = tmp_path / "step-00000001"
    write(folder, ranks, blocks)
    # whatever the number of blocks
    assert (folder / MANIFEST).stat().st_size < 300 * ranks
    found = Checkpoint(folder)
    found.verify()
    check_values(found, ranks, blocks)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_4096_ranks_of_96_blocks(tmp_path):
    ranks, blocks = 4096, 96
    folder: Path = tmp_path / "step-00000001"
    write(folder, ranks, blocks)
    assert (folder / MANIFEST).stat().st_size < 300 * ranks
    found = Checkpoint(folder)
    # as `verify` on so many ranks: each reads one file, and they exchange what the headers list
    tables = [found._files.verify([number]) for number in range(ranks)]
    assert max(len(pickle.dumps(table)) for table in tables) < 200 * blocks
    merged = piece_table.merged(tables)
    assert merged.rows.shape == (ranks * blocks, 9) and merged.rows.nbytes < 30e6
    found._take(tables)
    for name in found.shapes():
        found._check_tiled(name)
    check_values(found, ranks, blocks)
