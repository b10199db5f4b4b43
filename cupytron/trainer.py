"""One training step, from tokens to new weights. The page to read first."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cupytron import ops, optim
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.comm import Communicator, ParallelContext, SelfCommunicator
from cupytron.config import RunConfig, resolve_model
from cupytron.errors import CheckpointError, CupytronError
from cupytron.layer import Parameter
from cupytron.parallel.buffer import share
from cupytron.parallel.data import count_targets
from cupytron.parallel.pipeline import Pipeline, Work, cut
from cupytron.parallel.plan import build
from cupytron.parallel.zero import Zero


class StepResult(NamedTuple):
    """What a step tells: mean loss before the update, gradient norm before clipping, learning rate."""

    loss: float
    grad_norm: float
    lr: float


class NotFinite(CupytronError):
    """The loss or a gradient became infinite or NaN; the weights are those before the step."""


class Trainer:
    """A model with its optimizer, and the number of steps that it has been trained.

    Args:
        config: the run's settings.
        vocab_size: the data set's; None if config.model.vocab_size says it.
        context: the mesh; None: this process alone.

    Raises:
        CupytronError: the model or the batch does not fit the mesh.
    """

    def __init__(
        self,
        config: RunConfig,
        vocab_size: int | None = None,
        context: ParallelContext | None = None,
    ) -> None:
        model_config = resolve_model(config.model, vocab_size, config.train.sequence_length)
        self.config = config
        self.context = context or ParallelContext()
        self.step = 0  # steps done
        self.position = 0  # sequences seen: where in the global sample order the next step begins
        self.local_sequences = local_sequences(config, self.context.dp.rank, self.context.dp.size)
        self.model, self.zero = build(config, model_config, self.context)
        self.optimizer = optim.OPTIMIZERS[config.optim.name](config.optim)

    def materialize(self, initial: bool = True) -> None:
        """Allocate weights, gradients and optimizer state.

        Args:
            initial: give the weights their initial values; not needed where `load` follows.
        """
        train = self.config.train
        seed = train.seed if initial else None
        self.zero.materialize(seed, np.dtype(train.dtype), self.optimizer.STATE)

    def train_step(self, inputs: Any, targets: Any) -> StepResult:
        """Train on one global batch.

        Shapes: inputs, targets (sequences, S), this replica's part of the batch: its sequences
        `local_sequences`; a target of ops.IGNORE does not count.

        Raises:
            NotFinite: loss or gradient norm is not finite; nothing has been updated.
        """
        loss = self.compute_gradients(inputs, targets)
        norm, lr = self.apply_gradients(loss)
        return StepResult(loss, norm, lr)

    def compute_gradients(self, inputs: Any, targets: Any) -> float:
        """Forward and backward of all micro-batches; every bucket's `gradient` is then the step's.

        Shapes: as train_step's.
        Returns: the mean loss over all of the step's targets, the same on every rank.
        """
        train, dp = self.config.train, self.context.dp
        work = cut(
            inputs,
            targets,
            train.micro_batch,
            step=self.step,
            seed=train.seed,
            replica=dp.rank,
            replicas=dp.size,
        )
        # the loss is the mean over all targets of the step, wherever they are: they are counted first
        counted = count_targets(dp, targets)
        return self.zero.compute_gradients(work, scale=1 / max(1, counted))

    def apply_gradients(self, loss: float = 0.0) -> tuple[float, float]:
        """Clip the gradients, update the weights and give them to whoever needs them.

        Returns: the norm of the gradient before clipping, and the learning rate.
        """
        norm = self.zero.global_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.zero.clear_gradients()
            raise NotFinite(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}: not finite; "
                "lower optim.lr, raise optim.warmup_steps or set optim.clip"
            )
        clip = self.config.optim.clip
        scale = clip / norm if clip and norm > clip else 1.0
        lr = optim.learning_rate(self.config, self.step)
        self.zero.update(self.optimizer, lr, self.step, scale)
        self.step += 1
        self.position += self.config.global_batch
        return norm, lr

    def evaluate(self, batches: Any) -> tuple[float, int]:
        """As the function `evaluate`, with this model on this mesh."""
        return evaluate(self.zero.pipeline, batches, self.context.dp)

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of weights and optimizer state, as a checkpoint's pieces."""
        dp, tp = self.context.dp, self.context.tp
        for bucket in filter(self.zero.counts_here, self.zero.buckets):
            mine = share(bucket.size, dp.rank, dp.size)
            for kind, flat in (("weight", bucket.weights), *bucket.state.items()):
                for parameter, inside, place in bucket.parts(mine):
                    if parameter.whole and tp.rank:
                        continue  # the first tensor rank writes what all of them have
                    values = flat[
                        place.start - bucket.owned.start : place.stop - bucket.owned.start
                    ]
                    name, box = f"{kind}/{parameter.name}", box_of(parameter)
                    yield Piece(name, parameter.shape, box, inside.start, inside.stop, values)

    def load(self, checkpoint: Checkpoint, weights_only: bool = False) -> None:
        """Take weights and optimizer state, or the weights alone, from any mesh's checkpoint.

        Raises:
            CheckpointError: it is damaged, or its tensors are not this model's.
        """
        kinds = ("weight",) if weights_only else ("weight", *self.optimizer.STATE)
        load_buckets(checkpoint, self.zero, kinds, complete=not weights_only)


def local_sequences(config: RunConfig, replica: int, replicas: int) -> np.ndarray:
    """Which of a step's sequences a replica trains on: those of its micro-batches, in their order.

    Micro-batch m belongs to replica m % replicas.
    """
    size = config.train.micro_batch
    first = np.arange(replica, config.micro_batches, replicas) * size
    return (first[:, None] + np.arange(size)).reshape(-1)


def load_buckets(
    checkpoint: Checkpoint, zero: Zero, kinds: tuple[str, ...], complete: bool = True
) -> None:
    """Read what this rank owns of weights ("weight") and optimizer state (its names).

    Args:
        complete: whether the checkpoint may hold nothing else.

    Raises:
        CheckpointError: it is damaged, or its tensors are not this model's.
    """
    found = checkpoint.shapes()
    shapes = zero.pipeline.shapes.items()
    wanted = {f"{kind}/{name}": shape for name, shape in shapes for kind in kinds}
    for name, shape in wanted.items():
        if name not in found:
            lacking = sorted(n for n in wanted if n not in found)
            raise CheckpointError(f"{checkpoint.folder}: it lacks {', '.join(lacking)}")
        if tuple(found[name][0]) != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {found[name][0]}, the model {shape}"
            )
    for name in found:
        if name not in wanted and (complete or name.startswith("weight/")):
            raise CheckpointError(f"{checkpoint.folder}: the model has no tensor {name}")
    for bucket in zero.buckets:
        for kind in kinds:
            flat = bucket.weights if kind == "weight" else bucket.state[kind]
            for parameter, inside, place in bucket.parts(bucket.owned):
                name, box = f"{kind}/{parameter.name}", box_of(parameter)
                values = checkpoint.read(name, box, inside.start, inside.stop)
                flat[bucket.local(place)] = values
    zero.publish()


def box_of(parameter: Parameter) -> tuple[tuple[int, int], ...]:
    """A parameter's box as a checkpoint writes it."""
    return tuple((s.start, s.stop) for s in parameter.box)


def evaluate(
    pipeline: Pipeline, batches: Iterable[Any], dp: Communicator | None = None
) -> tuple[float, int]:
    """Sum of the losses and number of targets, over batches of (inputs, targets), both (B, S).

    Args:
        pipeline: the stage that is here. All ranks take part.
        batches: the same on every rank; each replica runs its share of them, as many at once as it has
            stages.
        dp: the replicas; None: one.
    """
    dp = dp or SelfCommunicator("dp")
    losses: list[float] = []
    mine: list[Any] = []
    counted = 0
    for number, (inputs, targets) in enumerate(batches):
        counted += int((targets != ops.IGNORE).sum())
        if number % dp.size == 0:
            if len(mine) == pipeline.pp.size:
                losses += _losses(pipeline, mine)
                mine = []
            # if the round is short, a replica without a batch runs this one, in which nothing counts, since
            # all must take part where weights are gathered
            mine.append((inputs, np.full_like(targets, ops.IGNORE)))
        if number % dp.size == dp.rank:
            mine[-1] = inputs, targets
    if mine:
        losses += _losses(pipeline, mine)
    return pipeline.total(dp, losses), counted


def _losses(pipeline: Pipeline, batches: list[Any]) -> list[float]:
    work: list[Work] = []
    for inputs, targets in batches:
        work += cut(inputs, targets, len(inputs), training=False)
    return pipeline.losses(work, 1.0, training=False)
