"""Arrays on GPUs between ranks: through the host's memory, NCCL or a CUDA-aware MPI; how one is chosen.

The GPU is simulated, NCCL and MPI are stand-ins that move data between threads; CuPy's own binding of NCCL
runs on a library that only writes down what it is called with.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import comm_contract
import fake_mpi
import fake_nccl
import ml_dtypes
import mpi4py
import numpy as np
import pytest
from launchers import NAMES, launch
from simulated import simulated_gpu

from cupytron import backend
from cupytron.comm import CommunicationError, GPUCommunicator, choice, choose, cuda_aware, run_ranks
from cupytron.comm.cuda_aware import CUDAAware
from cupytron.comm.nccl import NCCL
from cupytron.comm.staged import PinnedPool, Staged
from cupytron.errors import CupytronError
from cupytron.launcher import local_rank

# what is said of host arrays, and holds for these through the host's communicator
HOST_ONLY = {"check_bad_arguments", "check_objects_and_barrier"}
CHECKS = [check for check in comm_contract.CHECKS if check.__name__ not in HOST_ONLY]
# NCCL's wait does not wait, and it knows no sizes of messages
WITH_NCCL = [
    check
    for check in CHECKS
    if check.__name__
    not in (
        "check_what_is_waited_for_can_be_read",
        "check_a_message_that_does_not_fit_is_named",
    )
]


class OnGPU(backend.Device):
    """Where the contract's arrays are."""

    gpu = True
    number = 0

    def __init__(self, cupy):
        self.xp = cupy

    def put(self, x):
        return self.xp.asarray(x)


@pytest.fixture
def gpu(monkeypatch):
    with simulated_gpu() as cupy:
        monkeypatch.setattr(comm_contract, "DEVICE", OnGPU(cupy))
        yield cupy


@pytest.fixture
def nccl(gpu, monkeypatch):
    with fake_nccl.installed(monkeypatch, gpu) as fake:
        yield fake


def ranks(gpu, size, transport, body):
    """Run body on ranks with a stream each, as training has one."""

    def rank(host):
        with gpu.cuda.Stream(non_blocking=True):
            return body(GPUCommunicator(host, transport(host)))

    return run_ranks(size, rank, timeout=30)


def wide(array):
    return backend.to_host(array).astype(np.float64).tolist()


# the contract


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_through_the_host_s_memory(gpu, check, size):
    ranks(gpu, size, Staged, check)


@pytest.mark.parametrize("connected", [False, True], ids=["lazy", "connected"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("check", WITH_NCCL, ids=lambda check: check.__name__)
def test_contract_through_nccl(gpu, nccl, check, size, connected):
    def body(comm):
        if connected:
            comm.connect(messages=True)
        check(comm)

    ranks(gpu, size, NCCL, body)


@pytest.mark.parametrize("transport", [Staged, NCCL])
@pytest.mark.parametrize("check", comm_contract.CHECKS, ids=lambda check: check.__name__)
def test_host_arrays_go_through_the_host(gpu, nccl, monkeypatch, transport, check):
    monkeypatch.setattr(comm_contract, "DEVICE", backend.CPU)
    ranks(gpu, 2, transport, check)
    assert not nccl.calls and not [kind for kind, *_ in gpu.sim.log if kind == "copy"]


@pytest.fixture
def mpi(gpu, monkeypatch):
    """run(size, body) on ranks of a stand-in for MPI, and the list of its calls."""
    # the real one would begin with MPI in the process of all tests
    monkeypatch.setattr(mpi4py, "MPI", fake_mpi.MPI, raising=False)
    monkeypatch.delitem(sys.modules, "cupytron.comm.mpi", raising=False)
    module = importlib.import_module("cupytron.comm.mpi")
    calls = []

    def ranks_of_mpi(size, body):
        def rank(threads):
            host = module.MPICommunicator(fake_mpi.Comm(threads, calls))
            with gpu.cuda.Stream(non_blocking=True):
                return body(GPUCommunicator(host, CUDAAware(host)))

        return run_ranks(size, rank, timeout=30)

    yield ranks_of_mpi, calls
    module._pending.clear()  # sends that nobody waited for
    del sys.modules["cupytron.comm.mpi"]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "check",
    [c for c in CHECKS if c.__name__ != "check_a_message_that_does_not_fit_is_named"],
    ids=lambda check: check.__name__,
)
def test_contract_through_cuda_aware_mpi(mpi, check, size):
    mpi[0](size, check)


PROCESSES = """
import comm_contract
from simulated import simulated_gpu
from test_comm_gpu import CHECKS, GPUCommunicator, OnGPU, Staged
from cupytron.comm import open_world
with simulated_gpu() as cupy, open_world() as host:
    comm_contract.DEVICE = OnGPU(cupy)
    comm = GPUCommunicator(host, Staged(host))
    with comm:
        for check in CHECKS:
            check(comm)
            comm.barrier()
    if comm.rank == 0:
        print(len(CHECKS), "checks through", type(host).__name__)
"""


@pytest.mark.parametrize("name", NAMES)
def test_contract_through_the_host_s_memory_of_processes(name):
    """Pinned memory in the hands of a real MPI."""
    env = {"PYTHONPATH": str(Path(__file__).parent)}
    command, env = launch(name, 2, [sys.executable, "-c", PROCESSES], env)
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.stdout == f"{len(CHECKS)} checks through MPICommunicator\n", done.stderr


# what all transports have in common


def transports(gpu, mpi, transport):
    """run(size, body) for one of the three ways."""
    if transport == "mpi":
        return mpi[0]
    kind = {"staged": Staged, "nccl": NCCL}[transport]
    return lambda size, body: ranks(gpu, size, kind, body)


WAYS = ["staged", "nccl", "mpi"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_sums_have_the_bits_of_the_host_s(gpu, nccl, mpi, way, dtype):
    """In float32, in the order of the ranks, rounded once."""

    def numbers(rank):
        return (np.random.default_rng(rank).normal(size=12) * 10.0 ** (2 * rank - 2)).astype(dtype)

    def everything(comm, put):
        def new():
            return put(numbers(comm.rank))

        return [
            backend.to_host(x).tobytes()
            for x in (
                comm.all_reduce(new()),
                comm.all_reduce(new(), async_op=True).wait(),
                comm.reduce_scatter(new()),
                comm.reduce_scatter(new(), async_op=True).wait(),
            )
        ]

    run = transports(gpu, mpi, way)
    want = run_ranks(3, lambda comm: everything(comm, np.copy))
    assert run(3, lambda comm: everything(comm, gpu.asarray)) == want


@pytest.mark.parametrize("way", WAYS)
def test_an_array_may_be_used_again_after_a_blocking_send(gpu, nccl, mpi, way):
    def body(comm):
        comm.connect(messages=True)
        x, out = gpu.ones(4), gpu.zeros(4)
        comm.send(x, 1 - comm.rank)
        x.fill(5)
        comm.barrier()
        return wide(comm.recv(out, 1 - comm.rank))

    assert transports(gpu, mpi, way)(2, body) == [[1.0] * 4] * 2


@pytest.mark.parametrize("way", WAYS)
def test_arrays_without_elements(gpu, nccl, mpi, way):
    """A shard of a small vocabulary may have none."""

    def body(comm):
        comm.connect(messages=True)
        empty = gpu.zeros((0, 3), np.float32)
        assert comm.all_gather(empty).shape == (0, 3)
        assert comm.reduce_scatter(empty).shape == comm.all_to_all(empty).shape == (0, 3)
        comm.all_reduce(empty)
        comm.broadcast(empty)
        other = 1 - comm.rank
        comm.exchange([(empty, other)], [(gpu.zeros((0, 3), np.float32), other)])
        return wide(comm.all_reduce(gpu.ones(2)))

    assert transports(gpu, mpi, way)(2, body) == [[2.0, 2.0]] * 2


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_sends_nothing_anywhere(gpu, nccl, mpi, way):
    def body(comm):
        alone = comm.split(comm.rank, 0, "alone")
        alone.connect(messages=True)
        gpu.sim.clear()
        x = gpu.arange(3.0)
        assert alone.all_reduce(x) is x
        assert wide(alone.all_gather(x)) == wide(alone.reduce_scatter(x)) == [0.0, 1.0, 2.0]
        alone.close()

    transports(gpu, mpi, way)(1, body)
    assert not nccl.calls and not mpi[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_with_an_array_elsewhere_is_named(gpu, nccl, mpi, way):
    def body(comm):
        with comm.checking():
            comm.all_reduce(np.ones(3) if comm.rank else gpu.ones(3))

    words = (
        r"rank 0 calls all_reduce of \(3,\) float64 on a GPU, rank 1 all_reduce of \(3,\) float64$"
    )
    with pytest.raises(CommunicationError, match=words):
        transports(gpu, mpi, way)(2, body)


@pytest.mark.parametrize("way", ["staged", "mpi"])
def test_the_host_s_ways_cannot_be_captured(gpu, mpi, way):
    def body(comm):
        x = gpu.ones(4)
        stream = gpu.cuda.get_current_stream()
        stream.begin_capture()
        for call in (
            lambda: comm.all_reduce(x),
            lambda: comm.all_gather(x),
            lambda: comm.reduce_scatter(x),
            lambda: comm.all_to_all(x),
            lambda: comm.broadcast(x),
            lambda: comm.send(x, 0),
            lambda: comm.recv(x, 0),
        ):
            with pytest.raises(CommunicationError, match="while a CUDA graph is captured"):
                call()
        stream.end_capture()
        comm.barrier()

    transports(gpu, mpi, way)(2, body)


# through the host's memory


class Event:
    def __init__(self, done):
        self.done = done


def test_pinned_memory_is_used_again_once_nothing_reads_it(gpu):
    pool, x = PinnedPool(), np.zeros((3, 100), np.float32)
    first = pool.take(x)
    assert first.memory.nbytes == 2048 and first.array.shape == (3, 100)
    assert first.array.dtype == np.float32
    copying = Event(done=False)
    pool.give(first, copying)
    second = pool.take(x)
    assert second is not first
    copying.done = True
    assert pool.take(np.zeros(200)) is first  # of 2048 bytes, too
    assert first.array.dtype == np.float64 and first.array.shape == (200,)
    pool.give(second)
    assert pool.take(np.zeros(300)) is not second
    assert pool.take(np.zeros(1)).memory.nbytes == 512
    assert pool.take(x) is second


def test_pinned_memory_does_not_grow_from_step_to_step(gpu, monkeypatch):
    made = []
    allocate = gpu.cuda.alloc_pinned_memory
    monkeypatch.setattr(
        gpu.cuda, "alloc_pinned_memory", lambda size: made.append(size) or allocate(size)
    )

    def body(comm):
        other = 1 - comm.rank
        for step in range(5):
            x = gpu.ones((4, 3))
            handles = [comm.all_reduce(gpu.ones(10), async_op=True) for _ in range(3)]
            comm.all_gather(x), comm.reduce_scatter(x), comm.all_to_all(x), comm.broadcast(x)
            comm.send(x, other)
            comm.recv(x, other)
            comm.exchange([(x, other)], [(gpu.ones((4, 3)), other)])
            for handle in handles:
                handle.wait()
            comm.barrier()
            if comm.rank == 0 and step == 0:
                made.append("first step")
            comm.barrier()

    ranks(gpu, 2, Staged, body)
    assert len(made) > 6 and made[-1] == "first step"


def test_what_came_is_copied_on_the_stream_that_waits(gpu):
    def body(comm):
        x = gpu.ones(4)
        handle = comm.all_reduce(x, async_op=True)
        with gpu.cuda.Stream(non_blocking=True) as other:
            mine = len(gpu.sim.log)
            comm.barrier()
            handle.wait()
            seen = [entry for entry in gpu.sim.log[mine:] if entry[2] == other.ptr]
            assert [kind for kind, *_ in seen] == ["copy", "record"], seen
            return wide(x)

    assert ranks(gpu, 2, Staged, body) == [[2.0] * 4] * 2


# NCCL


def own(calls):
    return [call for call in calls if call.thread == threading.get_ident()]


def test_nccl_s_stream_waits_for_the_computation_and_is_waited_for(gpu, nccl):
    def body(comm):
        comm.connect()
        compute = gpu.cuda.get_current_stream()
        comm.barrier()
        begin = len(gpu.sim.log)
        x = gpu.zeros(6, np.float32)
        x += comm.rank
        handle = comm.all_reduce(x, async_op=True)
        y = gpu.zeros(3)  # beside it
        handle.wait()
        y += x[:3]
        call = own(nccl.calls)[-1]
        log = [
            (kind, name, "own" if stream == compute.ptr else "nccl")
            for kind, name, stream in gpu.sim.log[begin:]
            if stream in (compute.ptr, call.stream)
        ]
        comm.barrier()
        assert call.stream != compute.ptr
        before, after = [name for kind, name, _ in log if kind == "record"]
        order = [entry for entry in log if entry[0] != "array" and "zeros" not in entry[1]]
        start = log.index(("record", before, "own"))
        assert [entry[0] for entry in log[:start]].count("array") >= 1  # x is made
        assert [e for e in order if e[0] in ("record", "wait", "nccl", "sync")] == [
            ("record", before, "own"),
            ("wait", before, "nccl"),
            ("nccl", "nccl allReduce", "nccl"),
            ("record", after, "nccl"),
            ("wait", after, "own"),
        ]
        return wide(y)

    assert ranks(gpu, 3, NCCL, body) == [[3.0] * 3] * 3


@pytest.mark.parametrize("async_op", [False, True])
def test_nccl_never_waits_on_the_host(gpu, nccl, async_op):
    def body(comm):
        comm.connect(messages=True)
        streams = {gpu.cuda.get_current_stream().ptr}
        other = 1 - comm.rank
        comm.barrier()
        begin = len(gpu.sim.log)
        handles = []
        for dtype in (np.float32, ml_dtypes.bfloat16, np.int64):
            for operation in (
                comm.all_reduce,
                comm.all_gather,
                comm.reduce_scatter,
                comm.all_to_all,
            ):
                handles.append(operation(gpu.ones((4, 3), dtype), async_op=async_op))
            handles.append(comm.send(gpu.ones((4, 3), dtype), other, async_op=async_op))
            handles.append(comm.recv(gpu.ones((4, 3), dtype), other, async_op=async_op))
            comm.broadcast(gpu.ones((4, 3), dtype))
        if async_op:
            for handle in handles:
                handle.wait()
        streams |= {call.stream for call in own(nccl.calls)}
        waits = [e for e in gpu.sim.log[begin:] if e[0] == "sync" and e[2] in streams]
        comm.barrier()
        return waits

    assert ranks(gpu, 2, NCCL, body) == [[], []]


@pytest.mark.parametrize(
    ("dtype", "code"),
    [(np.float32, 7), (np.float64, 8), (np.int32, 2), (np.int64, 4), (np.uint8, 1)],
)
def test_nccl_adds_these_types(gpu, nccl, dtype, code):
    def body(comm):
        x = gpu.ones((4, 3), dtype)
        comm.all_reduce(x)
        part = comm.reduce_scatter(x)
        return wide(x[0]), wide(part), [c[:5] for c in own(nccl.calls)]

    for rank, (x, part, calls) in enumerate(ranks(gpu, 2, NCCL, body)):
        assert x == [2.0] * 3 and part == [[4.0] * 3] * 2
        assert calls == [("allReduce", 2, rank, code, 12), ("reduceScatter", 2, rank, code, 6)]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.uint16, np.int16])
def test_nccl_only_moves_these_types(gpu, nccl, dtype):
    """As bytes: the project's sums of 16-bit floats have an order, and NCCL knows no 16-bit integers."""

    def body(comm):
        x = gpu.ones((4, 3), dtype)
        comm.all_reduce(x)
        comm.all_reduce(x, async_op=True).wait()
        return wide(x[0]), wide(comm.reduce_scatter(x)), own(nccl.calls)

    for x, part, calls in ranks(gpu, 2, NCCL, body):
        assert x == [4.0] * 3 and part == [[8.0] * 3] * 2
        assert {call.name for call in calls} <= {"allGather", "send", "recv"}
        assert {call.kind for call in calls} == {1}


def test_nccl_s_other_operations_move_bytes(gpu, nccl):
    def body(comm):
        x = gpu.full((6, 2), comm.rank, np.float64)
        comm.all_gather(x)
        out = gpu.zeros((18, 2))
        mine = out[6 * comm.rank : 6 * comm.rank + 6]
        comm.all_gather(mine, out)
        comm.broadcast(x, root=2)
        assert (wide(x[0]), wide(out[-1])) == ([2.0, 2.0], [0.0, 0.0])
        comm.all_to_all(x)
        return own(nccl.calls)

    for calls in ranks(gpu, 3, NCCL, body):
        gathers, broadcast, moves = calls[:2], calls[2], calls[3:]
        assert [call[0] for call in gathers] == ["allGather"] * 2
        assert {(call.kind, call.count, call.group) for call in gathers} == {(1, 3 * 96, None)}
        assert (broadcast.name, broadcast.kind, broadcast.count, broadcast.peer) == (
            "broadcast",
            1,
            96,
            2,
        )
        assert [(call.name, call.peer) for call in moves] == [
            (name, rank) for rank in range(3) for name in ("send", "recv")
        ]
        assert {(call.kind, call.count) for call in moves} == {(1, 32)}
        assert len({call.group for call in moves}) == 1 and moves[0].group is not None


def test_each_direction_between_neighbours_has_a_communicator_of_its_own(gpu, nccl):
    """On one communicator a receive that waits would hold back the send that it waits for."""

    def body(comm):
        comm.connect(messages=True)
        comm.connect(messages=True)  # a second time is free
        comm.barrier()
        first = len(nccl.calls)
        comm.barrier()
        out = [gpu.zeros(2) for _ in range(4)]
        right, left = (comm.rank + 1) % 3, (comm.rank - 1) % 3
        handles = [
            comm.recv(out[0], left, async_op=True),
            comm.recv(out[1], right, async_op=True),
            comm.recv(out[2], left, async_op=True),
        ]
        sent = [gpu.full(2, 10.0 * comm.rank + i) for i in range(3)]
        handles += [
            comm.send(sent[0], right, async_op=True),
            comm.send(sent[1], left, async_op=True),
            comm.send(sent[2], right, async_op=True),
        ]
        for handle in handles:
            handle.wait()
        came = [wide(x)[0] for x in out[:3]]
        assert came == [10 * left, 10 * right + 1, 10 * left + 2]
        return [call for call in own(nccl.calls[first:])]

    for calls in ranks(gpu, 3, NCCL, body):
        assert len(calls) == 6 and {call.size for call in calls} == {2}
        assert {(call.name, call.rank, call.peer) for call in calls} == {
            ("send", 0, 1),
            ("recv", 1, 0),
        }
        # left and right, each there and back
        assert len({call.stream for call in calls}) == 4


def test_messages_of_ranks_that_are_not_connected_go_through_the_host(gpu, nccl):
    def body(comm):
        comm.connect(messages=True)
        before = len(own(nccl.calls))
        opposite = comm.rank ^ 2
        out = gpu.zeros(3)
        comm.exchange([(gpu.full(3, float(comm.rank)), opposite)], [(out, opposite)])
        assert wide(out) == [opposite] * 3
        return len(own(nccl.calls)) - before

    assert ranks(gpu, 4, NCCL, body) == [0] * 4


def test_groups_without_device_arrays_have_no_nccl(gpu, nccl):
    def body(comm):
        group = comm.split(0, comm.rank, "group")
        group.all_reduce(np.ones(3))
        assert not nccl.worlds
        comm.barrier()
        group.all_reduce(gpu.ones(3))
        group.all_reduce(gpu.ones(3))
        group.close()
        group.close()

    ranks(gpu, 2, NCCL, body)
    assert len(nccl.worlds) == 1 and nccl.destroyed == 2


def test_close_gives_every_communicator_back(gpu, nccl):
    def body(comm):
        comm.connect(messages=True)
        comm.close()
        comm.all_reduce(gpu.ones(1))  # the world stays open
        comm.close()

    ranks(gpu, 3, NCCL, body)
    # the group's twice; each rank sends to two and receives from two
    assert nccl.destroyed == 3 * (2 + 4)


def test_arrays_that_nobody_waits_for_are_held_until_nccl_is_done(gpu, nccl):
    def body(comm):
        comm.connect(messages=True)
        link = comm.transport._links[comm.rank, 1 - comm.rank]
        for i in range(20):
            # the memory of the copy that is sent would be used again at once
            comm.send(gpu.full(100, float(i)), 1 - comm.rank)
            gpu.zeros(100)
            assert 1 <= len(link._under_way) < 4  # and it is not held longer
        for i in range(20):
            out = gpu.zeros(100)
            comm.recv(out, 1 - comm.rank)
            assert wide(out) == [i] * 100
        assert not comm.transport._links[1 - comm.rank, comm.rank]._under_way

    ranks(gpu, 2, NCCL, body)


def test_an_nccl_that_cannot_connect_is_one_error(gpu, nccl):
    nccl.fail = True
    with pytest.raises(CommunicationError, match=r"world: NCCL cannot connect 2 ranks \(NCCL_ERR"):
        ranks(gpu, 2, NCCL, lambda comm: comm.all_reduce(gpu.ones(1)))


# CUDA graphs


def test_nccl_is_captured_and_replayed(gpu, nccl):
    """Collectives beside the computation, 16-bit sums and messages, in one graph, with new numbers."""

    def body(comm):
        comm.connect(messages=True)
        stream, size, other = gpu.cuda.get_current_stream(), comm.size, 1 - comm.rank
        source, kept = gpu.full(4, comm.rank + 1.0, np.float32), []
        total, halves, came = gpu.zeros(4, np.float32), gpu.zeros(2, np.float32), gpu.zeros(4)

        def step():
            x, half = source * 1, source.astype(ml_dtypes.bfloat16)
            first = comm.all_reduce(x, async_op=True)
            second = comm.reduce_scatter(half, async_op=True)
            y = source.astype(np.float64) * 10  # beside them
            sends = comm.send(y, other, async_op=True)
            here = comm.recv(came, other, async_op=True)
            part = second.wait()
            halves[...] = part
            total[...] = first.wait()
            here.wait()
            sends.wait()
            third = comm.all_reduce(half)
            kept.extend((x, half, y, part, third))
            return kept

        step()
        comm.send(source, other)  # still under way when the capture begins
        with pytest.raises(CommunicationError, match="a send has to be waited for"):
            stream.begin_capture()
            try:
                comm.send(source, other)
            finally:
                stream.end_capture()
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        comm.recv(gpu.zeros(4, np.float32), other)
        for factor in (2.0, 3.0):
            source.set(np.full(4, factor * (comm.rank + 1), np.float32))
            begin = len(gpu.sim.log)
            graph.launch(stream)
            launched = gpu.sim.log[begin:]
            assert not [e for e in launched if e[0] == "sync" and e[2] == stream.ptr]
            assert wide(total) == [factor * sum(range(1, size + 1))] * 4
            assert wide(halves) == [factor * sum(range(1, size + 1))] * 2
            assert wide(came) == [10 * factor * (other + 1)] * 4

    ranks(gpu, 2, NCCL, body)


def test_nccl_is_not_started_within_a_capture(gpu, nccl):
    def body(comm):
        stream, x = gpu.cuda.get_current_stream(), gpu.ones(3)
        stream.begin_capture()
        with pytest.raises(CommunicationError, match=r"cannot be started: .* or call connect\(\)"):
            comm.all_reduce(x)
        stream.end_capture()
        comm.connect()
        stream.begin_capture()
        comm.all_reduce(x)
        stream.end_capture().launch(stream)
        return wide(x)

    assert ranks(gpu, 2, NCCL, body) == [[2.0] * 3] * 2


# CuPy's own binding


BINDING = """
import sys
from simulated import simulated_gpu
with simulated_gpu() as cupy:
    from cupy_backends.cuda.libs import nccl
    sys.modules["cupy.cuda.nccl"] = cupy.cuda.nccl = nccl
    from cupytron.comm import GPUCommunicator, run_ranks
    from cupytron.comm.choice import nccl_version
    from cupytron.comm.nccl import NCCL
    assert nccl_version() == "2.28.9"

    def body(host):
        comm, names = GPUCommunicator(host, NCCL(host)), {}
        comm.connect(messages=True)
        compute = cupy.cuda.Stream(non_blocking=True)
        with compute:
            x, out = cupy.zeros((4, 3), "float32"), cupy.zeros((8, 3), "float32")
            names[x.data.ptr], names[out.data.ptr] = "x", "out"
            names[x.data.ptr + 24] = "half"
            comm.barrier()
            if comm.rank == 0:
                print("-- ranks are here", flush=True)
                comm.all_reduce(x)
                comm.all_gather(x, out)
                comm.broadcast(x, root=1)
                comm.send(x, 1, async_op=True).wait()
                comm.recv(x, 1)
                part = comm.reduce_scatter(x)
                names[part.data.ptr] = "part"
                moved = comm.all_to_all(x)
                names[moved.data.ptr], names[moved.data.ptr + 24] = "moved", "moved half"
        comm.close()
        return names

    names = run_ranks(2, body)[0]
    import ctypes
    stub = ctypes.CDLL("libnccl.so.2")
    stub.stub_log.restype = ctypes.c_char_p
    for line in stub.stub_log().decode().splitlines():
        name, source, target, *numbers, comm, stream = line.split()
        named = [names.get(int(ptr), "?") for ptr in (source, target)]
        print(name, *named, *numbers, "pair" if int(comm) >= 2000 else "none", int(stream) > 0)
"""


@pytest.mark.skipif(importlib.util.find_spec("cupy_backends") is None, reason="needs CuPy")
def test_calls_are_those_of_cupy_s_binding(tmp_path):
    """The C library is asked for what is meant: arguments in their places, pointers of the right arrays."""
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    stub = Path(__file__).with_name("stub_nccl.cpp")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", tmp_path / "libnccl.so.2", stub], check=True
    )
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": str(stub.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", BINDING], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    lines = [line for line in lines[1:] if not line.startswith(("destroy", "--"))]
    # the two ranks' greetings, in any order: bytes to rank 1 of a pair, from rank 0
    greetings, calls = lines[:4], lines[4:]
    assert sorted(line.split()[0] for line in greetings) == ["recv", "recv", "send", "send"]
    assert {line.split(maxsplit=3)[3] for line in greetings if line[0] == "s"} == {
        "1 1 1 pair True"
    }
    assert {line.split(maxsplit=3)[3] for line in greetings if line[0] == "r"} == {
        "1 1 0 pair True"
    }
    # name, source, target; count, type, operation or root or peer (-1: none)
    assert calls == [
        "allReduce x x 12 7 0 pair True",
        "allGather x out 48 1 -1 pair True",
        "broadcast x x 48 1 1 pair True",
        "send x ? 48 1 1 pair True",
        "recv ? x 48 1 0 pair True",
        "reduceScatter x part 6 7 0 pair True",
        "groupStart ? ? 0 0 0 none False",
        "send x ? 24 1 0 pair True",
        "recv ? moved 24 1 0 pair True",
        "send half ? 24 1 1 pair True",
        "recv ? moved half 24 1 1 pair True",
        "groupEnd ? ? 0 0 0 none False",
    ]


# CUDA-aware MPI


def test_mpi_gets_bits_and_is_never_asked_to_add(mpi, gpu):
    run, calls = mpi

    def body(comm):
        other = 1 - comm.rank
        for dtype in (np.float32, ml_dtypes.bfloat16):
            x = gpu.ones((4, 3), dtype)
            comm.all_reduce(x)
            comm.reduce_scatter(x)
            comm.all_gather(x)
            comm.broadcast(x)
            comm.exchange([(x, other)], [(gpu.zeros((4, 3), dtype), other)])
        return [(call.name, {*call.dtypes}, call.peer) for call in calls if call.rank == comm.rank]

    for rank, seen in enumerate(run(2, body)):
        want = [
            (name, {kind}, peer)
            for kind in ("float32", "uint16")
            for name, peer in (
                ("Ialltoall", None),
                ("Iallgather", None),
                ("Ialltoall", None),
                ("Iallgather", None),
                ("Bcast", 0),
                ("Irecv", 1 - rank),
                ("Isend", 1 - rank),
            )
        ]
        assert seen == want


def test_mpi_is_called_once_the_stream_is_done(mpi, gpu):
    """The stand-in refuses arrays that are still worked on; here it is shown to."""

    def body(comm):
        x = gpu.ones(4)
        with pytest.raises(AssertionError, match="the host has not waited"):
            comm.host._all_gather(x, gpu.empty(8), False)
        stream = gpu.cuda.get_current_stream()
        for call in (
            lambda: comm.all_reduce(gpu.ones(4), async_op=True).wait(),
            lambda: comm.all_to_all(gpu.ones(4)),
            lambda: comm.broadcast(gpu.ones(4)),
            lambda: comm.send(gpu.ones(4), comm.rank),
            lambda: comm.recv(gpu.ones(4), comm.rank),
        ):
            begin = len(gpu.sim.log)
            call()
            kinds = [kind for kind, _, ptr in gpu.sim.log[begin:] if ptr == stream.ptr]
            assert "sync" in kinds and kinds.index("sync") > 0

    mpi[0](2, body)


ASK = (
    "from cupytron.comm import cuda_aware, open_world\n"
    "world = open_world()\n"
    "said = cuda_aware._libraries(), cuda_aware.says_so(), cuda_aware.trial(0, 'numpy')\n"
    "if world.rank == 0:\n"
    "    print(len(said[0]), *said[1:])"
)


@pytest.mark.parametrize("name", NAMES)
def test_libraries_without_cuda_say_so_and_a_child_can_try(name):
    """The child of a rank is a world of its own, whatever launched the rank."""
    command, env = launch(name, 2, [sys.executable, "-c", ASK])
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.stdout == "1 False None\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("import time; time.sleep(60)", "no answer in 2 seconds"),
        ("raise RuntimeError('no device')", "exit code 1: RuntimeError: no device"),
        ("raise SystemExit(3)", "exit code 3: it said nothing"),
    ],
)
def test_a_trial_that_fails_says_how(tmp_path, monkeypatch, code, words):
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cuda_aware.trial(0, "broken", seconds=2) == words


def test_a_child_does_not_know_of_the_launcher():
    kept = {"PATH": "/bin", "OMPI_MCA_opal_cuda_support": "true", "I_MPI_OFFLOAD": "1"}
    ours = {"PMI_RANK": "0", "PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "SLURM_PROCID": "1"}
    more = {"MPI_LOCALRANKID": "0", "HYDI_CONTROL_FD": "3", "PALS_RANKID": "0"}
    assert cuda_aware.without_launcher({**kept, **ours, **more}) == kept


class Library:
    """An MPI library that knows one of the two questions."""

    def __init__(self, name, answer):
        self.answer = answer
        setattr(self, name, getattr(self, f"_{name}"))

    def _MPIX_Query_cuda_support(self):
        return self.answer

    def _MPIX_GPU_query_support(self, kind, yes):
        assert kind == 0
        yes._obj.value = self.answer
        return 0


@pytest.mark.parametrize("question", ["MPIX_Query_cuda_support", "MPIX_GPU_query_support"])
@pytest.mark.parametrize("answer", [0, 1])
def test_both_libraries_are_asked(monkeypatch, question, answer):
    monkeypatch.setattr(cuda_aware, "_libraries", lambda: ["libmpi.so"])
    monkeypatch.setattr(cuda_aware.ctypes, "CDLL", lambda path: Library(question, answer))
    assert cuda_aware.says_so() is bool(answer)


# the choice


@pytest.fixture
def chosen(gpu, nccl, monkeypatch):
    """choose(wish, ...) on four ranks: the transports and what was said, which all agree on."""

    def run(wish, gpus=4, without_nccl=(), mpi=False, says_so=(True,) * 4, trial=None, size=4):
        here = threading.local()
        monkeypatch.setattr(choice, "_is_mpi", lambda world: mpi)
        monkeypatch.setattr(cuda_aware, "says_so", lambda: says_so[here.rank])
        monkeypatch.setattr(cuda_aware, "trial", lambda number: trial)
        monkeypatch.setattr(choice, "local_rank", lambda: here.rank)
        monkeypatch.setattr(
            choice, "nccl_version", lambda: None if here.rank in without_nccl else "2.28.9"
        )

        def body(world):
            here.rank = world.rank
            device = OnGPU(gpu)
            device.number = world.rank % gpus
            made, text = choose(world, wish, device)
            assert (made is world) == (world.size == 1)
            return type(getattr(made, "transport", None)).__name__, text

        gpu.sim.device_count = 4
        (said,) = set(run_ranks(size, body))
        return said

    return run


HOST = "device arrays: through the host's memory"


@pytest.mark.parametrize(
    ("settings", "way", "text"),
    [
        ({"wish": "auto"}, "NCCL", "device arrays: NCCL 2.28.9"),
        ({"wish": "nccl"}, "NCCL", "device arrays: NCCL 2.28.9"),
        ({"wish": "mpi-staged"}, "Staged", HOST),
        ({"wish": "auto", "gpus": 2}, "Staged", f"{HOST} (ranks share a GPU)"),
        ({"wish": "auto", "gpus": 1, "mpi": True}, "Staged", f"{HOST} (ranks share a GPU)"),
        (
            {"wish": "auto", "without_nccl": [1, 3]},
            "Staged",
            f"{HOST} (NCCL cannot be loaded on rank 1, 3; the ranks are threads, not processes of MPI)",
        ),
        (
            {"wish": "auto", "without_nccl": [0], "mpi": True},
            "CUDAAware",
            "device arrays: CUDA-aware MPI",
        ),
        (
            {"wish": "auto", "without_nccl": [0], "mpi": True, "says_so": (1, 1, 0, 1)},
            "Staged",
            f"{HOST} (NCCL cannot be loaded on rank 0; the MPI library does not say that it is CUDA-aware)",
        ),
        (
            {"wish": "auto", "without_nccl": [0], "mpi": True, "trial": "ended by signal 11"},
            "Staged",
            f"{HOST} (NCCL cannot be loaded on rank 0; device memory could not be sent through MPI "
            "(rank 0: ended by signal 11))",
        ),
        ({"wish": "mpi", "mpi": True}, "CUDAAware", "device arrays: CUDA-aware MPI"),
        # some libraries that can do it do not say so: then the trial decides
        (
            {"wish": "mpi", "mpi": True, "says_so": (False,) * 4},
            "CUDAAware",
            "device arrays: CUDA-aware MPI",
        ),
        (
            {"wish": "nccl", "size": 1},
            "NoneType",
            "device arrays: one process, which sends nothing",
        ),
    ],
)
def test_all_ranks_choose_alike(chosen, settings, way, text):
    assert chosen(**settings) == (way, text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"wish": "gloo"}, "--comm gloo: choose from auto, nccl, mpi, mpi-staged"),
        (
            {"wish": "nccl", "without_nccl": [2]},
            "--comm nccl: NCCL cannot be loaded on rank 2; pip install nvidia-nccl-cu13 .*or choose "
            "--comm mpi-staged",
        ),
        ({"wish": "mpi"}, "--comm mpi: the ranks are threads"),
        (
            {"wish": "mpi", "mpi": True, "trial": "no answer in 120 seconds"},
            r"--comm mpi: device memory could not be sent through MPI \(rank 0: no answer in 120 seconds\);"
            " use a CUDA-aware MPI, or choose --comm mpi-staged",
        ),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error_with_a_way_out(chosen, settings, words):
    with pytest.raises(CupytronError, match=words):
        chosen(**settings)


def test_nccl_on_a_shared_gpu_is_told_of_several_machines(chosen, monkeypatch):
    names = ("NCCL_HOSTID", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert chosen("nccl", gpus=4)[0] == "NCCL" and not os.environ.keys() & {*names}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")  # what the user has said stays
    text = "device arrays: NCCL 2.28.9, over sockets, since ranks share a GPU"
    assert chosen("nccl", gpus=1) == ("NCCL", text)
    assert os.environ["NCCL_HOSTID"].startswith("rank-")
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["NCCL_IB_DISABLE"]) == ("eth0", "1")


def test_ranks_on_cpus_keep_their_world():
    def body(world):
        made, text = choose(world, "nccl", backend.CPU)
        return made is world, text

    assert run_ranks(2, body) == [(True, "device arrays: none, the ranks compute on CPUs")] * 2


def test_nccl_s_version_is_read(gpu, nccl):
    assert choice.nccl_version() == "2.28.9"
    nccl.version = 21005
    assert choice.nccl_version() == "2.10.5"
    gpu.cuda.nccl.available = False
    assert choice.nccl_version() is None


# launchers


@pytest.mark.parametrize(
    ("said", "rank"),
    [
        ({}, 0),
        ({"SLURM_LOCALID": "3", "SLURM_PROCID": "3"}, 0),  # a batch script, of no step
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, 3),
        ({"PMI_SIZE": "8", "PMI_RANK": "6", "MPI_LOCALRANKID": "2"}, 2),
        ({"PMI_SIZE": "8", "PMI_RANK": "6", "PALS_LOCAL_RANKID": "1"}, 1),
        ({"PMI_SIZE": "8", "PMI_RANK": "6", "MV2_COMM_WORLD_LOCAL_RANK": "0"}, 0),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"}, 2),
        # nobody says: neighbours on one node
        ({"PMI_SIZE": "8", "PMI_RANK": "6"}, 6),
        ({"PMI_SIZE": "8", "PMI_RANK": "6", "MPI_LOCALNRANKS": "4"}, 2),
    ],
)
def test_the_rank_on_its_node(monkeypatch, said, rank):
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "PALS_", "MV2_", "SLURM_", "MPI_LOCAL")):
            monkeypatch.delenv(name)
    for name, text in said.items():
        monkeypatch.setenv(name, text)
    assert local_rank() == rank


@pytest.mark.parametrize("name", NAMES)
def test_launchers_say_the_rank_on_the_node(name):
    code = "from cupytron.launcher import local_rank; print(f'{local_rank()} of 3\\n', end='')"
    command, env = launch(name, 3, [sys.executable, "-c", code])
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert {line[0] for line in done.stdout.splitlines()} == {"0", "1", "2"}, done
