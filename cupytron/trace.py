"""A trace: what every rank does and when, for some steps of a run, as one file for Perfetto.

Each rank notes its pipeline actions, and what its communicators do, which tell as long as a traced step
lasts. Then rank 0 writes all of it in Chrome's trace format, and says how long the stages were idle: the
bubble, beside the one that the schedule predicts.

A GPU runs an action long after the host has started it: there, actions have the GPU's times, and calls the
host's.
"""

import contextlib
import json
import os
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cupytron.durable import replacing
from cupytron.errors import ConfigError
from cupytron.parallel import checker
from cupytron.parallel.checker import Span
from cupytron.parallel.schedules import Action, Schedule

if TYPE_CHECKING:  # --trace is read before NumPy is imported
    from cupytron.comm import Communicator, ParallelContext

ACTIONS, COMMUNICATION = 0, 1  # a rank's tracks


class Operation(NamedTuple):
    """A call of a communicator, or the wait for what an earlier call began."""

    name: str
    axis: str
    start: float
    end: float
    sent: int
    waiting: bool


class Record(NamedTuple):
    """What one rank did in the traced steps; times are in seconds since a moment that all ranks share.

    coordinates: the rank's place in the mesh, by axis. spans, operations: by step. gpu: the name of the one
    that the spans are of; empty: they are the host's.
    """

    coordinates: dict[str, int]
    spans: dict[int, list[Span]]
    operations: dict[int, list[Operation]]
    gpu: str = ""


def parse_range(text: str) -> tuple[int, int]:
    """Steps as --trace names them: "10:13" -> (10, 13), which are steps 10, 11 and 12.

    Raises:
        ConfigError: it is no range of steps.
    """
    found = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(
            f"--trace {text}: is not FIRST:LAST, with FIRST below LAST and counted from 0; for steps 10, "
            "11 and 12 give 10:13"
        )
    return int(found[1]), int(found[2])


class HostClock:
    """Marks moments of the host."""

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, mark: Any) -> float:
        """When a mark was reached, as time.perf_counter tells it."""
        return float(mark)


class GPUClock(HostClock):
    """Marks moments of the stream: when a GPU is done with what was started before.

    To be made on a stream that is empty, or it is waited for: its first mark is reached at a time that the
    host knows, and all others are told from there.
    """

    def __init__(self, device: Any) -> None:
        self._cuda, self._stream = device.xp.cuda, device.stream
        self._stream.synchronize()
        before = time.perf_counter()
        self._first = self.mark()
        self._first.synchronize()
        self._at = (before + time.perf_counter()) / 2

    def mark(self) -> Any:
        event = self._cuda.Event()
        event.record(self._stream)
        return event

    def seconds(self, mark: Any) -> float:
        """When a mark was reached, as time.perf_counter would have told it; waits for it."""
        mark.synchronize()
        return self._at + float(self._cuda.get_elapsed_time(self._first, mark)) / 1e3


class Trace:
    """What this rank does and when, for some steps of a run.

    Args:
        first, last: steps first <= step < last are traced, counted from 0 as trainer.step.

    Attributes:
        steps: those that have been traced so far.

    Raises:
        ConfigError: there is no such step.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = parse_range(f"{first}:{last}")
        self.steps: list[int] = []
        self._tracing = False
        self._zero = 0.0  # this rank's time of the moment that all ranks share
        self._clock = HostClock()
        self._marked: list[tuple[int, Action, Any, Any]] = []  # actions of the step under way
        self._spans: dict[int, list[Span]] = {}
        self._operations: dict[int, list[Operation]] = {}

    @contextlib.contextmanager
    def step(self, number: int, context: "ParallelContext") -> Iterator[None]:
        """Trace a training step, if it is one of those asked for. Collective at the first of them.

        Waits for what a GPU has to do, before and after.
        """
        if not self.first <= number < self.last:
            yield
            return
        if not self.steps:
            self._zero = _common_zero(context.world)
        self.steps.append(number)
        self._spans[number], self._operations[number] = [], []
        self._marked = []
        groups = (context.world, *context.groups)
        self._clock = GPUClock(context.device) if context.device.gpu else HostClock()
        self._tracing = True
        for group in groups:
            group.trace = self
        try:
            yield
            self._spans[number] = [
                Span(stage, action, self._time(start), self._time(end))
                for stage, action, start, end in self._marked
            ]
        finally:
            self._tracing = False
            for group in groups:
                group.trace = None

    @contextlib.contextmanager
    def action(self, stage: int, action: Action) -> Iterator[None]:
        """Note what a stage does while this lasts; nothing outside of a traced step."""
        if not self._tracing:
            yield
            return
        start = self._clock.mark()
        yield
        self._marked.append((stage, action, start, self._clock.mark()))

    def operation(
        self, name: str, axis: str, start: float, end: float, sent: int, waiting: bool
    ) -> None:
        """Note what a communicator tells, as bookkeeping.Recorder says."""
        if self._tracing:
            start, end = start - self._zero, end - self._zero
            done = Operation(name, axis, start, end, sent, waiting)
            self._operations[self.steps[-1]].append(done)

    def _time(self, mark: Any) -> float:
        return self._clock.seconds(mark) - self._zero

    def record(self, context: "ParallelContext") -> Record:
        """What this rank has noted so far."""
        place = {axis: context.coordinates[axis] for axis in context.sizes}
        gpu = context.device.name if context.device.gpu else ""
        return Record(place, self._spans, self._operations, gpu)

    def write(self, path: Path, context: "ParallelContext", schedule: Schedule) -> str:
        """Write the steps traced so far, of which there is one; returns a line about them. Collective.

        Args:
            schedule: of these steps.

        Raises:
            OSError: on rank 0 only, the one that writes; no other rank waits for it.
        """
        records = context.world.gather_objects(self.record(context))
        if context.world.rank == 0:
            about = {"mesh": context.sizes, "schedule": schedule.name}
            events = list(chrome_events(records))
            _write(path, {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})
        first, last = self.steps[0], self.steps[-1]
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        stages, count = len(schedule.actions), schedule.micro_batches
        measured, predicted = bubble(records, schedule)
        return (
            f"trace of {steps} in {path}: bubble {100 * measured:.1f} % measured, "
            f"{100 * predicted:.1f} % predicted ({schedule.name}, {stages} stage{'s' * (stages > 1)}, "
            f"{count} micro-batch{'es' * (count > 1)})"
        )


def bubble(records: Iterable[Record], schedule: Schedule) -> tuple[float, float]:
    """Share of the stages' time in which they are idle: measured and predicted.

    Measured: the mean over steps and replicas; of each stage's ranks, the first along the tensor axis
    speaks; an action that waits is at work. Predicted: what the schedule comes to if messages take no
    time and every action takes its mean time on its stage.
    """
    replicas: dict[tuple[int, int], list[Span]] = defaultdict(list)  # by step and replica
    times: dict[tuple[int, str, int], list[float]] = defaultdict(list)
    for record in records:
        if record.coordinates["tp"] == 0:
            for step, spans in record.spans.items():
                replicas[step, record.coordinates["dp"]] += spans
                for stage, action, start, end in spans:
                    times[stage, action.kind, action.chunk].append(end - start)
    means = {key: statistics.fmean(found) for key, found in times.items()}
    predicted = checker.simulate(schedule, lambda stage, a: means[stage, a.kind, a.chunk])
    measured = [checker.timeline(spans).bubble for spans in replicas.values()]
    return statistics.fmean(measured), predicted.bubble


def chrome_events(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """In Chrome's trace format: a process is a rank, with a track for actions and one for calls."""
    for rank, record in enumerate(records):
        place = " ".join(f"{axis}={i}" for axis, i in record.coordinates.items())
        at, calls = (f" on {record.gpu}", ", the host's calls") if record.gpu else ("", "")
        about: list[tuple[str, int, dict[str, Any]]] = [
            ("process_name", 0, {"name": f"rank {rank} ({place})"}),
            ("process_sort_index", 0, {"sort_index": rank}),
            ("thread_name", ACTIONS, {"name": f"actions{at}"}),
            ("thread_name", COMMUNICATION, {"name": f"communication{calls}"}),
        ]
        for what, track, told in about:
            yield {"name": what, "ph": "M", "pid": rank, "tid": track, "args": told}
        for step, spans in record.spans.items():
            for span in spans:
                kind, m, chunk = span.action
                args = {"micro_batch": m, "chunk": chunk, "kind": kind, "step": step}
                yield _event(rank, ACTIONS, f"{kind} {m}", "action", span, args)
        for step, operations in record.operations.items():
            for op in operations:
                name, category = (f"wait {op.name}", "wait") if op.waiting else (op.name, "call")
                told = {"axis": op.axis, "bytes": op.sent, "step": step}
                yield _event(rank, COMMUNICATION, name, category, op, told)


def _event(
    rank: int, track: int, name: str, category: str, span: Span | Operation, args: Mapping[str, Any]
) -> dict[str, Any]:
    # whole nanoseconds first: rounding must not make neighbours overlap; the format has microseconds
    start, end = round(span.start * 1e9), round(span.end * 1e9)
    times = {"ts": start / 1000, "dur": (end - start) / 1000}
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": rank,
        "tid": track,
        **times,
        "args": args,
    }


def _write(path: Path, content: Any) -> None:
    """Write a file; a reader sees the old content or the new, and a full disk leaves no half of it."""
    with replacing(path) as file:
        file.write(json.dumps(content).encode())


def _common_zero(world: "Communicator") -> float:
    """This rank's time of the end of a barrier. Collective.

    Ranks on one machine read one clock: there the first to leave the barrier says when it ended. A
    rank that did not run just then would else be late in the whole trace.
    """
    world.barrier()
    now = time.perf_counter()
    clock = _clock()
    return min(end for other, end in world.gather_objects((clock, now)) if other == clock)


def _clock() -> str:
    """Which clock time.perf_counter reads."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return f"{platform.node()} {os.getpid()}"
