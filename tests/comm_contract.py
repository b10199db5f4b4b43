"""What every communicator must do, at any number of ranks: bodies for threads and for mpirun.

mpiexec -n 4 python tests/comm_contract.py
mpiexec -n 2 python tests/comm_contract.py 3000    # as many groups, opened and closed
"""

import sys
import threading
import time

import ml_dtypes
import numpy as np

from cupytron import backend
from cupytron.comm import CommunicationError, Communicator, ParallelContext

DEVICE = backend.CPU  # where the arrays are; tests of GPUs set another
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int32, np.int64, np.uint16]


def put(x):
    """An array where this run has its arrays."""
    return DEVICE.put(x)


def values(rank, shape, dtype):
    """A rank's numbers: small whole ones, whose sums are exact in every dtype."""
    return np.random.default_rng(100 + rank).integers(0, 5, shape).astype(dtype)


def part(rank, shape, dtype):
    """A rank's array."""
    return put(values(rank, shape, dtype))


def everyone(comm, shape, dtype):
    return [values(rank, shape, dtype) for rank in range(comm.size)]


def equal(got, want, dtype):
    assert got.dtype == dtype, (got.dtype, dtype)
    same(backend.to_host(got).astype(np.float64), np.asarray(want).astype(np.float64))


def same(got, want):
    np.testing.assert_array_equal(backend.to_host(got), want)


def check_all_reduce(comm: Communicator) -> None:
    for dtype in DTYPES:
        for shape in ((1,), (7, 3), (2 * comm.size,)):
            x = part(comm.rank, shape, dtype)
            assert comm.all_reduce(x) is x
            equal(x, sum(a.astype(np.float64) for a in everyone(comm, shape, dtype)), dtype)


def check_half_sums_are_rounded_once(comm: Communicator) -> None:
    """In the sum 256 + 1 + 1 + ... each bfloat16 addition would lose the 1."""
    x = put(np.full(5, 256 if comm.rank == 0 else 1, ml_dtypes.bfloat16))
    comm.all_reduce(x)
    want = np.float32(256 + comm.size - 1).astype(ml_dtypes.bfloat16)
    equal(x, np.full(5, want), ml_dtypes.bfloat16)


def check_results_have_the_same_bits_everywhere(comm: Communicator) -> None:
    x = put(np.random.default_rng(comm.rank).normal(size=1001).astype(np.float32))
    comm.all_reduce(x)
    assert len(set(comm.gather_objects(x.tobytes()))) == 1


def check_all_gather(comm: Communicator) -> None:
    for dtype in DTYPES:
        x = part(comm.rank, (3, 2), dtype)
        equal(comm.all_gather(x), np.concatenate(everyone(comm, (3, 2), dtype)), dtype)
        equal(x, values(comm.rank, (3, 2), dtype), dtype)


def check_all_gather_into(comm: Communicator) -> None:
    """In place, where x is this rank's part of the result, and from elsewhere."""
    for dtype in DTYPES:
        want = np.concatenate(everyone(comm, (3, 2), dtype))
        for async_op in (False, True):
            for place in ("own part", "elsewhere"):
                out = put(np.zeros((3 * comm.size, 2), dtype))
                x = out[3 * comm.rank : 3 * comm.rank + 3]
                x[...] = part(comm.rank, (3, 2), dtype)
                if place == "elsewhere":
                    x = x.copy()
                got = comm.all_gather(x, out, async_op)
                assert (got.wait() if async_op else got) is out
                equal(out, want, dtype)


def check_reduce_scatter(comm: Communicator) -> None:
    for dtype in DTYPES:
        shape = (2 * comm.size, 3)
        total = sum(a.astype(np.float64) for a in everyone(comm, shape, dtype))
        mine = comm.reduce_scatter(part(comm.rank, shape, dtype))
        equal(mine, total[2 * comm.rank : 2 * comm.rank + 2], dtype)


def check_all_to_all(comm: Communicator) -> None:
    for dtype in DTYPES:
        shape = (2 * comm.size, 3)
        got = comm.all_to_all(part(comm.rank, shape, dtype))
        mine = slice(2 * comm.rank, 2 * comm.rank + 2)
        equal(got, np.concatenate([a[mine] for a in everyone(comm, shape, dtype)]), dtype)


def check_halves_in_any_order(comm: Communicator) -> None:
    """16-bit sums under way together, waited for in another order on every other rank."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        shape = (2 * comm.size, 3)
        total = sum(a.astype(np.float64) for a in everyone(comm, shape, dtype))
        mine = slice(2 * comm.rank, 2 * comm.rank + 2)
        x = [part(comm.rank, shape, dtype) for _ in range(4)]
        handles = [
            comm.all_reduce(x[0], async_op=True),
            comm.reduce_scatter(x[1], async_op=True),
            comm.all_to_all(x[2], async_op=True),
            comm.all_reduce(x[3], async_op=True),
        ]
        for handle in handles if comm.rank % 2 else reversed(handles):
            handle.wait()
        for i in (0, 3):
            assert handles[i].wait() is x[i]
            equal(x[i], total, dtype)
        equal(handles[1].wait(), total[mine], dtype)
        equal(
            handles[2].wait(),
            np.concatenate([a[mine] for a in everyone(comm, shape, dtype)]),
            dtype,
        )


def check_broadcast(comm: Communicator) -> None:
    for dtype in DTYPES:
        for root in {0, comm.size - 1}:
            x = part(comm.rank, (4,), dtype)
            comm.broadcast(x, root)
            equal(x, values(root, (4,), dtype), dtype)


def check_ring_of_sends(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for dtype in DTYPES:
        out = put(np.empty((2, 3), dtype))
        (got,) = comm.exchange([(part(comm.rank, (2, 3), dtype), right)], [(out, left)])
        assert got is out
        equal(out, values(left, (2, 3), dtype), dtype)


def check_messages_of_one_pair_keep_their_order(comm: Communicator) -> None:
    if comm.size == 1:
        return
    if comm.rank == 0:
        for i in range(5):
            comm.send(put(np.array([i])), comm.size - 1)
    elif comm.rank == comm.size - 1:
        came = [int(comm.recv(put(np.empty(1, np.int64)), 0)[0]) for _ in range(5)]
        assert came == list(range(5))


def check_large_sends_before_receives(comm: Communicator) -> None:
    """A send does not wait for its receiver, and its array may be used again at once."""
    partner = comm.rank ^ 1
    if comm.size == 1:
        partner = 0
    elif partner >= comm.size:
        return
    for dtype in (np.float64, ml_dtypes.bfloat16):
        x = put(np.full(300_000, comm.rank, dtype))
        for _ in range(2):
            comm.send(x, partner)
            x[...] = -1
        out = put(np.empty(300_000, dtype))
        comm.recv(out, partner)
        equal(out, np.full(300_000, partner), dtype)
        comm.recv(out, partner)
        equal(out, np.full(300_000, -1), dtype)


def check_a_message_that_does_not_fit_is_named(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for sent, expected, async_op in ((10, 4, False), (4, 10, False), (10, 4, True), (4, 10, True)):
        comm.send(put(np.zeros(sent)), right)
        try:
            got = comm.recv(put(np.empty(expected)), left, async_op)
            got.wait()
        except CommunicationError as error:
            assert f"rank {left} sent" in str(error), error
            assert f"rank {comm.rank} expects ({expected},) float64" in str(error), error
        else:
            raise AssertionError("the misfit was not seen")
        comm.barrier()


def check_handles(comm: Communicator) -> None:
    """Several at once, waited for in another order on every other rank."""
    arrays = [part(comm.rank + 10 * i, (50,), np.float64) for i in range(4)]
    wants = [
        sum(values(rank + 10 * i, (50,), np.float64) for rank in range(comm.size)) for i in range(4)
    ]
    handles = [comm.all_reduce(x, async_op=True) for x in arrays]
    gather = comm.all_gather(put(np.array([comm.rank])), async_op=True)
    scatter = comm.reduce_scatter(put(np.arange(comm.size)), async_op=True)
    order = range(4) if comm.rank % 2 else reversed(range(4))
    for i in order:
        handles[i].wait()
        assert handles[i].wait() is arrays[i]  # a second time is free
    for x, want in zip(arrays, wants, strict=True):
        same(x, want)
    same(scatter.wait(), [comm.rank * comm.size])
    same(gather.wait(), np.arange(comm.size))


def check_a_forgotten_handle_does_no_harm(comm: Communicator) -> None:
    for _ in range(30):
        comm.all_gather(put(np.full(20_000, comm.rank)), async_op=True)
        comm.all_reduce(put(np.zeros(20_000)), async_op=True)
    comm.barrier()
    assert comm.all_reduce(put(np.ones(3))).tolist() == [comm.size] * 3


def check_what_is_waited_for_can_be_read(comm: Communicator) -> None:
    """By another thread, while rank 0 makes the others wait."""
    seen = set()
    over = threading.Event()

    def look():
        while not over.is_set():
            seen.add(comm.operation)
            time.sleep(0.002)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    names = {f"{n} on {comm.axis}" for n in ("barrier", "all_reduce", "all_gather")}
    for _ in range(50):  # on a busy machine the looking thread may come too late
        for call in (
            comm.barrier,
            lambda: comm.all_reduce(put(np.zeros(3))),
            lambda: comm.all_gather(put(np.zeros(3)), async_op=True).wait(),
        ):
            if comm.rank == 0:
                time.sleep(0.02)
            call()
        if all(comm.gather_objects(comm.rank == 0 or names <= seen)):
            break
    else:
        raise AssertionError(seen)
    over.set()
    looking.join()
    assert comm.operation is None


def check_objects_and_barrier(comm: Communicator) -> None:
    everyone = [{"rank": r} for r in range(comm.size)]
    assert comm.gather_objects({"rank": comm.rank}) == everyone
    assert comm.collect_objects({"rank": comm.rank}) == (everyone if comm.rank == 0 else [])
    comm.barrier()


def check_split(comm: Communicator) -> None:
    half = comm.split(comm.rank % 2, -comm.rank, "half")
    members = [r for r in reversed(range(comm.size)) if r % 2 == comm.rank % 2]
    assert (half.size, half.rank, half.axis) == (len(members), members.index(comm.rank), "half")
    assert half.all_gather(put(np.array([comm.rank]))).tolist() == members
    again = half.split(0, half.rank, "again")
    assert again.all_gather(put(np.array([comm.rank]))).tolist() == members


def check_groups_can_be_closed(comm: Communicator, count: int = 20) -> None:
    for i in range(count):
        group = comm.split(comm.rank % 2, comm.rank, "short-lived")
        group.all_reduce(put(np.zeros(3)), async_op=True)
        if i % 5 == 0:
            group.send(put(np.zeros(20_000)), (group.rank + 1) % group.size)
            group.recv(put(np.empty(20_000)), (group.rank - 1) % group.size)
        group.close()
        group.close()  # a second time is free
    comm.close()  # the world stays open
    assert comm.all_reduce(put(np.ones(1)))[0] == comm.size


def check_counters(comm: Communicator) -> None:
    fresh = comm.split(0, comm.rank, "counted")
    n = fresh.size
    fresh.all_reduce(put(np.zeros(4 * n, np.float32)))
    fresh.all_gather(put(np.zeros(5, np.float64)))
    fresh.reduce_scatter(put(np.zeros(2 * n, np.float16)))
    fresh.all_to_all(put(np.zeros(n, np.int64)))
    assert fresh.bytes == {
        "all_reduce": 2 * 16 * (n - 1),
        "all_gather": 40 * (n - 1),
        "reduce_scatter": 4 * (n - 1),
        "all_to_all": 8 * (n - 1),
    }
    assert all(fresh.calls[name] == 1 for name in fresh.bytes)
    fresh.bytes.clear()
    fresh.broadcast(put(np.zeros(3)), root=n - 1)
    assert fresh.bytes["broadcast"] == (24 if fresh.rank == n - 1 and n > 1 else 0)
    fresh.bytes.clear()
    fresh.all_reduce(put(np.zeros(4 * n + 1, np.float16)))  # padded to 5 n
    assert fresh.bytes["all_reduce"] == 2 * 10 * (n - 1)
    fresh.bytes.clear()
    fresh.all_reduce(put(np.zeros(4 * n + 1, np.float16)), async_op=True).wait()
    assert fresh.bytes["all_reduce"] == (8 * n + 2) * (n - 1)
    neighbour = (fresh.rank + 1) % n
    fresh.exchange([(put(np.zeros(2)), neighbour)], [(put(np.empty(2)), (fresh.rank - 1) % n)])
    assert (fresh.bytes["send"], fresh.bytes["recv"]) == (16, 0)


def check_disagreement_is_named(comm: Communicator) -> None:
    if comm.size == 1:
        return
    last = comm.size - 1
    with comm.checking():
        comm.all_reduce(put(np.zeros(3)))
        x = put(np.zeros(4 if comm.rank == last else 3))
        try:
            comm.all_reduce(x)
        except CommunicationError as error:
            assert f"rank {last} all_reduce of (4,)" in str(error), error
        else:
            raise AssertionError("the disagreement was not seen")
        try:
            comm.broadcast(put(np.zeros(3)), root=0 if comm.rank else last)
        except CommunicationError as error:
            assert "from rank" in str(error), error
        else:
            raise AssertionError("the disagreement about the root was not seen")
    assert not comm.debug


def check_bad_arguments(comm: Communicator) -> None:
    def refused(call, words):
        try:
            call()
        except CommunicationError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)

    refused(lambda: comm.all_reduce(np.zeros((4, 4)).T[:, :2]), "not contiguous")
    for odd in (np.zeros(3, bool), np.zeros(3, ">f4"), np.zeros(3, complex), np.array(1.0)):
        refused(lambda x=odd: comm.all_reduce(x), "cannot be sent")
    refused(lambda: comm.send(np.zeros(1), comm.size), "is not a rank")
    refused(lambda: comm.recv(np.zeros(1), -1), "is not a rank")
    refused(lambda: comm.broadcast(np.zeros(1), comm.size), "is not a rank")
    out = np.zeros((2 * comm.size, 2))
    refused(lambda: comm.all_gather(np.zeros((3, 2)), out), "does not take")
    refused(lambda: comm.all_gather(np.zeros((2, 2), np.float32), out), "does not take")
    refused(lambda: comm.all_gather(np.zeros((2, 2)), out[:, ::-1]), "is not contiguous")
    refused(lambda: comm.all_gather(np.float64(1), out), "no axis 0")
    if comm.size > 1:
        refused(lambda: comm.reduce_scatter(np.zeros(comm.size + 1)), "cannot be cut")
        refused(lambda: comm.all_to_all(np.zeros(comm.size + 1)), "cannot be cut")
        other = (comm.rank + 1) % comm.size
        refused(lambda: comm.all_gather(out[2 * other : 2 * other + 2], out), "overlaps")


def check_mesh(comm: Communicator) -> None:
    """Sums over the three axes, one after the other, are the sum over all."""
    for tp in (1, 2, 4):
        for pp in (1, 2, 3):
            if comm.size % (tp * pp):
                continue
            context = ParallelContext(tp=tp, pp=pp, world=comm)
            x = put(np.array([2.0**comm.rank]))
            for axis in (context.tp, context.dp, context.pp):
                axis.all_reduce(x)
            assert x[0] == 2.0**comm.size - 1
            first = comm.rank - context.coordinates["tp"]
            assert context.tp.all_gather(put(np.array([comm.rank]))).tolist() == list(
                range(first, first + tp)
            )
            assert context.operation is None
            context.close()


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def main() -> None:
    from cupytron.comm.mpi import MPICommunicator

    with MPICommunicator() as comm:  # a rank that fails ends all
        if sys.argv[1:]:
            check_groups_can_be_closed(comm, int(sys.argv[1]))
            if comm.rank == 0:
                print(f"{sys.argv[1]} groups on {comm.size} ranks", flush=True)
            return
        for check in CHECKS:
            check(comm)
            comm.barrier()
        if comm.rank == 0:
            print(f"{len(CHECKS)} checks on {comm.size} ranks", flush=True)


if __name__ == "__main__":
    main()
