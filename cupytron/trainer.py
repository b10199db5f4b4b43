"""One training step, from tokens to new weights. The page to read first."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cupytron import ops, optim
from cupytron.checkpoint import Checkpoint, Piece
from cupytron.config import RunConfig, resolve_model
from cupytron.errors import CheckpointError, CupytronError
from cupytron.model import Transformer
from cupytron.parallel import schedules
from cupytron.parallel.buffer import make_buckets
from cupytron.parallel.pipeline import cut, run_schedule


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
    """

    def __init__(self, config: RunConfig, vocab_size: int | None = None) -> None:
        model_config = resolve_model(config.model, vocab_size, config.train.sequence_length)
        self.config = config
        self.step = 0  # steps done
        self.position = 0  # sequences seen: where in the global sample order the next step begins
        self.model = Transformer(model_config)
        self.buckets = make_buckets(self.model)
        self.optimizer = optim.OPTIMIZERS[config.optim.name](config.optim)

    def materialize(self) -> None:
        """Allocate weights, gradients and optimizer state; the weights get their initial values."""
        for bucket in self.buckets:
            bucket.materialize(self.config.train.seed, np.dtype(self.config.train.dtype))
        optim.allocate_state(self.optimizer, self.buckets)

    def train_step(self, inputs: Any, targets: Any) -> StepResult:
        """Train on one global batch.

        Shapes: inputs, targets (global_batch, S); a target of ops.IGNORE does not count.

        Raises:
            NotFinite: loss or gradient norm is not finite; nothing has been updated.
        """
        train = self.config.train
        work = cut(inputs, targets, train.micro_batch, step=self.step, seed=train.seed)

        # the loss is the mean over all targets of the step, so they are counted first
        counted = int((targets != ops.IGNORE).sum())
        actions = schedules.gradient_accumulation(len(work))
        loss = run_schedule(self.model, actions, work, scale=1 / max(1, counted))

        norm = optim.global_norm(self.buckets)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            for bucket in self.buckets:
                bucket.grad[...] = 0
            raise NotFinite(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}: not finite; "
                "lower optim.lr, raise optim.warmup_steps or set optim.clip"
            )
        clip = self.config.optim.clip
        scale = clip / norm if clip and norm > clip else 1.0
        lr = optim.learning_rate(self.config, self.step)
        optim.apply(self.optimizer, self.buckets, lr, self.step, scale)
        self.step += 1
        self.position += len(inputs)
        return StepResult(loss, norm, lr)

    def evaluate(self, batches: Any) -> tuple[float, int]:
        """As the function `evaluate`, with this model."""
        return evaluate(self.model, batches)

    def pieces(self) -> Iterator[Piece]:
        """Weights and optimizer state as a checkpoint's pieces."""
        for bucket in self.buckets:
            for kind, flat in (("weight", bucket.data), *bucket.state.items()):
                for parameter, start, stop in bucket.segments:
                    box = tuple((s.start, s.stop) for s in parameter.box)
                    name = f"{kind}/{parameter.name}"
                    yield Piece(name, parameter.shape, box, 0, stop - start, flat[start:stop])

    def load(self, checkpoint: Checkpoint, weights_only: bool = False) -> None:
        """Take weights and optimizer state, or the weights alone, from a checkpoint.

        Raises:
            CheckpointError: it is damaged, or its tensors are not this model's.
        """
        wanted = {piece.tensor: piece for piece in self.pieces()}
        if weights_only:
            wanted = {name: p for name, p in wanted.items() if name.startswith("weight/")}
        for name, array in checkpoint.tensors():
            piece = wanted.pop(name, None)
            if piece is None:
                if weights_only and not name.startswith("weight/"):
                    continue
                raise CheckpointError(f"{checkpoint.folder}: the model has no tensor {name}")
            if array.shape != piece.shape:
                raise CheckpointError(
                    f"{checkpoint.folder}: {name} has shape {array.shape}, the model {piece.shape}"
                )
            piece.values[...] = array[tuple(slice(a, b) for a, b in piece.box)].reshape(-1)
        if wanted:
            raise CheckpointError(f"{checkpoint.folder}: it lacks {', '.join(sorted(wanted))}")


def evaluate(model: Transformer, batches: Any) -> tuple[float, int]:
    """Sum of the losses and number of targets, over batches of (inputs, targets), both (B, S)."""
    total, counted = 0.0, 0
    for inputs, targets in batches:
        work = cut(inputs, targets, len(inputs), training=False)
        total += run_schedule(model, schedules.forward_only(len(work)), work, scale=1.0)
        counted += int((targets != ops.IGNORE).sum())
    return total, counted
