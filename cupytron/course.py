"""Warnings before the first step about the effects of small data and of changed settings on a run.

If a resumed run is made longer, a schedule that ends at train.max_steps is stretched, and the learning rate
may jump. With a step of another size, settings that count steps mean other amounts of text.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from cupytron.config import RunConfig
from cupytron.data import Dataset
from cupytron.optim import learning_rate

_SHAPE = ("schedule", "lr", "min_lr", "warmup_steps", "decay_steps")  # of `optim`
_CLOSE = 1e-6  # relative: schedules computed in another way round differently


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A run's learning rate over its steps."""

    config: RunConfig

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return learning_rate(self.config, step)

    @property
    def fall(self) -> tuple[int, int]:
        """First and last step of the learning rate's decay; the end of warm-up twice if it is constant."""
        optim, steps = self.config.optim, self.config.train.max_steps
        if optim.schedule == "constant":
            return optim.warmup_steps, optim.warmup_steps
        if optim.schedule == "wsd":
            return max(optim.warmup_steps, steps - self.config.decay_steps), steps
        return optim.warmup_steps, max(optim.warmup_steps, self.config.decay_steps)

    def describe(self, step: int) -> str:
        """Where the learning rate goes after `step`, for a sentence that begins with "it"."""
        optim, (begin, end) = self.config.optim, self.fall
        parts = []
        if step < optim.warmup_steps:
            parts.append(f"rises to {optim.lr:.3g} until step {optim.warmup_steps}")
        if optim.schedule == "constant" or step >= end:
            parts.append(f"stays at {self.rate(max(step, optim.warmup_steps)):.3g}")
        else:
            since = f"from step {begin} " if begin > max(step, optim.warmup_steps) else ""
            parts.append(f"falls {since}to {self.config.min_lr:.3g} at step {end}")
        return " and then ".join(parts)

    def same(self, other: "Schedule", first: int, last: int) -> bool:
        """Whether both have the same rates at steps first <= step < last."""
        marks = {first, last - 1}
        for each in (self, other):
            marks |= {each.config.optim.warmup_steps, *each.fall}
        inside = sorted(mark for mark in marks if first <= mark < last)
        # between two marks both schedules are smooth, so if they agree in the middle they agree everywhere
        middles = [(a + b) // 2 for a, b in itertools.pairwise(inside)]
        return all(_close(self.rate(s), other.rate(s)) for s in [*inside, *middles])


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _CLOSE * max(abs(a), abs(b))


def schedule_changed(before: RunConfig, now: RunConfig, step: int) -> Iterator[str]:
    """A line if the learning rate goes another way than the checkpoint's schedule would.

    Args:
        before: the checkpoint's settings.
        now: the settings in use.
        step: of the checkpoint.
    """
    old, new, last = Schedule(before), Schedule(now), now.train.max_steps
    if step >= last or old.same(new, step, last):
        return
    then, here = old.rate(step), new.rate(step)
    told = f"the learning rate goes on at {here:.3g}"
    if not _close(then, here):
        told = f"the learning rate changes from {then:.3g} to {here:.3g} at step {step + 1}"
    told = f"{told}; it now {new.describe(step)}; the checkpoint's {old.describe(step)}"
    if found := _keeping(old, new, step):
        told = f"{told}; {found}"
    yield told


def _keeping(old: Schedule, new: Schedule, step: int) -> str:
    """The settings with which the learning rate goes on as it would have; empty if there are none."""
    before, now = old.config, new.config
    wanted = {key: _resolved(before, key) for key in _SHAPE}
    if before.optim.schedule != "wsd":
        # fewer decay_steps than warmup_steps are refused
        wanted["decay_steps"] = max(before.decay_steps, before.optim.warmup_steps)
    changed = {key: value for key, value in wanted.items() if value != _resolved(now, key)}
    if _with(now, changed).same(old, step, now.train.max_steps):
        return f"to keep the checkpoint's, add {_flags(changed)}"
    then = old.rate(step)
    if step < before.optim.warmup_steps or _close(then, new.rate(step)):
        return ""
    # wsd ends at max_steps, so a longer run cannot keep the old schedule
    rate = float(f"{then:.4g}")
    constant: dict[str, str | int | float] = {"schedule": "constant", "lr": rate}
    constant |= {"min_lr": rate} if now.min_lr > rate else {}
    constant |= {"warmup_steps": step} if now.optim.warmup_steps > step else {}
    return f"to stay at {then:.3g}, add {_flags(constant)}"


def _resolved(config: RunConfig, key: str) -> str | int | float:
    value: str | int | float = getattr(
        config if key in ("min_lr", "decay_steps") else config.optim, key
    )
    return value


def _with(config: RunConfig, changed: dict[str, str | int | float]) -> Schedule:
    return Schedule(config.model_copy(update={"optim": config.optim.model_copy(update=changed)}))


def _flags(changed: dict[str, str | int | float]) -> str:
    return " ".join(f"--set optim.{key}={value}" for key, value in changed.items())


def portions_changed(before: RunConfig, now: RunConfig) -> Iterator[str]:
    """A line for each changed setting that makes steps or positions in the data mean something else."""
    if before.tokens_per_step != now.tokens_per_step:
        yield (
            f"a step now takes {now.tokens_per_step:,} tokens, and took {before.tokens_per_step:,}: "
            "train.max_steps, the schedule and all intervals still count steps"
        )
    if before.train.sequence_length != now.train.sequence_length:
        yield (
            "another train.sequence_length cuts the text in another way, so this epoch may show "
            "parts of it twice and others not at all"
        )
    if before.train.seed != now.train.seed:
        yield (
            "another train.seed puts the samples in another order, so this epoch may show some of "
            "them twice and others not at all"
        )


def short_of_rate(config: RunConfig) -> Iterator[str]:
    """A line if the run ends before the learning rate has come to optim.lr."""
    optim, steps = config.optim, config.train.max_steps
    if optim.warmup_steps > steps:
        most = learning_rate(config, steps - 1)
        yield (
            f"optim.warmup_steps={optim.warmup_steps}: the run ends at step {steps}, so the learning rate "
            f"comes to {most:.3g}, not to optim.lr={optim.lr:.3g}; give fewer, such as "
            f"--set optim.warmup_steps={steps // 10}"
        )


def small_data(config: RunConfig, dataset: Dataset, samples: int) -> Iterator[str]:
    """A line for each split that is too small for the settings, though it can be used.

    Args:
        config: the settings in use.
        dataset: the run's data.
        samples: sequences of an epoch.
    """
    if samples < config.global_batch:
        times = -(-config.global_batch // samples)
        yield (
            f"train.global_batch={config.global_batch}: the data set has {samples} sequences of "
            f"{config.train.sequence_length} tokens, so a step sees the same text up to {times} times; "
            "lower train.global_batch or train.sequence_length, or prepare more text"
        )
    if (tokens := dataset.val.num_tokens) < 2:
        yield (
            f"{dataset.path}: its validation split has {tokens} token{'s' * (tokens != 1)}, so no "
            "validation loss is measured, and the last checkpoint counts as the best; prepare the data "
            "with a larger --val-fraction"
        )
