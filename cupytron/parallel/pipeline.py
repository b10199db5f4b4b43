"""The executor: runs a stage's actions, whatever the schedule.

No pipeline is a pipeline of one stage; gradient accumulation is its one-stage schedule; a forward-only
schedule evaluates and samples.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupytron import progress
from cupytron.backend import CPU, Device
from cupytron.comm import Communicator, SelfCommunicator
from cupytron.errors import CupytronError
from cupytron.layer import Chain, Layer
from cupytron.parallel import schedules
from cupytron.parallel.buffer import make_buckets
from cupytron.parallel.data import sum_exactly
from cupytron.parallel.mail import Mail, Shapes
from cupytron.parallel.schedules import Schedule
from cupytron.parallel.stages import divide, keep_only
from cupytron.stash import MicroBatch, Stash


class Work(NamedTuple):
    """One micro-batch with its tokens: ids and targets (T,), target ops.IGNORE where none counts."""

    batch: MicroBatch
    ids: Any
    targets: Any


_CHAIN = (Chain.forward, Chain.backward)


class Part(Chain):
    """Some layers of a chain: what a stage runs in one action."""

    def __init__(self, model: Chain, layers: slice) -> None:
        self.model, self.layers = model, layers

    def chain(self) -> dict[str, Layer]:
        # looked up each time: ZeRO puts its wrappers there later
        return dict(list(self.model.chain().items())[self.layers])


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
        device: where this rank computes.

    Attributes:
        placement: which stage has which parts.
        shapes: of all parameters of the whole model, by name.
        copies: by the name of a parameter that this stage shares with another one, the two stages.
        users: by the name of each such parameter, how many layers of the whole model use it.
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
        device: Device = CPU,
    ) -> None:
        self.device = device
        self.model: Any = model
        self.pp, self.name = pp or SelfCommunicator("pp"), schedule
        self.placement = schedules.placement_of(schedule, self.pp.size, chunks)
        self.stashes: dict[tuple[int, int], Stash] = {}
        self.trace: Any = None
        self.copies: dict[str, Communicator] = {}
        self.users: dict[str, int] = {}
        self.message_shapes: Shapes = {}
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

    def losses(self, work: Sequence["Work"], scale: Any, training: bool = True) -> list[Any]:
        """Run micro-batches forward, and backward in training: their losses, [] but on the last stage.

        Args:
            scale: of the loss.

        Returns: numbers, or arrays of one number on a GPU.
        """
        schedule, model, put = self.schedule(len(work), training), self.model, self.device.put
        return run_schedule(
            self, schedule, work, lambda logits, w: model.loss(logits, put(w.targets), scale)
        )

    @property
    def last_stage(self) -> int:
        """The stage that has the model's last part, and so the logits and the loss."""
        return self.placement.place(self.placement.parts - 1)[0]

    def total(self, dp: Communicator, losses: list[Any]) -> float:
        """Sum over the replicas of losses that the last stage has, on all stages; [] on the others."""
        losses = [float(loss) for loss in losses]  # waits for a GPU
        total = sum_exactly(dp, losses) if self.pp.rank == self.last_stage else 0.0
        return float(self.pp.all_gather(np.array([total]))[self.last_stage])

    def _cut(self, model: Any, ends: Communicator | None, counts: Sequence[int] | None) -> None:
        kind = type(model)
        if (getattr(kind, "forward", None), getattr(kind, "backward", None)) != _CHAIN:
            raise CupytronError(
                f"{kind.__name__}: a pipeline cuts a chain of layers; make it a subclass of "
                "cupytron.layer.Chain, with its layers as attributes in the order of forward, and with no "
                "forward or backward of its own"
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
                self.users[segment.parameter.name] = len(bucket.owners)
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
        micro_batch: sequences of each; the last one may have fewer.
        step, seed, training: as MicroBatch's.
        replica, replicas: number i here is micro-batch i * replicas + replica of the step. (With all of
            the step's sequences, cut(...)[dp.rank :: dp.size] is a replica's share.)
    """
    count, seq = inputs.shape
    sizes = {first: min(micro_batch, count - first) for first in range(0, count, micro_batch)}
    positions = np.arange(seq)
    return [
        Work(
            MicroBatch(
                batch_size=size,
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
        for first, size in sizes.items()
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
    batches = [w.batch for w in work]
    mail = Mail(pipeline.pp, schedule, batches, pipeline.message_shapes, pipeline.device)
    stashes = pipeline.stashes
    stashes.clear()  # of a step that failed
    results, counted = [], 0
    for action in schedule.actions[stage]:
        m, chunk = action.micro_batch, action.chunk
        needs, gives = schedule.needs(stage, action), schedule.gives(stage, action)
        came = mail.take(needs) if needs else None
        part, is_last = pipeline.parts[chunk], pipeline.placement.part(stage, chunk) == last
        made = None
        trace = pipeline.trace.action(stage, action) if pipeline.trace else contextlib.nullcontext()
        with trace, pipeline.device.range(f"{action.kind} {m}, chunk {chunk}"):
            if action.kind == "F":
                stash = Stash(work[m].batch, defer_weight_grads=schedule.splits_backward)
                if schedule.trains:
                    stashes[m, chunk] = stash
                else:
                    stash = stash.discarding()
                x = pipeline.device.put(work[m].ids) if came is None else came
                made = part.forward(x, stash)
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
        progress.beat()
        if action.kind == schedule.kinds[-1]:
            stashes.pop((m, chunk), None)
            if schedule.trains and chunk == 0:
                counted += 1
                progress.count(counted, len(work), "micro-batches")
        if gives:
            mail.send(gives, made)
    mail.finish()
    return results
