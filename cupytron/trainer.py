"""One training step, from tokens to new weights. The page to read first."""

import math
from typing import Any, NamedTuple

import numpy as np

from cupytron import ops, optim
from cupytron.config import RunConfig, resolve_model
from cupytron.errors import CupytronError
from cupytron.model import Transformer
from cupytron.parallel import schedules
from cupytron.parallel.buffer import make_buckets
from cupytron.parallel.pipeline import Work, cut, run_schedule


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
        self.step = 0
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
            raise NotFinite(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}: not finite; "
                "lower optim.lr, raise optim.warmup_steps or set optim.clip"
            )
        clip = self.config.optim.clip
        scale = clip / norm if clip and norm > clip else 1.0
        lr = optim.learning_rate(self.config, self.step)
        optim.apply(self.optimizer, self.buckets, lr, self.step, scale)
        self.step += 1
        return StepResult(loss, norm, lr)

    def evaluate(self, batches: Any) -> tuple[float, int]:
        """Sum of losses and number of targets over batches of (inputs, targets), both (B, S)."""
        total, counted = 0.0, 0
        for inputs, targets in batches:
            for work in cut(inputs, targets, len(inputs), step=0, seed=0):
                work.batch.training = False
                total += run_schedule(self.model, schedules.forward_only(1), [work], scale=1.0)
            counted += int((targets != ops.IGNORE).sum())
        return total, counted


__all__ = ["NotFinite", "StepResult", "Trainer", "Work"]
