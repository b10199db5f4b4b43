"""A stand-in for cupy.cuda.nccl on the simulated GPU: ranks are threads, and what they send really arrives.

Calls have the parameters of CuPy 14's binding. Each is noted. As on a GPU, a call returns at once; the data
of the other ranks are there for whoever waits for an event of the stream, not earlier. (They are taken at
the call, so a message that nobody waits for arrives nevertheless.) The simulation's search for races hears
of each call as of a kernel that reads and writes the arrays.
"""

import contextlib
import itertools
import sys
import threading
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from simulated import bytes_at, find_memory, issue, races, state, streams

TIMEOUT = 20.0  # seconds; ranks that wait for each other become a sentence

# of nccl.h
CODES = {
    "INT8": 0,
    "CHAR": 0,
    "UINT8": 1,
    "INT32": 2,
    "INT": 2,
    "UINT32": 3,
    "INT64": 4,
    "UINT64": 5,
    "FLOAT16": 6,
    "HALF": 6,
    "FLOAT32": 7,
    "FLOAT": 7,
    "FLOAT64": 8,
    "DOUBLE": 8,
    "BFLOAT16": 9,
}
SUM = 0
_TYPES = [
    *(np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64),
    *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16),
]


class Call(NamedTuple):
    """One call of a communicator's method."""

    name: str
    size: int  # of the communicator
    rank: int  # in it
    kind: int  # of the elements
    count: int
    stream: int
    group: int | None  # which groupStart it came after
    peer: int | None  # or the root
    thread: int


class _World:
    """What the ranks of one communicator share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.joined: set[int] = set()
        self.parts: dict[int, dict[int, tuple[Any, np.ndarray | None]]] = defaultdict(dict)
        self.mail: dict[tuple[int, int], deque[np.ndarray]] = defaultdict(deque)

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(ready, TIMEOUT):
                raise RuntimeError(f"fake NCCL: {what} has waited {TIMEOUT:g} seconds")


class FakeNCCL:
    """The module; `install` puts it into the simulation.

    Attributes:
        calls: every call of every rank. version: what get_version says. fail: make communicators fail.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.version = 22809
        self.fail = False
        self.destroyed = 0
        self.worlds: dict[bytes, _World] = {}
        self._names = itertools.count()
        self._groups = itertools.count()
        self._thread = threading.local()
        # of each stream: what of its calls is not there yet, and how many calls there were
        self._coming: dict[int, deque[tuple[int, Callable[[], None]]]] = defaultdict(deque)
        self._issued: dict[int, int] = defaultdict(int)

    def module(self) -> types.ModuleType:
        module = types.ModuleType("cupy.cuda.nccl")
        contents = {f"NCCL_{name}": code for name, code in CODES.items()}
        contents |= {"available": True, "NCCL_SUM": SUM, "NcclError": NcclError}
        contents |= {"get_version": lambda: self.version, "get_unique_id": self._unique_id}
        contents |= {"groupStart": self._group_start, "groupEnd": self._group_end}
        fake = self

        class NcclCommunicator(_Communicator):
            def __init__(self, ndev: int, commId: bytes, rank: int, config: Any = None) -> None:
                super().__init__(fake, ndev, commId, rank)

        contents["NcclCommunicator"] = NcclCommunicator
        vars(module).update(contents)
        return module

    def _unique_id(self) -> bytes:
        name = next(self._names).to_bytes(128, "big")
        self.worlds[name] = _World()
        return name

    # groups

    def _open(self) -> list[Any]:
        if not hasattr(self._thread, "groups"):
            self._thread.groups = []
        return self._thread.groups

    def _group_start(self) -> None:
        self._open().append((next(self._groups), []))

    def _group_end(self) -> None:
        _, works = self._open().pop()
        if self._open():
            self._open()[-1][1].extend(works)
        elif works:
            self._issue(works)

    def add(self, work: "_Work", call: Call) -> None:
        """A call; one in a group starts with the others of the group."""
        groups = self._open()
        self.calls.append(call._replace(group=groups[-1][0] if groups else None))
        if groups:
            groups[-1][1].append(work)
        else:
            self._issue([work])

    def _issue(self, works: list["_Work"]) -> None:
        (stream,) = {work.stream for work in works}  # several are allowed by NCCL, not used here
        captured = streams._streams[stream].capture is not None

        def run() -> None:
            for work in works:
                work.give()
            if captured:  # a graph is launched
                for work in works:
                    work.take()
                return
            self._issued[stream] += 1
            for work in works:
                self._coming[stream].append((self._issued[stream], work.take))

        reads = [find_memory(*work.read) for work in works if work.read[0]]
        writes = [find_memory(*work.written) for work in works if work.written[0]]
        names = " ".join(sorted({work.name for work in works}))
        issue(f"nccl {names}", run, reads, writes, stream, kind="nccl")

    # time

    def mark(self, stream: int) -> tuple[int, int]:
        return stream, self._issued[stream]

    def settle(self, mark: tuple[int, int]) -> None:
        """Have all calls of a stream up to a mark done."""
        stream, count = mark
        coming = self._coming[stream]
        while coming and coming[0][0] <= count:
            coming.popleft()[1]()

    def over(self, event: Any) -> bool:
        """What an event says to the host that asks: not at first, and not before the data are there."""
        # most kinds of capture end with an error if an event is asked meanwhile
        assert not streams.get_current_stream().is_capturing(), "an event is asked during a capture"
        event.asked = getattr(event, "asked", 0) + 1
        if event.asked == 1:
            return False
        stream, count = event.nccl
        coming = self._coming[stream]
        while coming and coming[0][0] <= count and coming[0][1] is _nothing:
            coming.popleft()
        return not (coming and coming[0][0] <= count)


def _nothing() -> None:
    """What a sender takes."""


class NcclError(RuntimeError):
    """As CuPy's."""


class _Work(NamedTuple):
    """A call in two halves: what this rank gives, and what it takes when all is there."""

    name: str
    stream: int
    read: tuple[int, int]  # address and bytes
    written: tuple[int, int]
    give: Callable[[], None]
    take: Callable[[], None]


def _memory(ptr: int, count: int, kind: int) -> np.ndarray:
    """Elements in the simulated GPU's memory."""
    dtype = np.dtype(_TYPES[kind])
    return bytes_at(ptr, count * dtype.itemsize).view(dtype)


class _Communicator:
    def __init__(self, fake: FakeNCCL, size: int, name: bytes, rank: int) -> None:
        assert isinstance(name, bytes) and 0 <= rank < size
        if fake.fail:
            raise NcclError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error")
        self._fake, self._size, self._rank = fake, size, rank
        self._world = fake.worlds[name]
        self._given = itertools.count()
        self._alive = True
        with self._world.changed:
            assert rank not in self._world.joined, f"two ranks {rank}"
            self._world.joined.add(rank)
            self._world.changed.notify_all()
        self._world.wait(
            lambda: len(self._world.joined) == size, f"rank {rank} of {size}, to be connected,"
        )

    def allReduce(
        self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int
    ) -> None:
        assert op == SUM

        def result(parts: list[np.ndarray]) -> np.ndarray:
            return sum(parts[1:], start=parts[0].copy())

        self._collective("allReduce", sendbuf, recvbuf, count, count, datatype, stream, result)

    def reduceScatter(
        self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int
    ) -> None:
        assert op == SUM
        mine = slice(self._rank * recvcount, (self._rank + 1) * recvcount)

        def result(parts: list[np.ndarray]) -> np.ndarray:
            return sum((part[mine] for part in parts[1:]), start=parts[0][mine].copy())

        self._collective(
            *("reduceScatter", sendbuf, recvbuf, recvcount * self._size, recvcount),
            *(datatype, stream, result),
        )

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        own = recvbuf + self._rank * count * np.dtype(_TYPES[datatype]).itemsize
        whole = count * self._size * np.dtype(_TYPES[datatype]).itemsize
        inside = recvbuf <= sendbuf < recvbuf + whole
        assert not inside or sendbuf == own, "in place, a part has to be where it goes"
        self._collective(
            *("allGather", sendbuf, recvbuf, count, count * self._size),
            *(datatype, stream, np.concatenate),
        )

    def broadcast(
        self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int
    ) -> None:
        self._collective(
            *("broadcast", sendbuff, recvbuff, count, count, datatype, stream),
            *(lambda parts: parts[root], root),
        )

    def _collective(
        self,
        name: str,
        source: int,
        target: int,
        sent: int,
        received: int,
        kind: int,
        stream: int,
        result: Callable[[list[np.ndarray]], np.ndarray],
        root: int | None = None,
    ) -> None:
        world, numbers = self._world, deque[int]()
        same = name, sent, kind, root

        def give() -> None:
            numbers.append(next(self._given))
            with world.changed:
                part = _memory(source, sent, kind).copy()
                world.parts[numbers[-1]][self._rank] = same, part
                world.changed.notify_all()

        def take() -> None:
            parts = world.parts[numbers.popleft()]
            world.wait(lambda: len(parts) == self._size, f"{name} of rank {self._rank}")
            said = {what for what, _ in parts.values()}
            assert len(said) == 1, f"ranks call {said}"
            given = [parts[rank][1] for rank in range(self._size)]
            _memory(target, received, kind)[...] = result(given)

        width = np.dtype(_TYPES[kind]).itemsize
        read, written = (source, sent * width), (target, received * width)
        self._add(_Work(name, stream, read, written, give, take), kind, received, root)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        def give() -> None:
            with self._world.changed:
                mail = self._world.mail[self._rank, peer]
                mail.append(_memory(sendbuf, count, datatype).copy())
                self._world.changed.notify_all()

        size = count * np.dtype(_TYPES[datatype]).itemsize
        work = _Work("send", stream, (sendbuf, size), (0, 0), give, _nothing)
        self._add(work, datatype, count, peer)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        def take() -> None:
            mail = self._world.mail[peer, self._rank]
            self._world.wait(lambda: bool(mail), f"recv of rank {self._rank} from {peer}")
            came = mail.popleft()
            assert came.dtype == _TYPES[datatype] and len(came) == count, "NCCL would hang"
            _memory(recvbuf, count, datatype)[...] = came

        size = count * np.dtype(_TYPES[datatype]).itemsize
        work = _Work("recv", stream, (0, 0), (recvbuf, size), _nothing, take)
        self._add(work, datatype, count, peer)

    def _add(self, work: _Work, kind: int, count: int, peer: int | None) -> None:
        assert self._alive, f"{work.name} on a communicator that was destroyed"
        assert count > 0, f"{work.name} of nothing: NCCL does not say what it makes of that"
        self._fake.add(
            work,
            Call(
                *(work.name, self._size, self._rank, kind, count, work.stream, None, peer),
                threading.get_ident(),
            ),
        )

    def destroy(self) -> None:
        if self._alive:
            self._alive = False
            self._fake.destroyed += 1


@contextlib.contextmanager
def installed(monkeypatch: Any, cupy: Any) -> Iterator[FakeNCCL]:
    """cupy.cuda.nccl of a simulated GPU, and streams that know of its calls."""
    fake = FakeNCCL()
    module = fake.module()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy.cuda.nccl", module)
        patch.setattr(cupy.cuda, "nccl", module, raising=False)
        record, wait = streams.Stream.record, streams.Stream.wait_event
        synchronize = streams.Stream.synchronize

        def recording(stream: Any, event: Any = None) -> Any:
            event = record(stream, event)
            event.nccl = fake.mark(stream.ptr)
            return event

        def waiting(stream: Any, event: Any) -> None:
            wait(stream, event)
            if hasattr(event, "nccl"):
                fake.settle(event.nccl)

        def synchronizing(stream: Any) -> None:
            synchronize(stream)
            fake.settle(fake.mark(stream.ptr))

        def done(event: Any) -> bool:
            over = fake.over(event)
            if over:  # from here on the host knows
                races.merge(state.sim().host_clock, event.clock)
            return over

        patch.setattr(streams.Event, "done", property(done))
        patch.setattr(streams.Stream, "record", recording)
        patch.setattr(streams.Stream, "wait_event", waiting)
        patch.setattr(streams.Stream, "synchronize", synchronizing)
        yield fake
