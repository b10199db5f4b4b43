"""The executor: runs a stage's actions, whatever the schedule.

No pipeline is a pipeline of one stage; gradient accumulation is its one-stage schedule; a forward-only
schedule evaluates and samples.
"""

import contextlib
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupytron import backend
from cupytron.comm import Communicator, Handle, SelfCommunicator
from cupytron.errors import CupytronError
from cupytron.layer import Chain, Layer, MicroBatch, Stash
from cupytron.parallel import schedules
from cupytron.parallel.buffer import make_buckets
from cupytron.parallel.data import sum_exactly
from cupytron.parallel.schedules import POSTED, Message, Schedule
from cupytron.parallel.stages import divide, keep_only


class Work(NamedTuple):
    """One micro-batch with its tokens: ids and targets (T,), target ops.IGNORE where none counts."""

    batch: MicroBatch
    ids: Any
    targets: Any


class Part:
    """Some layers of a chain, one after the other: what a stage runs in one action."""

    def __init__(self, model: Chain, layers: slice) -> None:
        self.model, self.layers = model, layers

    def forward(self, x: Any, stash: Stash) -> Any:
        for layer in self._mine():
            x = layer.forward(x, stash)
        return x

    def backward(self, dy: Any, stash: Stash) -> Any:
        for layer in reversed(self._mine()):
            dy = layer.backward(dy, stash)
        return dy

    def _mine(self) -> list[Layer]:
        # looked up each time: ZeRO puts its wrappers there later
        return list(self.model.chain().values())[self.layers]


class Pipeline:
    """This rank's stage of a model: its parts, and what it needs to work with the other stages.

    Args:
        model: not materialised; cut in place to the layers of this stage. With more than one part it has
            to be a Chain; with one, any layer that makes logits of ids and has a `loss`.
        pp: the stages; None: one.
        ends: first and last stage (for the others: themselves alone); needed if they share a table.
        schedule: of training; one of schedules.NAMES.
        chunks: parts of the model on each stage; None: as schedules.placement_of.
        counts: how many layers of the model's chain each part gets, such as stages.divide's; None: of equal
            cost.

    Attributes:
        placement: which stage has which parts.
        shapes: of all parameters of the whole model, by name.
        copies: by the name of a parameter that this stage shares with another one, the two stages.
        stashes: of the micro-batches in flight, by micro-batch and chunk.
        trace: None, or what records each action (trace.Trace).
    """

    def __init__(
        self,
        model: Layer,
        pp: Communicator | None = None,
        ends: Communicator | None = None,
        schedule: str = "1f1b",
        chunks: int | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:
        self.model: Any = model
        self.pp, self.name = pp or SelfCommunicator("pp"), schedule
        self.placement = schedules.placement_of(schedule, self.pp.size, chunks)
        self.stashes: dict[tuple[int, int], Stash] = {}
        self.trace: Any = None
        self.copies: dict[str, Communicator] = {}
        self.shapes_of: dict[
            Any, tuple[tuple[int, ...], Any]
        ] = {}  # of messages, by what they carry
        model.name_parts()
        self.shapes = {p.name: p.shape for _, p in model.named_parameters()}
        self.parts: list[Any] = [model]
        if self.placement.parts > 1:
            self._cut(model, ends, counts)

    def schedule(self, micro_batches: int, training: bool = True) -> Schedule:
        """What all stages run in a step of so many micro-batches, or in an evaluation of them."""
        if not training:
            return schedules.forward_only(self.placement, micro_batches)
        return schedules.make(self.name, self.pp.size, micro_batches, self.placement.chunks)

    @property
    def last_stage(self) -> int:
        """The stage that has the model's last part, and so the logits and the loss."""
        return self.placement.place(self.placement.parts - 1)[0]

    def total(self, dp: Communicator, losses: list[float]) -> float:
        """Sum over the replicas of losses that the last stage has, on all stages; [] on the others."""
        total = sum_exactly(dp, losses) if self.pp.rank == self.last_stage else 0.0
        return float(self.pp.all_gather(np.array([total]))[self.last_stage])

    def _cut(self, model: Any, ends: Communicator | None, counts: Sequence[int] | None) -> None:
        if not isinstance(model, Chain):
            raise CupytronError(
                f"{type(model).__name__}: a pipeline cuts a chain of layers; make it a subclass of "
                "cupytron.layer.Chain, with its layers as attributes in the order of forward"
            )
        counts = divide(model, self.placement.parts) if counts is None else counts
        names = list(model.chain())
        if len(counts) != self.placement.parts or sum(counts) != len(names):
            raise CupytronError(
                f"counts={list(counts)}: the model has {len(names)} layers and the pipeline "
                f"{self.placement.parts} parts; give as many counts, which add up to its layers"
            )
        part_of: dict[str, int] = {}
        for part, count in enumerate(counts):
            part_of.update(dict.fromkeys(names[len(part_of) : len(part_of) + count], part))
        stage_of = {name: self.placement.place(part)[0] for name, part in part_of.items()}
        self._find_copies(model, stage_of, ends)
        keep_only(model, {name for name in names if stage_of[name] == self.pp.rank})
        self.parts, start = [], 0
        for chunk in range(self.placement.chunks):
            count = counts[self.placement.part(self.pp.rank, chunk)]
            self.parts.append(Part(model, slice(start, start + count)))
            start += count

    def _find_copies(
        self, model: Chain, stage_of: dict[str, int], ends: Communicator | None
    ) -> None:
        for bucket in dict.fromkeys(make_buckets(model).values()):
            stages = {stage_of[name] for name in bucket.owners}
            if len(stages) == 1:
                continue
            if ends is None or stages != {0, self.pp.size - 1}:
                raise CupytronError(
                    f"{' and '.join(bucket.owners)} share a parameter and would stand on stages "
                    f"{', '.join(map(str, sorted(stages)))}; only the first and the last can share one"
                )
            for segment in bucket.segments:
                segment.parameter.alias = segment.parameter.name
                if self.pp.rank in stages:
                    self.copies[segment.parameter.name] = ends


def cut(
    inputs: Any,
    targets: Any,
    micro_batch: int,
    *,
    step: int = 0,
    seed: int = 0,
    training: bool = True,
    replica: int = 0,
    replicas: int = 1,
) -> list[Work]:
    """Cut a replica's sequences into its micro-batches.

    Shapes: inputs, targets (sequences, S).

    Args:
        micro_batch: sequences of each.
        step, seed, training: as MicroBatch's.
        replica, replicas: number i here is micro-batch i * replicas + replica of the step. (With all of
            the step's sequences, cut(...)[dp.rank :: dp.size] is a replica's share.)
    """
    count, seq = inputs.shape
    positions = np.arange(seq)
    return [
        Work(
            MicroBatch(
                batch_size=micro_batch,
                sequence_length=seq,
                positions=positions,
                step=step,
                first_token=(first * replicas + replica * micro_batch) * seq,
                training=training,
                seed=seed,
            ),
            inputs[first : first + micro_batch].reshape(-1),
            targets[first : first + micro_batch].reshape(-1),
        )
        for first in range(0, count, micro_batch)
    ]


def run_schedule(
    pipeline: Pipeline,
    schedule: Schedule,
    work: Sequence[Work],
    result: Callable[[Any, Work], Any],
) -> list[Any]:
    """Run this stage's actions in order; gradients are added to the parameters'.

    Args:
        pipeline: the stage.
        schedule: of all stages; each runs its own actions.
        work: the micro-batches that the actions name, on every stage.
        result: called with the logits of each micro-batch, where they are; if backward follows it writes
            their gradient over them, as a model's `loss` does.

    Returns: the results in the order of the micro-batches' forward; none but on the last stage.
    """
    stage, last = pipeline.pp.rank, pipeline.placement.parts - 1
    mail = Mail(pipeline, schedule, work)
    stashes = pipeline.stashes
    stashes.clear()  # of a step that failed
    results = []
    for action in schedule.actions[stage]:
        m, chunk = action.micro_batch, action.chunk
        needs, gives = schedule.needs(stage, action), schedule.gives(stage, action)
        came = mail.take(needs) if needs else None
        part, is_last = pipeline.parts[chunk], pipeline.placement.part(stage, chunk) == last
        made = None
        with pipeline.trace.action(stage, action) if pipeline.trace else contextlib.nullcontext():
            if action.kind == "F":
                stash = Stash(work[m].batch, defer_weight_grads=schedule.splits_backward)
                if schedule.trains:
                    stashes[m, chunk] = stash
                else:
                    stash = stash.discarding()
                made = part.forward(work[m].ids if came is None else came, stash)
                if is_last:
                    results.append(result(made, work[m]))
                    stash.push(pipeline.model, made)  # their gradient, now
            elif action.kind == "B":
                stash = stashes[m, chunk]
                if is_last:
                    (came,) = stash.pop(pipeline.model)
                made = part.backward(came, stash)
                assert len(stash) == 0, f"backward left {len(stash)} entries in the stash"
            else:
                stashes[m, chunk].run_weight_grads()
        if action.kind == schedule.last_kind:
            stashes.pop((m, chunk), None)
        if gives:
            mail.send(gives, made)
    mail.finish()
    return results


class Mail:
    """A stage's messages in one run of a schedule.

    All stages know the whole schedule, and so in which order each sends: messages carry no name. Their
    shape and dtype are sent ahead the first time that a part gets a micro-batch of some size.
    """

    def __init__(self, pipeline: Pipeline, schedule: Schedule, work: Sequence[Work]) -> None:
        self.pp, self.schedule, self.work = pipeline.pp, schedule, work
        self.known = pipeline.shapes_of
        self.arrived: dict[Message, Any] = {}
        self.under_way: dict[int, deque[Handle]] = defaultdict(deque)  # sends, by receiver
        rank, stages = self.pp.rank, [s for s in range(self.pp.size) if s != self.pp.rank]
        # what each other stage will send, in order; of that, what a receive is posted for
        self.coming = {s: deque(schedule.sent(s, rank)) for s in stages}
        self.posted: dict[int, deque[tuple[Message, Handle]]] = {s: deque() for s in stages}
        # whether all that this stage sends to another has a shape that both have known before
        self.settled = {
            s: all(self._link(m) in self.known for m in schedule.sent(rank, s)) for s in stages
        }
        for stage in stages:
            self._post(stage)

    def take(self, message: Message) -> Any:
        """The array that a message brings; waits for it."""
        sender = self.schedule.sender(message)
        while message not in self.arrived:
            if not self.posted[sender]:
                self._agree(sender)
            self._post(sender)
            came, handle = self.posted[sender].popleft()
            self.arrived[came] = handle.wait()
            self._post(sender)
        return self.arrived.pop(message)

    def send(self, message: Message, array: Any) -> None:
        """Send an array on its way; it may not be changed any more."""
        to = self.schedule.placement.place(message.part)[0]
        if to == self.pp.rank:
            self.arrived[message] = array
            return
        array = backend.array_module(array).ascontiguousarray(array)
        link = self._link(message)
        if link not in self.known:
            self.known[link] = array.shape, array.dtype
            self.pp.send(_describe(array), to)
        under_way = self.under_way[to]
        if len(under_way) == POSTED and self.settled[to]:
            # the receiver has posted as many receives, and the checker knows that it is safe to wait for
            # them: so no more arrays than these are held by sends
            under_way.popleft().wait()
        under_way.append(self.pp.send(array, to, async_op=True))

    def finish(self) -> None:
        """Wait until all has been sent."""
        for handle in itertools.chain(*self.under_way.values()):
            handle.wait()

    def _link(self, message: Message) -> Any:
        """What decides a message's shape and dtype."""
        batch = self.work[message.micro_batch].batch
        return message.kind, message.part, batch.batch_size, batch.sequence_length

    def _agree(self, sender: int) -> None:
        """Receive the shape and dtype of the next message from a stage, if they are not known."""
        link = self._link(self.coming[sender][0])
        if link not in self.known:
            self.known[link] = _read(self.pp.recv(np.empty(2 + _DIMS, np.int64), sender))

    def _post(self, sender: int) -> None:
        """Have receives posted for the next messages from a stage."""
        coming, posted = self.coming[sender], self.posted[sender]
        while coming and len(posted) < POSTED and self._link(coming[0]) in self.known:
            message = coming.popleft()
            shape, dtype = self.known[self._link(message)]
            handle = self.pp.recv(np.empty(shape, dtype), sender, async_op=True)
            posted.append((message, handle))


_DIMS = 6  # of a message, at most


def _describe(array: Any) -> np.ndarray:
    """Dtype and shape as numbers."""
    words = np.full(2 + _DIMS, -1, np.int64)
    words[:2] = ord(array.dtype.kind), array.dtype.itemsize
    words[2 : 2 + array.ndim] = array.shape
    return words


def _read(words: np.ndarray) -> tuple[tuple[int, ...], np.dtype]:
    shape = tuple(int(n) for n in words[2:] if n >= 0)
    return shape, np.dtype(f"{chr(words[0])}{words[1]}")
