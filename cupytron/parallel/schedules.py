"""Schedules: what each stage of a pipeline runs, in which order. A schedule is data; one executor runs all.

With p stages, M micro-batches, v chunks a stage, and a stage's times F (forward), B (gradients of
activations) and W (gradients of weights) for one micro-batch:

    schedule      bubble: idle time of a stage    micro-batches that stage s keeps at once
    gpipe         (p - 1)(F + B + W)              M
    1f1b          (p - 1)(F + B + W)              min(M, p - s)
    interleaved   (p - 1)(F + B + W) / v,         (2(p - s - 1) + (v - 1) p + 1) / v, if v > 1
                  if p divides M
    zb-h1         (p - 1)(F + B - W), if M >= p   p - s, and s + 1 that wait for their W
                  and W <= F; (p - 1) B, if W > F;
                  both if B >= min(F, W)
    zb-v          from (p - 1) F / 2 to less      p, with those that wait for their W
                  than zb-h1's, if F = B = W
                  and M >= p > 1

Where there are fewer micro-batches than these numbers, all M are kept, and wait.

Reference: Huang et al. 2019, "GPipe", arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473 (1F1B with
flush, and interleaved); Qi et al. 2024, "Zero Bubble Pipeline Parallelism", arXiv:2401.10241 (ZB-H1), and
"Pipeline Parallelism with Controllable Memory", arXiv:2405.15362 (ZB-V).
`parallel/checker.py` proves what stands here, without running anything.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cupytron.config_checks import CHUNKS
from cupytron.errors import CupytronError

POSTED = 2  # receives that a stage keeps posted for each other stage


Kind = Literal["F", "B", "W"]


class Action(NamedTuple):
    """One thing to do with one micro-batch.

    kind: F forward; B backward, gradients of activations; W gradients of weights (only where they
        are put off; otherwise B makes them too). chunk: which of the stage's parts of the model.
    """

    kind: Kind
    micro_batch: int
    chunk: int = 0


class Placement(NamedTuple):
    """Which stage has which parts of the model.

    The model is cut into stages * chunks parts, 0 the first one. They are dealt out round and round:
    chunk c of stage s is part c * stages + s. Or `folded`, to and fro: odd chunks go the other way, and a
    V of two chunks has both ends of the model on stage 0.
    """

    stages: int
    chunks: int = 1
    folded: bool = False

    @property
    def parts(self) -> int:
        """Of the whole model."""
        return self.stages * self.chunks

    def part(self, stage: int, chunk: int) -> int:
        """Number of a stage's part in the model."""
        return chunk * self.stages + self._turned(stage, chunk)

    def place(self, part: int) -> tuple[int, int]:
        """Stage and chunk of a part."""
        chunk, stage = divmod(part, self.stages)
        return self._turned(stage, chunk), chunk

    def _turned(self, stage: int, chunk: int) -> int:
        return self.stages - 1 - stage if self.folded and chunk % 2 else stage


class Message(NamedTuple):
    """An array on its way: what a part's forward ("F") or backward ("B") is run on.

    part: the one that it goes to.
    """

    kind: Literal["F", "B"]
    micro_batch: int
    part: int


@dataclass(frozen=True)
class Schedule:
    """The actions of a step.

    Attributes:
        name: such as "1f1b". actions: of each stage, in order.
    """

    name: str
    placement: Placement
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]

    @functools.cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """What is done with each micro-batch and chunk, in this order."""
        order: tuple[Kind, ...] = ("F", "B", "W")
        there = {action.kind for action in self.actions[0]}
        return tuple(kind for kind in order if kind in there)

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return "B" in self.kinds

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of weights are put off to a W."""
        return "W" in self.kinds

    def needs(self, stage: int, action: Action) -> Message | None:
        """The message that an action is run on; None: the step's tokens, or what the stage itself has."""
        part = self.placement.part(stage, action.chunk)
        if action.kind == "F" and part > 0:
            return Message("F", action.micro_batch, part)
        if action.kind == "B" and part < self.placement.parts - 1:
            return Message("B", action.micro_batch, part)
        return None

    def gives(self, stage: int, action: Action) -> Message | None:
        """The message that an action's result is, if another part needs it."""
        part = self.placement.part(stage, action.chunk)
        if action.kind == "F" and part < self.placement.parts - 1:
            return Message("F", action.micro_batch, part + 1)
        if action.kind == "B" and part > 0:
            return Message("B", action.micro_batch, part - 1)
        return None

    def sender(self, message: Message) -> int:
        """The stage that a message comes from."""
        before = message.part - 1 if message.kind == "F" else message.part + 1
        return self.placement.place(before)[0]

    def sent(self, sender: int, receiver: int) -> Sequence[Message]:
        """What one stage sends to another, in the order in which it does."""
        return tuple(self._links[sender].get(receiver, ()))

    @functools.cached_property
    def _links(self) -> list[dict[int, list[Message]]]:
        """For each sender, its messages by receiver."""
        links: list[dict[int, list[Message]]] = [{} for _ in self.actions]
        for sender, actions in enumerate(self.actions):
            for message in filter(None, (self.gives(sender, action) for action in actions)):
                receiver = self.placement.place(message.part)[0]
                links[sender].setdefault(receiver, []).append(message)
        return links


def gpipe(stages: int, micro_batches: int) -> Iterator[list[Action]]:
    """All forward, then all backward. Activations kept: M."""
    for _ in range(stages):
        yield [Action(kind, m) for kind in ("F", "B") for m in range(micro_batches)]


def one_f_one_b(stages: int, micro_batches: int) -> Iterator[list[Action]]:
    """A stage's backward as early as it can be, and one forward for each. Activations kept: p - s.

    With one stage: each micro-batch forward and backward, one after the other.
    """
    for stage in range(stages):
        yield _alternate(
            [Action("F", m) for m in range(micro_batches)],
            [Action("B", m) for m in range(micro_batches)],
            warmup=stages - 1 - stage,
        )


def interleaved(stages: int, micro_batches: int, chunks: int) -> Iterator[list[Action]]:
    """1F1B over several parts of the model on each stage: micro-batches go round in groups of p.

    Activations kept: 2(p - s - 1) + (v - 1) p + 1 chunks of 1 / v of the stage's layers each, or all M v.
    If p does not divide M, the last group is run as if it were full, without the micro-batches that do
    not exist.
    """
    if chunks == 1:
        yield from one_f_one_b(stages, micro_batches)
        return
    order = list(_in_groups(stages, micro_batches, chunks))
    for stage in range(stages):
        actions = _alternate(
            [Action("F", m, chunk) for m, chunk in order],
            [Action("B", m, chunks - 1 - chunk) for m, chunk in order],
            warmup=2 * (stages - 1 - stage) + (chunks - 1) * stages,
        )
        yield [action for action in actions if action.micro_batch < micro_batches]


def zb_h1(stages: int, micro_batches: int) -> Iterator[list[Action]]:
    """1F1B with backward in two: stage s puts off W by s micro-batches, to fill what would be idle.

    Activations kept: p - s micro-batches', and of s + 1 what W needs (inputs of the matrices and the
    gradients of their outputs).
    """
    for stage, actions in enumerate(one_f_one_b(stages, micro_batches)):
        found = []
        for action in actions:
            found.append(action)
            if action.kind == "B" and action.micro_batch >= stage:
                found.append(Action("W", action.micro_batch - stage))
        late = range(max(0, micro_batches - stage), micro_batches)
        yield found + [Action("W", m) for m in late]


def zb_v(stages: int, micro_batches: int) -> Iterator[list[Action]]:
    """Backward in two, over two parts of the model on each stage that form a V.

    Made by running it, with F, B and W of the same length: whenever a stage is free it takes the first that
    it can of B, F of the second part, F of the first and W. Activations kept: from F to W those of 2p
    halves, as much as the first stage of 1F1B.
    """
    placement = Placement(stages, 2, folded=True)
    lists: list[list[Action]] = [[] for _ in range(stages)]
    # what each stage can do next, most urgent kind first; of a kind, the micro-batches come in their order
    order: tuple[Kind, ...] = ("B", "F", "W")
    kinds = [(kind, chunk) for kind in order for chunk in (1, 0)]
    able: list[dict[Any, deque[int]]] = [{kind: deque() for kind in kinds} for _ in range(stages)]
    able[0]["F", 0].extend(range(micro_batches))
    kept = [0] * stages
    while any(any(waiting.values()) for waiting in able):
        done = []
        for stage, waiting in enumerate(able):
            for kind, chunk in kinds:
                if waiting[kind, chunk] and (kind != "F" or kept[stage] < 2 * stages):
                    done.append((stage, kind, chunk, waiting[kind, chunk].popleft()))
                    break
        for stage, kind, chunk, m in done:  # at the same time: what follows can run from now on
            lists[stage].append(Action(kind, m, chunk))
            kept[stage] += {"F": 1, "B": 0, "W": -1}[kind]
            part = placement.part(stage, chunk)
            if kind == "B":
                able[stage]["W", chunk].append(m)
            after = {"F": part + 1, "B": part - 1, "W": -1}[kind]
            if after == placement.parts:  # the loss: backward begins where forward has ended
                able[stage]["B", chunk].append(m)
            elif after >= 0:
                to, chunk = placement.place(after)
                able[to][kind, chunk].append(m)
    yield from lists


@functools.lru_cache(maxsize=256)
def forward_only(placement: Placement, micro_batches: int) -> Schedule:
    """Evaluation and sampling: each micro-batch forward, in groups of p through all chunks."""
    stages, chunks, _ = placement
    order = _in_groups(stages, micro_batches, chunks)
    actions = tuple(Action("F", m, chunk) for m, chunk in order if m < micro_batches)
    return Schedule("forward-only", placement, micro_batches, (actions,) * stages)


def _in_groups(stages: int, micro_batches: int, chunks: int) -> Iterator[tuple[int, int]]:
    """Micro-batch and chunk, a group of p micro-batches after the other; the last group is full, too."""
    for group in range(0, micro_batches, stages):
        for chunk in range(chunks):
            for m in range(group, group + stages):
                yield m, chunk


def _alternate(forward: list[Action], backward: list[Action], warmup: int) -> list[Action]:
    """Warm-up: forward; steady: one forward, one backward; cool-down: backward."""
    steady = itertools.zip_longest(forward[warmup:], backward)
    return forward[:warmup] + [action for pair in steady for action in pair if action]


class _Kind(NamedTuple):
    """How a schedule is made.

    fixed: whether its number of chunks is that of CHUNKS, and cannot be told.
    """

    generate: Callable[..., Iterator[list[Action]]]
    fixed: bool = True
    folded: bool = False


_KINDS = {
    "gpipe": _Kind(gpipe),
    "1f1b": _Kind(one_f_one_b),
    "interleaved": _Kind(interleaved, fixed=False),
    "zb-h1": _Kind(zb_h1),
    "zb-v": _Kind(zb_v, folded=True),
}
NAMES = tuple(_KINDS)


def placement_of(name: str, stages: int, chunks: int | None = None) -> Placement:
    """Where a schedule has the parts of the model.

    Args:
        chunks: of each stage; None: 2 for interleaved and zb-v, 1 for the others.

    Raises:
        CupytronError: no such schedule, or one that has another number of chunks.
    """
    if name not in _KINDS:
        raise CupytronError(f"unknown schedule {name!r}; choose from {', '.join(NAMES)}")
    kind = _KINDS[name]
    chunks = CHUNKS[name] if chunks is None else chunks
    if chunks < 1 or stages < 1:
        raise CupytronError(f"stages={stages}, chunks={chunks}: must be at least 1")
    if kind.fixed and chunks != CHUNKS[name]:
        raise CupytronError(
            f"chunks={chunks}: {name} has {CHUNKS[name]} a stage; interleaved takes any number of them"
        )
    return Placement(stages, chunks, kind.folded)


@functools.lru_cache(maxsize=256)
def make(name: str, stages: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """The schedule of a training step.

    Raises:
        CupytronError: as placement_of; or no micro-batch.
    """
    placement = placement_of(name, stages, chunks)
    if micro_batches < 1:
        raise CupytronError(f"micro_batches={micro_batches}: must be at least 1")
    kind = _KINDS[name]
    sizes = (stages, micro_batches) if kind.fixed else (stages, micro_batches, placement.chunks)
    return Schedule(name, placement, micro_batches, tuple(map(tuple, kind.generate(*sizes))))
