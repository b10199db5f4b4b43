"""AdamW and SGD on flat arrays, learning-rate schedules, the global norm."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

from cupytron import backend, progress
from cupytron.config import OptimConfig, RunConfig
from cupytron.parallel.buffer import Bucket


class AdamW:
    """Adam with decoupled weight decay.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) - lr decay w

    Reference: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """

    STATE: ClassVar = ("exp_avg", "exp_avg_sq")

    def __init__(self, config: OptimConfig | None = None) -> None:
        self.config = config or OptimConfig()

    def update(
        self, w: Any, g: Any, state: tuple[Any, ...], lr: float, step: int, decay: float
    ) -> None:
        """Update slices of weights and state; `g` is overwritten.

        Args:
            w, g: flat slices of weights and of the (clipped) gradient.
            state: flat slices of exp_avg and exp_avg_sq.
            lr: learning rate. step: from 0. decay: weight decay of this slice.
        """
        m, v = state
        c = self.config
        xp = backend.array_module(w)
        m *= c.beta1
        m += g * (1 - c.beta1)
        v *= c.beta2
        xp.multiply(g, g, out=g)
        g *= 1 - c.beta2
        v += g
        xp.multiply(v, 1 / (1 - c.beta2 ** (step + 1)), out=g)
        xp.sqrt(g, out=g)
        g += c.eps
        xp.divide(m, g, out=g)
        g *= lr / (1 - c.beta1 ** (step + 1))
        if decay:
            w *= 1 - lr * decay
        w -= g


class SGD:
    """Gradient descent with momentum: u = momentum u + g;  w = w - lr u - lr decay w."""

    STATE: ClassVar = ("momentum",)

    def __init__(self, config: OptimConfig | None = None) -> None:
        self.config = config or OptimConfig()

    def update(
        self, w: Any, g: Any, state: tuple[Any, ...], lr: float, step: int, decay: float
    ) -> None:
        """Update slices of weights and state; `g` is overwritten. Arguments as AdamW's."""
        (u,) = state
        u *= self.config.momentum
        u += g
        if decay:
            w *= 1 - lr * decay
        w -= u * lr


class LossScale:
    """What the loss is multiplied by, so that float16 gradients stay off both of its ends.

    Where they overflow the step is skipped and the scale halved; after many steps without, it is doubled.

    Reference: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.

    Args:
        value: at first. interval: steps without overflow after which it is doubled.
        dynamic: otherwise it stays at 1.
    """

    LARGEST = 2.0**24
    INTERVAL = 2000

    def __init__(self, value: float, interval: int = INTERVAL, dynamic: bool = True) -> None:
        self.value, self.interval, self.dynamic = (value if dynamic else 1.0), interval, dynamic
        self.good_steps = 0

    def note(self, finite: bool) -> None:
        """Hear whether a step's gradients were finite."""
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps == self.interval:
            self.good_steps, self.value = 0, min(self.LARGEST, 2 * self.value)


OPTIMIZERS: dict[str, type[AdamW] | type[SGD]] = {"adamw": AdamW, "sgd": SGD}


def apply(
    optimizer: AdamW | SGD, buckets: Iterable[Bucket], lr: float, step: int, scale: float
) -> None:
    """One optimizer step on what is owned of all buckets; their gradients are scaled and used up."""
    for bucket in buckets:
        count = len(bucket.weights)
        decayed = bucket.decayed_here
        for part, decay in (
            (slice(0, decayed), optimizer.config.weight_decay),
            (slice(decayed, count), 0.0),
        ):
            _apply_range(optimizer, bucket, part, lr, step, scale, decay)
        bucket.refresh()
        progress.beat()


def _apply_range(
    optimizer: AdamW | SGD,
    bucket: Bucket,
    part: slice,
    lr: float,
    step: int,
    scale: float,
    decay: float,
) -> None:
    w, grad = bucket.weights[part], bucket.gradient[part]
    state = tuple(array[part] for array in bucket.state.values())

    def body(s: slice) -> None:
        # in slices that stay in the cache through all the steps of the update
        g = grad[s] * scale
        grad[s] = 0
        optimizer.update(w[s], g, tuple(array[s] for array in state), lr, step, decay)

    backend.for_slices(backend.array_module(w), body, part.stop - part.start, backend.BLOCK)


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of a step, counted from 0.

    It rises linearly over warmup_steps. Then: constant; linear or cosine down to min_lr at decay_steps;
    wsd stays and falls linearly to min_lr over the last decay_steps of the run (Hu et al. 2024,
    arXiv:2404.06395).
    """
    optim, low = config.optim, config.min_lr
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    if optim.schedule == "constant":
        return optim.lr
    start, end = optim.warmup_steps, config.decay_steps
    if optim.schedule == "wsd":
        end = config.train.max_steps
        start = max(start, end - config.decay_steps)
    progress = min(max((step - start) / max(1, end - start), 0.0), 1.0)
    if optim.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return optim.lr + (low - optim.lr) * progress
