"""A checkpoint written by many ranks and read by others: a body for threads and for mpirun.

mpiexec -n 2 python tests/checkpoint_ranks.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np

from cupytron import checkpoint
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.comm import Communicator
from cupytron.errors import CheckpointError

SHAPES = {"weight/table": (13, 4), "weight/up": (5, 9), "weight/norm": (7,), "exp_avg/up": (5, 9)}


def tensors():
    rng = np.random.default_rng(5)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def share(count, rank, size):
    """Ceil shares: 13 rows over 4 ranks are 4, 4, 4, 1; over 8 ranks the last have none."""
    n = -(-count // size)
    return min(rank * n, count), min((rank + 1) * n, count)


def pieces_of(rank, tp, dp):
    """As rank (i_dp, i_tp) holds them: rows or columns over tp, flat ranges of these over dp."""
    i_dp, i_tp = divmod(rank, tp)
    for name, array in tensors().items():
        box = [(0, n) for n in array.shape]
        if name != "weight/norm":
            dim = 0 if name == "weight/table" else 1
            box[dim] = share(array.shape[dim], i_tp, tp)
        elif i_tp > 0:
            continue  # the same on each tensor-parallel rank: the first answers for it
        local = array[tuple(slice(a, b) for a, b in box)].reshape(-1)
        start, stop = share(local.size, i_dp, dp)
        if start < stop:
            yield Piece(name, array.shape, tuple(box), start, stop, local[start:stop])


def check_round_trip(comm: Communicator, folder: Path) -> None:
    for tp in (1, 2, 3, 4):
        if comm.size % tp:
            continue
        place = folder / f"tp{tp}"
        mine = list(pieces_of(comm.rank, tp, comm.size // tp))
        checkpoint.write(place, iter(mine), {"step": 3, "rank": comm.rank}, comm)
        found = Checkpoint(place)  # it is there for every rank when `write` returns
        found.verify(comm)
        assert found.about["rank"] == 0
        assert found.shapes() == {n: (s, np.float32) for n, s in sorted(SHAPES.items())}
        # as another mesh would ask for it
        for other in range(3):
            for piece in pieces_of(other, tp=3, dp=1):
                got = found.read(piece.tensor, piece.box, piece.start, piece.stop)
                np.testing.assert_array_equal(got, piece.values)
        comm.barrier()


def check_a_failing_rank_fails_all(comm: Communicator, folder: Path) -> None:
    last = comm.size - 1
    mine = [p._replace(values=p.values.copy()) for p in pieces_of(comm.rank, comm.size, 1)]
    if comm.rank == last:
        mine[0].values[0] = np.nan
    try:
        checkpoint.write(folder / "bad", mine, {"step": 3}, comm)
    except CheckpointError as error:
        said = comm.gather_objects(str(error))
    else:
        raise AssertionError("the NaN was saved")
    where = f"rank {last}: " if comm.size > 1 else ""
    assert set(said) == {said[0]} and said[0].startswith(f"{where}{mine[0].tensor} holds"), said
    assert not list(folder.glob("*bad*"))
    comm.barrier()


def main() -> None:
    from cupytron.comm.mpi import MPICommunicator

    with MPICommunicator() as comm:  # a rank that fails ends all
        check_round_trip(comm, Path(sys.argv[1]))
        check_a_failing_rank_fails_all(comm, Path(sys.argv[1]))
        if comm.rank == 0:
            print(f"written and read by {comm.size} ranks", flush=True)


if __name__ == "__main__":
    main()
