"""One training step, from tokens to new weights. The page to read first."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cupytron import backend, ops, optim, progress
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.comm import Communicator, ParallelContext, SelfCommunicator
from cupytron.config import ModelConfig, RunConfig, resolve_model
from cupytron.errors import CheckpointError, CupytronError
from cupytron.layer import Parameter
from cupytron.parallel import drift
from cupytron.parallel.buffer import share
from cupytron.parallel.data import count_targets
from cupytron.parallel.pipeline import Pipeline, Work, cut
from cupytron.parallel.plan import build
from cupytron.parallel.zero import Zero
from cupytron.room import check_room
from cupytron.together import together


class StepResult(NamedTuple):
    """What a step tells: mean loss before the update, gradient norm before clipping, learning rate.

    skipped: float16 gradients overflowed, and nothing was updated. loss_scale: of the next step.
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: bool = False
    loss_scale: float = 1.0


class NotFinite(CupytronError):
    """The loss or a gradient became infinite or NaN; the weights are those before the step."""


def _not_finite(step: int, loss: float, norm: float) -> NotFinite:
    return NotFinite(
        f"step {step}: loss {loss}, gradient norm {norm}: not finite; lower optim.lr, raise "
        "optim.warmup_steps or set optim.clip"
    )


class Trainer:
    """A model with its optimizer, and the number of steps that it has been trained.

    Args:
        config: the run's settings.
        vocab_size: the data set's; None if config.model.vocab_size says it.
        context: the mesh; None: this process alone.

    Raises:
        CupytronError: the model or the batch does not fit the mesh, or the model no memory.
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
        self.vocab_size = int(model_config.vocab_size or 0)
        self.model, self.zero = self.build_model(model_config)
        self.optimizer = optim.OPTIMIZERS[config.optim.name](config.optim)
        self.updates = 0  # steps that changed the weights: all, but for those that overflowed
        self.loss_scale = optim.LossScale(config.train.loss_scale, dynamic=config.scales_loss)
        self._gpu: Any = None  # gpu_step.GPUStep, on a GPU
        self._tuned = False  # whether the first step has been, in which kernels are tried

    def build_model(self, model: ModelConfig) -> tuple[Any, Zero]:
        """The model on the mesh, not materialised."""
        check_room(self.config, model, self.context)
        return build(self.config, model, self.context)

    def materialize(self, initial: bool = True) -> None:
        """Allocate weights, gradients and optimizer state.

        Args:
            initial: give the weights their initial values; not needed where `load` follows.
        """
        train = self.config.train
        self.zero.materialize(
            train.seed if initial else None,
            train.dtype,
            self.optimizer.STATE,
            backend.named_dtype(self.config.compute_dtype),
            np.dtype(self.config.reduce_dtype),
        )
        if self.context.device.gpu:
            from cupytron.gpu_step import GPUStep

            self._gpu = GPUStep(self.zero, self.optimizer, self.config)

    def train_step(self, inputs: Any, targets: Any) -> StepResult:
        """Train on one global batch.

        Shapes: inputs, targets (sequences, S), this replica's part of the batch: its sequences
        `local_sequences`; a target of ops.IGNORE does not count.

        Raises:
            NotFinite: loss or gradient norm is not finite; nothing has been updated.
        """
        return self.start_step(inputs, targets)()

    def start_step(
        self, inputs: Any, targets: Any, compare: bool = False
    ) -> Callable[[], StepResult]:
        """As train_step, but on a GPU the step is only started; the function returned waits for it.

        The next step may be started before that. If a step is not finite, the first such function to be
        called raises NotFinite; later steps have not changed the weights.

        Args:
            inputs: as in train_step.
            targets: as in train_step.
            compare: whether to compare, before the update, the copies of weights that it will overwrite.

        Raises:
            ReplicasDiffer: they differ; nothing has been updated.
        """
        if self._gpu is None:
            loss = self.compute_gradients(inputs, targets)
            if not math.isfinite(loss):
                # all ranks have this loss; a replica that has drifted may be the cause
                self.compare_replicas()
            if compare:
                self.compare_replicas(before_update=True)
            norm, lr = self.apply_gradients(loss)
            result_here = StepResult(loss, norm, lr, not math.isfinite(norm), self.loss_scale.value)
            return lambda: result_here
        if not self._tuned:
            self._tuned = True
            if self.context.tuner is not None:
                with self.context.tuner.tuning(self.context.world):
                    result = self.start_step(inputs, targets, compare)
                self._gpu.forget_graphs()  # they hold what was called before anything was chosen
                return result
        with self.context.device.range(f"step {self.step}"):
            self._gpu.start_gradients(*self._cut(inputs, targets), self._lr)
            if compare:
                self.compare_replicas(before_update=True)
            return self._start_update()

    def _start_update(self) -> Callable[[], StepResult]:
        lr, number = self._lr, self.step + 1
        numbers = self._gpu.start_update()
        self._count_step()

        def result() -> StepResult:
            found = numbers()
            if found.failed:
                if not math.isfinite(found.loss):
                    self.compare_replicas()
                raise _not_finite(number, found.loss, found.norm)
            skipped = not math.isfinite(found.norm)
            return StepResult(found.loss, found.norm, lr, skipped, found.loss_scale)

        return result

    @property
    def _lr(self) -> float:
        """The learning rate of the step that comes."""
        return optim.learning_rate(self.config, self.step)

    def compute_gradients(self, inputs: Any, targets: Any) -> float:
        """Forward and backward of all micro-batches; every bucket's `gradient` is then the step's.

        With a loss scale (compute_dtype float16) it is multiplied by that.

        Shapes: as train_step's.
        Returns: the mean loss over all of the step's targets, the same on every rank.
        """
        work, counted = self._cut(inputs, targets)
        if self._gpu is not None:
            self._gpu.start_gradients(work, counted, self._lr)
            return self._gpu.loss()
        scale = self.loss_scale.value
        return self.zero.compute_gradients(work, scale=scale / max(1, counted)) / scale

    def _cut(self, inputs: Any, targets: Any) -> tuple[list[Work], int]:
        """This replica's micro-batches, and how many targets count on all replicas."""
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
        return work, count_targets(dp, targets)

    def apply_gradients(self, loss: float = 0.0) -> tuple[float, float]:
        """Clip the gradients, update the weights and give them to whoever needs them.

        Returns: the norm of the gradient before clipping, and the learning rate.
        """
        if self._gpu is not None:
            found = self._start_update()()
            return found.grad_norm, found.lr
        norm = self.zero.global_norm() / self.loss_scale.value
        finite, scaling = math.isfinite(norm), self.loss_scale.value > 1
        lr = self._lr
        if not math.isfinite(loss) or not (finite or scaling):
            # a smaller scale mends gradients that overflow, not the loss, which has none
            self.zero.clear_gradients()
            raise _not_finite(self.step + 1, loss, norm)
        if finite:
            clip = self.config.optim.clip
            scale = clip / norm if clip and norm > clip else 1.0
            self.zero.update(self.optimizer, lr, self.updates, scale / self.loss_scale.value)
            self.updates += 1
        else:
            self.zero.clear_gradients()
        self.loss_scale.note(finite)
        self._count_step()
        return norm, lr

    def _count_step(self) -> None:
        self.step += 1
        self.position += self.config.global_batch

    def counters(self) -> dict[str, float]:
        """Numbers of the optimizer that a checkpoint keeps beside its arrays."""
        scale = self.loss_scale
        found = (
            {"updates": self.updates, "loss_scale": scale.value, "good_steps": scale.good_steps}
            if self._gpu is None
            else self._gpu.read()
        )
        # a run without a loss scale knows none that a later one could begin with
        return found if scale.dynamic else {"updates": found["updates"]}

    def restore(self, step: int, position: int, counters: dict[str, float] | None = None) -> None:
        """Go on after a step, from that place in the sample order, with a checkpoint's counters."""
        self.step, self.position = step, position
        scale = self.loss_scale
        found = {"updates": step, "loss_scale": scale.value, "good_steps": 0, **(counters or {})}
        self.updates = int(found["updates"])
        if scale.dynamic:
            scale.value, scale.good_steps = found["loss_scale"], int(found["good_steps"])
        if self._gpu is not None:
            self._gpu.write(found)

    def compare_replicas(self, before_update: bool = False) -> None:
        """Compare this rank's tensors with their copies on other ranks. Collective over the world.

        Args:
            before_update: a step's update comes next: compare only the weights that it will overwrite.

        Raises:
            ReplicasDiffer: copies differ; it names ranks and tensors, and is the same on every rank.
        """
        if self.context.world.size == 1:
            return
        if before_update:
            drift.compare(self.zero, self.step + 1, {}, before_update)
        else:
            place = {"step": self.step, "position": self.position, "lr": self._lr}
            drift.compare(self.zero, self.step, place | self.counters())

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
                    values = backend.to_host(values)
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
    """Read this rank's shares of weights ("weight") and optimizer state (by its names). Collective.

    Args:
        complete: whether the checkpoint may hold nothing else.

    Raises:
        CheckpointError: it is damaged, or its tensors are not this model's; the same on every rank.
    """
    together(zero.context.world, lambda: _read_buckets(checkpoint, zero, kinds, complete))
    for bucket in zero.buckets:
        bucket.refresh()
    zero.publish()


def _read_buckets(
    checkpoint: Checkpoint, zero: Zero, kinds: tuple[str, ...], complete: bool
) -> None:
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
    done, total = 0, len(kinds) * sum(len(list(b.parts(b.owned))) for b in zero.buckets)
    for bucket in zero.buckets:
        for kind in kinds:
            flat = bucket.weights if kind == "weight" else bucket.state[kind]
            for parameter, inside, place in bucket.parts(bucket.owned):
                name, box = f"{kind}/{parameter.name}", box_of(parameter)
                values = checkpoint.read(name, box, inside.start, inside.stop)
                flat[bucket.local(place)] = zero.context.device.put(values)
                done += 1
                progress.count(done, total, "tensors")


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
