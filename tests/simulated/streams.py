"""Streams, events and capture. Work runs when it is issued; races.py notices what nothing orders."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from simulated import races, state
from simulated.errors import CUDARuntimeError
from simulated.races import Clock

_numbers = itertools.count(0x5000, 0x10)
_thread = threading.local()
_streams: dict[int, "Stream"] = {}  # those of this simulation that still exist


class Node:
    """One recorded operation. It keeps no memory alive: a pool may hand the bytes out again."""

    def __init__(self, name: str, kind: str, action: Callable[[], None], spans: list[Any]) -> None:
        self.name, self.kind, self.action, self.spans = name, kind, action, spans
        for block, _, behind, _ in spans:
            block.reach = max(block.reach, behind)


class Capture:
    """What is recorded between begin_capture and end_capture."""

    def __init__(self, origin: "Stream", mode: int) -> None:
        self.origin, self.mode = origin, mode
        self.nodes: list[Node] = []
        self.streams = [origin]
        self.touched: dict[int, list[Any]] = {}


class Stream:
    """As cupy.cuda.Stream."""

    null: "Stream"
    ptds: "Stream"

    def __init__(
        self,
        null: bool = False,
        non_blocking: bool = False,
        ptds: bool = False,
        priority: int | None = None,
    ) -> None:
        self.ptr = 0 if null else next(_numbers)
        self.is_non_blocking = non_blocking
        self.priority = priority or 0
        self.device_id = 0
        self.capture: Capture | None = None
        self.clock: Clock = {}
        self.done = True
        _streams[self.ptr] = self

    def __repr__(self) -> str:
        return f"<simulated Stream {self.ptr}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __int__(self) -> int:
        return self.ptr

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.ptr)

    def __enter__(self) -> "Stream":
        _stack().append(get_current_stream())
        _thread.current = self
        return self

    def __exit__(self, *error: object) -> None:
        _thread.current = _stack().pop()

    def use(self) -> "Stream":
        _thread.current = self
        return self

    def synchronize(self) -> None:
        host_waits("Stream.synchronize", self)

    def record(self, event: "Event | None" = None) -> "Event":
        if event is None:
            event = Event()
        event.clock = _tick(self)
        event.capture = self.capture
        event.recorded = True
        event.time = time.perf_counter()
        state.sim().log.append(("record", event.name, self.ptr))
        return event

    def wait_event(self, event: "Event") -> None:
        simulation = state.sim()
        if not event.recorded:  # as on a GPU: there is nothing to wait for
            simulation.log.append(("wait", "event never recorded", self.ptr))
            return
        if event.capture is not None:
            if event.capture.origin.capture is not event.capture:
                raise CUDARuntimeError(
                    "cudaErrorCapturedEvent: operation not permitted on an event last recorded in a "
                    "capturing stream"
                )
            if self.capture is None:
                if self.ptr == 0:
                    raise CUDARuntimeError(
                        "cudaErrorStreamCaptureImplicit: the null stream cannot join a capture"
                    )
                self.capture = event.capture
                event.capture.streams.append(self)
            elif self.capture is not event.capture:
                raise CUDARuntimeError("cudaErrorStreamCaptureMerge: two captures cannot be merged")
        elif self.capture is not None:
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureIsolation: a capturing stream waits for an event that was "
                "recorded outside of the capture"
            )
        races.merge(self.clock, event.clock)
        simulation.log.append(("wait", event.name, self.ptr))

    def begin_capture(self, mode: int | None = None) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.capture is not None:
            raise CUDARuntimeError("cudaErrorIllegalState: this stream is capturing already")
        self.capture = Capture(self, 2 if mode is None else mode)
        state.sim().log.append(("capture", "begin", self.ptr))

    def end_capture(self) -> "Graph":
        capture = self.capture
        if capture is None:
            raise RuntimeError("cannot end capture on a stream that is not capturing")
        if capture.origin is not self:
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureUnmatched: another stream began this capture"
            )
        for stream in capture.streams:
            stream.capture = None
        state.sim().log.append(("capture", "end", self.ptr))
        for stream in capture.streams:
            if self.clock.get(stream.ptr, 0) < stream.clock.get(stream.ptr, 0):
                raise CUDARuntimeError(
                    "cudaErrorStreamCaptureUnjoined: a stream of the capture has work that the first one "
                    f"never waits for (stream {stream.ptr})"
                )
        return Graph(capture.nodes)

    def is_capturing(self) -> bool:
        return self.capture is not None

    def add_callback(self, callback: Callable[..., None], argument: Any) -> None:
        if self.capture is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: add_callback")
        callback(self, 0, argument)

    def launch_host_func(self, callback: Callable[[Any], None], argument: Any) -> None:
        issue("host function", lambda: callback(argument), stream=self)


class ExternalStream(Stream):
    """A stream known by its address."""

    def __init__(self, ptr: int, device_id: int = -1) -> None:
        own = _streams.get(ptr)
        if own is None:
            raise ValueError(f"there is no stream at {ptr}")
        self.__dict__ = own.__dict__


class Event:
    """As cupy.cuda.Event."""

    _count = itertools.count()

    def __init__(
        self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
    ) -> None:
        self.name = f"event{next(self._count)}"
        self.disable_timing = disable_timing
        self.recorded = False
        self.clock: Clock = {}
        self.capture: Capture | None = None
        self.time = 0.0
        self.ptr = id(self)

    @property
    def done(self) -> bool:
        return True

    def record(self, stream: Stream | None = None) -> None:
        (stream or get_current_stream()).record(self)

    def synchronize(self) -> None:
        if self.capture is not None:
            raise CUDARuntimeError("cudaErrorCapturedEvent: the event belongs to a capture")
        simulation = state.sim()
        simulation.synchronisations += 1
        simulation.log.append(("sync", "Event.synchronize", get_current_stream().ptr))
        races.merge(simulation.host_clock, self.clock)


class Graph:
    """What was recorded, to be run as often as wanted."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    def launch(self, stream: Stream | None = None) -> None:
        stream = stream or get_current_stream()
        simulation = state.sim()
        if stream.capture is not None:
            raise NotImplementedError("the simulation has no graphs within graphs")
        simulation.log.append(("graph", f"{len(self.nodes)} nodes", stream.ptr))
        for node in self.nodes:
            for block, low, _, _ in node.spans:
                if block.returned:
                    raise CUDARuntimeError(
                        f"cudaErrorIllegalAddress: {node.name} of a graph uses memory at "
                        f"{block.ptr + low}, which its pool has given back to the system"
                    )
            with races.LOCK:
                races.touch(simulation, node.name, node.spans, stream.ptr, _tick(stream))
            simulation.log.append((node.kind, node.name, stream.ptr))
            node.action()

    def upload(self, stream: Stream | None = None) -> None:
        pass


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two events, of the host's clock."""
    for event in (start_event, end_event):
        if event.disable_timing or not event.recorded:
            raise CUDARuntimeError(
                "cudaErrorInvalidResourceHandle: both events need timing and a record"
            )
    return (end_event.time - start_event.time) * 1e3


def reset() -> None:
    """The null stream alone, at the start of a simulation."""
    _streams.clear()
    _thread.__dict__.clear()
    Stream.null = Stream(null=True)
    Stream.ptds = Stream.null


def _stack() -> list[Stream]:
    if not hasattr(_thread, "stack"):
        _thread.stack = []
    return _thread.stack


def get_current_stream(device_id: int = -1) -> Stream:
    return getattr(_thread, "current", Stream.null)


def capturing(stream: Stream | None = None) -> bool:
    return (stream or get_current_stream()).capture is not None


def _tick(stream: Stream) -> Clock:
    """The clock of a stream's next operation."""
    with races.LOCK:
        if stream.capture is None:
            races.merge(stream.clock, state.sim().host_clock)
            # the null stream waits for all others but the non-blocking ones, and they for it
            if stream.ptr == 0:
                for other in list(_streams.values()):
                    if not other.is_non_blocking and other.capture is None:
                        races.merge(stream.clock, other.clock)
            elif not stream.is_non_blocking:
                races.merge(stream.clock, Stream.null.clock)
        stream.clock[stream.ptr] = stream.clock.get(stream.ptr, 0) + 1
        return dict(stream.clock)


def host_waits(what: str, stream: Stream | None = None) -> None:
    """The host waits for a stream, which nothing may ask for while anything is captured on it."""
    simulation = state.sim()
    stream = stream or get_current_stream()
    if stream.capture is not None:
        raise RuntimeError(
            f"{what} synchronises with the host, and the current stream is capturing, so synchronous "
            "API calls are disallowed"
        )
    simulation.synchronisations += 1
    simulation.log.append(("sync", what, stream.ptr))
    races.merge(simulation.host_clock, _tick(stream))


def device_waits(what: str) -> None:
    """The host waits for all streams."""
    simulation = state.sim()
    for stream in list(_streams.values()):
        if stream.capture is not None:
            raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} during a capture")
    simulation.synchronisations += 1
    simulation.log.append(("sync", what, 0))
    for stream in list(_streams.values()):
        races.merge(simulation.host_clock, stream.clock)


def refuse_growth() -> None:
    """A pool that grows calls cudaMalloc, which only a relaxed capture lets through."""
    capture = get_current_stream().capture
    if capture is not None and capture.mode != 2:
        raise CUDARuntimeError(
            "cudaErrorStreamCaptureUnsupported: cudaMalloc, and the capture is not relaxed"
        )


def issue(
    name: str,
    action: Callable[[], None],
    reads: Iterable[Any] = (),
    writes: Iterable[Any] = (),
    stream: Stream | int | None = None,
    kind: str = "array",
) -> None:
    """Work for a stream: done now, or recorded if the stream is capturing.

    Args:
        reads, writes: simulated arrays.
    """
    simulation = state.sim()
    if stream is None:
        stream = get_current_stream()
    elif not isinstance(stream, Stream):
        stream = _streams[int(stream)]
    touched = races.spans(reads, False) + races.spans(writes, True)
    if stream.ptr == 0 and any(s.capture and not s.is_non_blocking for s in _streams.values()):
        raise CUDARuntimeError(
            f"cudaErrorStreamCaptureImplicit: {name} on the null stream, for which a capturing stream "
            "that was not made with non_blocking=True would have to wait"
        )
    with races.LOCK:  # threads may share a stream
        races.touch(simulation, name, touched, stream.ptr, _tick(stream), stream.capture)
    if stream.capture is not None:
        stream.capture.nodes.append(Node(name, kind, action, touched))
        return
    simulation.log.append((kind, name, stream.ptr))
    action()
    if simulation.violations:
        raise RuntimeError("; ".join(simulation.violations))
