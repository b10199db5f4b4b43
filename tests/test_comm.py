"""Communicators: one contract for one process, threads and MPI; groups of the mesh; failing ranks."""

import importlib.util
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import comm_contract
import numpy as np
import pytest
from launchers import NAMES, OPENMPI, launch

from cupytron import versions
from cupytron.comm import CommunicationError, ParallelContext, SelfCommunicator, run_ranks
from cupytron.comm.mesh import place
from cupytron.comm.world import check_same_program
from cupytron.errors import CupytronError


@pytest.mark.parametrize("check", comm_contract.CHECKS, ids=lambda check: check.__name__)
def test_contract_alone(check):
    check(SelfCommunicator())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("check", comm_contract.CHECKS, ids=lambda check: check.__name__)
def test_contract_in_threads(check, size):
    run_ranks(size, check)


def under(name, size, *arguments):
    """Run Python on several ranks."""
    command, env = launch(name, size, [sys.executable, *map(str, arguments)])
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)


SCRIPT = Path(comm_contract.__file__)


@pytest.mark.parametrize(
    ("name", "size"), [*(("mpich", n) for n in (1, 2, 3, 4, 8)), ("openmpi", 2), ("openmpi", 4)]
)
def test_contract_under_mpi(name, size):
    done = under(name, size, SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(comm_contract.CHECKS)} checks on {size} ranks" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_groups_can_be_closed(name):
    """MPICH has room for 2048 at a time."""
    done = under(name, 2, SCRIPT, 3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3000 groups on 2 ranks" in done.stdout


def test_a_send_is_delivered_though_its_sender_has_ended():
    code = (
        "import time, numpy as np\n"
        "from cupytron.comm import open_world\n"
        "world = open_world()\n"
        "if world.rank == 0:\n"
        "    world.send(np.ones(10**6), 1)\n"
        "else:\n"
        "    time.sleep(0.3)\n"
        "    print(world.recv(np.empty(10**6), 0).sum())"
    )
    done = under("mpich", 2, "-c", code)
    assert (done.returncode, done.stdout) == (0, "1000000.0\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_message_of_more_than_2_gib_that_came_whole_is_right(name):
    """Open MPI's Get_count cannot count more than 2^31 - 1 bytes. The test takes 2.1 GiB in each rank."""
    code = (
        "import numpy as np\n"
        "from cupytron.comm import open_world\n"
        "world, x = open_world(), np.zeros(2**31 // 8 + 1)\n"
        "if world.rank == 0:\n"
        "    x[-1] = 7\n"
        "    world.send(x, 1, async_op=True).wait()\n"
        "else:\n"
        "    print(world.recv(x, 0)[-1])"
    )
    done = under(name, 2, "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "7.0"), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_more_elements_than_mpi_can_count_are_an_error_in_one_line(name):
    code = (
        "import numpy as np\n"
        "from cupytron.comm import CommunicationError, mpi, open_world\n"
        "world = open_world()\n"
        "mpi.MOST_ELEMENTS = 2**31 - 1\n"
        "x = np.empty(2**31, np.int8)\n"  # no page of it is ever touched
        "calls = [lambda: world.send(x, 0, async_op=True), lambda: world.recv(x, 0),\n"
        "         lambda: world.all_reduce(x), lambda: world.all_gather(x, np.empty(2**32, np.int8)),\n"
        "         lambda: world.all_to_all(np.empty(2**32, np.int8)), lambda: world.broadcast(x)]\n"
        "for call in calls:\n"
        "    try:\n"
        "        call()\n"
        "    except CommunicationError as error:\n"
        "        assert '2,147,483,648 elements' in str(error) and 'MPI 4' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError('taken')\n"
        "world.barrier()\n"
    )
    done = under(name, 2, "-c", code)
    assert done.returncode == 0, done.stderr


OPEN = (
    "from cupytron.comm import open_world\n"
    "world = open_world()\n"
    "print(f'{world.size} {world.axis}\\n', end='')"
)


@pytest.mark.parametrize("name", NAMES)
def test_the_world_is_that_of_the_launcher(name):
    done = under(name, 2, "-c", OPEN)
    # launchers may mix the ranks' lines
    assert done.stdout.count("2 world") == 2, done.stdout + done.stderr


def test_one_process_under_a_launcher_needs_no_mpi():
    done = under("mpich", 1, "-c", f"{OPEN}\nimport sys; print('mpi4py' in sys.modules)")
    assert done.stdout == "1 world\nFalse\n"


OTHER = (
    "import os\n"
    "from cupytron import versions\n"
    "from cupytron.comm import open_world, world\n"
    "from cupytron.launcher import launched_rank\n"
    "known = versions.running()\n"
    "known['{name}'] += '-other' * (launched_rank() == 1)\n"
    "world.running = lambda: known\n"
    "with open_world():\n"
    "    print('began')"
)


@pytest.mark.parametrize("name", ["cupytron", "numpy"])
def test_ranks_with_other_versions_are_refused(name):
    done = under("mpich", 2, "-c", OTHER.replace("{name}", name))
    assert done.returncode != 0 and "began" not in done.stdout, done.stdout
    said = re.search(
        rf"rank 1 on .* has {name} .*-other, rank 0 has .* on .*; install", done.stderr
    )
    assert said, done.stderr


def test_a_rank_that_says_something_else_runs_another_version():
    def body(comm):
        if comm.rank == 1:
            return comm.gather_objects({"settings": 1})[0].host
        with pytest.raises(
            CupytronError, match="rank 1 runs another version of cupytron than rank 0"
        ):
            check_same_program(comm)
        return versions.host()

    assert len(set(run_ranks(2, body))) == 1


def test_another_source_file_is_another_version(tmp_path, monkeypatch):
    """Version numbers stay the same between two commits."""
    known = versions.sources_hash()
    assert known == versions.sources_hash()
    copy = tmp_path / "cupytron"
    shutil.copytree(Path(versions.__file__).parent, copy)
    find = importlib.util.find_spec

    def elsewhere(package):
        found = find(package)
        if package == "cupytron":
            found.submodule_search_locations = [str(copy)]
        return found

    monkeypatch.setattr(importlib.util, "find_spec", elsewhere)
    assert versions.sources_hash() == known
    (copy / "optim.py").write_text((copy / "optim.py").read_text() + "\n")
    assert versions.sources_hash() != known


LOADED = "a launcher started 2 processes, and MPI knows 1: mpi4py has loaded"


@pytest.mark.parametrize(
    ("name", "library", "words"),
    [
        ("mpich", "lib/libmpi.so.40", f"{LOADED} Open MPI"),
        ("openmpi", "", "a launcher started 2 processes by PMIx, which MPICH"),
        ("mpich", "lib/missing.so", "started 2 processes, and MPI cannot be loaded"),
    ],
)
def test_another_library_than_the_launcher_s_is_refused(name, library, words):
    """N worlds of one process would be N runs that write the same files."""
    launch("openmpi", 1, [])  # has the library that is loaded here
    command, env = launch(name, 2, [sys.executable, "-c", OPEN])
    env.pop("MPI4PY_LIBMPI", None)
    if library:
        env["MPI4PY_LIBMPI"] = str(OPENMPI / library)
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode != 0 and "world" not in done.stdout
    assert words in done.stderr and "suspicious" not in done.stderr


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
        CommunicationError,
        match=r"all_reduce of \(1,\) float64 on world, waiting for rank 2, has waited",
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


def test_ranks_that_call_different_operations_are_named():
    def body(comm):
        if comm.rank == 1:
            comm.all_gather(np.zeros(2))
        else:
            comm.all_reduce(np.zeros(2))

    with pytest.raises(CommunicationError, match=r"ranks of world disagree: rank \d calls all_"):
        run_ranks(3, body, timeout=20)


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
