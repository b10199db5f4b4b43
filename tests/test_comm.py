"""Communicators: one contract for one process, threads and MPI; groups of the mesh; failing ranks."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import comm_contract
import numpy as np
import pytest

from cupytron.comm import CommunicationError, ParallelContext, SelfCommunicator, run_ranks
from cupytron.comm.mesh import place
from cupytron.errors import CupytronError


@pytest.mark.parametrize("check", comm_contract.CHECKS, ids=lambda check: check.__name__)
def test_contract_alone(check):
    check(SelfCommunicator())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("check", comm_contract.CHECKS, ids=lambda check: check.__name__)
def test_contract_in_threads(check, size):
    run_ranks(size, check)


def mpiexec():
    """The launcher of this environment first, then the path's."""
    own = Path(sys.executable).with_name("mpiexec")
    return str(own) if own.exists() else shutil.which("mpiexec")


@pytest.mark.skipif(mpiexec() is None, reason="no MPI launcher: pip install mpich")
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_contract_under_mpi(size):
    script = Path(__file__).with_name("comm_contract.py")
    done = subprocess.run(
        [mpiexec(), "-n", str(size), sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(comm_contract.CHECKS)} checks on {size} ranks" in done.stdout


def test_a_failing_rank_ends_the_others():
    def body(comm):
        if comm.rank == 1:
            raise ValueError("broken")
        comm.barrier()
        comm.recv(np.empty(1), 1)

    began = time.monotonic()
    with pytest.raises(ValueError, match="broken"):
        run_ranks(3, body, timeout=30)
    assert time.monotonic() - began < 10


def test_a_rank_that_does_not_come_is_named():
    def body(comm):
        if comm.rank != 2:
            comm.all_reduce(np.zeros(1))

    with pytest.raises(
        CommunicationError, match="all_reduce on world, waiting for rank 2, has waited"
    ):
        run_ranks(3, body, timeout=0.3)


def test_a_message_of_another_shape_is_named():
    def body(comm):
        if comm.rank == 0:
            comm.send(np.zeros(3), 1)
        else:
            comm.recv(np.empty(4), 0)

    with pytest.raises(
        CommunicationError, match=r"rank 0 sent \(3,\) float64, rank 1 expects \(4,\)"
    ):
        run_ranks(2, body, timeout=5)


# rank -> members of its tp, dp and pp group, written out by hand
EIGHT = {  # tp=2 pp=2 dp=2
    0: ([0, 1], [0, 2], [0, 4]),
    1: ([0, 1], [1, 3], [1, 5]),
    2: ([2, 3], [0, 2], [2, 6]),
    3: ([2, 3], [1, 3], [3, 7]),
    4: ([4, 5], [4, 6], [0, 4]),
    5: ([4, 5], [5, 7], [1, 5]),
    6: ([6, 7], [4, 6], [2, 6]),
    7: ([6, 7], [5, 7], [3, 7]),
}
SIXTEEN = {  # tp=4 pp=2 dp=2
    0: ([0, 1, 2, 3], [0, 4], [0, 8]),
    1: ([0, 1, 2, 3], [1, 5], [1, 9]),
    2: ([0, 1, 2, 3], [2, 6], [2, 10]),
    3: ([0, 1, 2, 3], [3, 7], [3, 11]),
    4: ([4, 5, 6, 7], [0, 4], [4, 12]),
    5: ([4, 5, 6, 7], [1, 5], [5, 13]),
    6: ([4, 5, 6, 7], [2, 6], [6, 14]),
    7: ([4, 5, 6, 7], [3, 7], [7, 15]),
    8: ([8, 9, 10, 11], [8, 12], [0, 8]),
    9: ([8, 9, 10, 11], [9, 13], [1, 9]),
    10: ([8, 9, 10, 11], [10, 14], [2, 10]),
    11: ([8, 9, 10, 11], [11, 15], [3, 11]),
    12: ([12, 13, 14, 15], [8, 12], [4, 12]),
    13: ([12, 13, 14, 15], [9, 13], [5, 13]),
    14: ([12, 13, 14, 15], [10, 14], [6, 14]),
    15: ([12, 13, 14, 15], [11, 15], [7, 15]),
}


@pytest.mark.parametrize(
    ("table", "sizes"),
    [(EIGHT, {"tp": 2, "pp": 2, "dp": 2}), (SIXTEEN, {"tp": 4, "pp": 2, "dp": 2})],
)
def test_groups_are_those_of_the_table(table, sizes):
    def body(comm):
        context = ParallelContext(sizes, world=comm)
        assert context.coordinates == place(comm.rank, context.sizes)
        return [
            axis.all_gather(np.array([comm.rank])).tolist()
            for axis in (context.tp, context.dp, context.pp)
        ]

    for rank, groups in enumerate(run_ranks(len(table), body)):
        assert tuple(groups) == table[rank], f"rank {rank}"


def test_one_process_needs_no_sizes():
    context = ParallelContext()
    assert context.sizes == {"pp": 1, "dp": 1, "tp": 1}
    assert {context.tp.size, context.pp.size, context.dp.size, context.world.size} == {1}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp": 3}, "tp=3 x pp=1 does not fit 4 ranks; choose from tp=1 pp=1 dp=4"),
        ({"tp": 2, "dp": 3}, "tp=2 x pp=1 x dp=3 does not fit 4 ranks"),
        ({"tp": 0}, "tp=0 must be at least 1"),
        ({"sp": 2}, "unknown axis sp"),
    ],
)
def test_sizes_that_do_not_fit_list_those_that_do(sizes, words):
    def body(comm):
        ParallelContext(sizes, world=comm)

    with pytest.raises(CupytronError, match=words):
        run_ranks(4, body)
