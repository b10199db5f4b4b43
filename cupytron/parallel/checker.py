"""What a schedule promises, proved on the schedule alone: inputs, deadlock, memory, bubble."""

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cupytron.errors import CupytronError
from cupytron.parallel.schedules import POSTED, Action, Message, Schedule


class ScheduleError(CupytronError):
    """A schedule that cannot be run."""


class Span(NamedTuple):
    """An action with its times, in seconds or any other unit."""

    stage: int
    action: Action
    start: float
    end: float


class Timeline(NamedTuple):
    """When what runs.

    spans: of all stages. total: from the first start to the last end. bubble: share of the stages' time
    in which they are idle.
    """

    spans: list[Span]
    total: float
    bubble: float


def check(schedule: Schedule) -> None:
    """Prove that a schedule can be run.

    Every stage does everything once, gradients of weights in the order of the micro-batches (sums in
    another order are other bits); every action's inputs exist; and no stages wait for each other, even
    if a send waits until the receiver has room. It has room for POSTED messages from each other stage,
    and makes more only by going on to an action that waits for a message from there. A schedule that passes
    so runs to its end however little MPI buffers; which stage goes on first makes no difference.

    Raises:
        ScheduleError: what is wrong, and where.
    """
    for stage, actions in enumerate(schedule.actions):
        _check_complete(schedule, stage, actions)
    _replay(schedule)


def _check_complete(schedule: Schedule, stage: int, actions: tuple[Action, ...]) -> None:
    kinds = schedule.kinds
    wanted = {
        Action(kind, m, chunk)
        for kind in kinds
        for m in range(schedule.micro_batches)
        for chunk in range(schedule.placement.chunks)
    }
    if len(actions) != len(set(actions)) or set(actions) != wanted:
        wrong = wanted.symmetric_difference(actions) or {a for a in actions if actions.count(a) > 1}
        raise ScheduleError(f"stage {stage}: {_say(min(wrong))} has to be there once")
    for chunk in range(schedule.placement.chunks):
        order = [a.micro_batch for a in actions if a.kind == kinds[-1] and a.chunk == chunk]
        if order != sorted(order):
            raise ScheduleError(
                f"stage {stage}: {kinds[-1]} of chunk {chunk} is not in the order of the micro-batches"
            )


def _replay(schedule: Schedule) -> None:
    """Run the schedule without contents, as `check` says."""
    stages = range(len(schedule.actions))
    done: list[set[Action]] = [set() for _ in stages]
    arrived: list[set[Message]] = [set() for _ in stages]
    room: dict[tuple[int, int], deque[Message]] = defaultdict(deque)  # the receiver's, for a sender
    leaving: dict[int, Message] = {}  # what a stage is about to send

    def step(stage: int) -> bool:
        """One thing that this stage can do now; whether there was one."""
        if stage in leaving:
            to = schedule.placement.place(leaving[stage].part)[0]
            if len(room[stage, to]) == POSTED:
                return False
            room[stage, to].append(leaving.pop(stage))
            return True
        if len(done[stage]) == len(schedule.actions[stage]):
            return False
        action = schedule.actions[stage][len(done[stage])]
        message = schedule.needs(stage, action)
        if message and message not in arrived[stage]:
            came = room[schedule.sender(message), stage]
            if came:
                arrived[stage].add(came.popleft())
                return True
            return False
        for kind in itertools.takewhile(lambda kind: kind != action.kind, schedule.kinds):
            if action._replace(kind=kind) not in done[stage]:
                raise ScheduleError(f"stage {stage}: {_say(action)} comes before its {kind}")
        done[stage].add(action)
        if given := schedule.gives(stage, action):
            if schedule.placement.place(given.part)[0] == stage:
                arrived[stage].add(given)
            else:
                leaving[stage] = given
        return True

    while any([step(stage) for stage in stages]):
        pass
    stuck = [s for s in stages if s in leaving or len(done[s]) < len(schedule.actions[s])]
    if stuck:
        raise ScheduleError(
            "no stage can go on: "
            + "; ".join(
                f"stage {s} waits to send {leaving[s]}"
                if s in leaving
                else f"stage {s} waits for the input of {_say(schedule.actions[s][len(done[s])])}"
                for s in stuck
            )
        )


def _say(action: Action) -> str:
    return f"{action.kind} of micro-batch {action.micro_batch}, chunk {action.chunk}"


def live(schedule: Schedule) -> list[float]:
    """For each stage, the most micro-batches whose activations it keeps at once.

    They are kept from F to B; a chunk counts as 1 / chunks of a micro-batch.
    """
    chunks = schedule.placement.chunks
    return [peak(actions, [1 / chunks] * chunks) for actions in schedule.actions]


def peak(
    actions: Sequence[Action], kept: Sequence[float], awaiting: Sequence[float] | None = None
) -> float:
    """The most that a stage keeps between two of its actions, in whatever unit it is given.

    Args:
        kept: of a micro-batch in each chunk from F to B.
        awaiting: from B to W; None: nothing.
    """
    waits = awaiting if any(a.kind == "W" for a in actions) and awaiting else [0.0] * len(kept)
    total = most = 0.0
    for kind, _, chunk in actions:
        total += {"F": kept[chunk], "B": waits[chunk] - kept[chunk], "W": -waits[chunk]}[kind]
        most = max(most, total)
    return most


def simulate(schedule: Schedule, duration: Callable[[int, Action], float]) -> Timeline:
    """When each action runs, if messages take no time and each stage goes on as soon as it can.

    Args:
        duration: of an action on a stage. Where backward is not split, B's holds both.
    """
    ready: dict[Message, float] = {}
    free = [0.0] * len(schedule.actions)
    left = [list(reversed(actions)) for actions in schedule.actions]
    spans: list[Span] = []
    while any(left):
        before = len(spans)
        for stage, actions in enumerate(left):
            while actions:
                message = schedule.needs(stage, actions[-1])
                if message and message not in ready:
                    break
                action = actions.pop()
                start = max(free[stage], ready[message] if message else 0.0)
                free[stage] = start + duration(stage, action)
                spans.append(Span(stage, action, start, free[stage]))
                if given := schedule.gives(stage, action):
                    ready[given] = free[stage]
        if len(spans) == before:
            check(schedule)  # says what it waits for
    return timeline(spans)


def timeline(spans: list[Span]) -> Timeline:
    """Spans, simulated or measured, with the time that they leave idle."""
    start, end = min(s.start for s in spans), max(s.end for s in spans)
    stages = {s.stage for s in spans}
    busy = sum(s.end - s.start for s in spans)
    total = end - start
    return Timeline(spans, total, 1 - busy / (len(stages) * total) if total else 0.0)


def predict(schedule: Schedule, f: float = 1.0, b: float = 1.0, w: float = 1.0) -> Timeline:
    """The timeline if all stages take the same times.

    Args:
        f, b, w: of a stage for one micro-batch; a chunk takes its share of them.
    """
    times = {"F": f, "B": b if schedule.splits_backward else b + w, "W": w}
    chunks = schedule.placement.chunks
    return simulate(schedule, lambda stage, action: times[action.kind] / chunks)
