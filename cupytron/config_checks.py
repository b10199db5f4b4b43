"""Every check of settings that are fine by themselves and not together, with its way out."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cupytron.config import ModelConfig, RunConfig

MOST_CHOICES = 9


class Problem(NamedTuple):
    """What is wrong, and the keys it is about; the message begins with the first of them."""

    keys: tuple[str, ...]
    message: str


def check_model(model: "ModelConfig") -> Iterator[Problem]:
    """Heads that do not divide the width, and the like."""
    heads, kv_heads, width = model.num_heads, model.num_kv_heads, model.d_model
    position = model.position or ("rotary" if model.family == "llama" else "learned")
    if width % heads:
        yield Problem(
            ("model.num_heads", "model.d_model"),
            f"model.num_heads={heads}: does not divide model.d_model={width}; "
            f"choose num_heads from {_divisors(width, heads)}",
        )
    elif position == "rotary" and model.head_size % 2:
        way_out = "choose an even d_model"
        if width % 2 == 0:
            way_out = f"choose num_heads from {_divisors(width // 2, heads)}"
        yield Problem(
            ("model.num_heads", "model.d_model", "model.position", "model.family"),
            f"model.num_heads={heads}: gives heads of odd size {model.head_size}, "
            f"and rotary positions need pairs; {way_out}",
        )
    if kv_heads is not None and heads % kv_heads:
        yield Problem(
            ("model.num_kv_heads", "model.num_heads"),
            f"model.num_kv_heads={kv_heads}: does not divide model.num_heads={heads}; "
            f"choose num_kv_heads from {_divisors(heads, kv_heads)}",
        )


def check_run(config: "RunConfig") -> Iterator[Problem]:
    """Checks between sections; those within `model` are `check_model`'s."""
    train, optim, context = config.train, config.optim, config.model.context_length
    if config.global_batch % train.micro_batch:
        below = config.global_batch // train.micro_batch * train.micro_batch
        choices = [str(b) for b in (below, below + train.micro_batch) if b]
        yield Problem(
            ("train.global_batch", "train.micro_batch"),
            f"train.global_batch={config.global_batch}: is not a multiple of "
            f"train.micro_batch={train.micro_batch}; choose {' or '.join(choices)}",
        )
    if context is not None and train.sequence_length > context:
        yield Problem(
            ("train.sequence_length", "model.context_length"),
            f"train.sequence_length={train.sequence_length}: is longer than "
            f"model.context_length={context}; shorten it or raise context_length",
        )
    if optim.min_lr is not None and optim.min_lr > optim.lr:
        yield Problem(
            ("optim.min_lr", "optim.lr"),
            f"optim.min_lr={optim.min_lr}: is more than optim.lr={optim.lr}; "
            "lower min_lr or raise lr",
        )
    yield from _check_schedule(config)


def _check_schedule(config: "RunConfig") -> Iterator[Problem]:
    # a run shorter than its warm-up is fine: trying a preset for 20 steps should just work
    optim = config.optim
    decay, warmup = optim.decay_steps, optim.warmup_steps
    if optim.schedule in ("cosine", "linear") and decay is not None and decay < warmup:
        yield Problem(
            ("optim.decay_steps", "optim.warmup_steps", "optim.schedule"),
            f"optim.decay_steps={decay}: is before the end of optim.warmup_steps={warmup}; "
            f"set decay_steps to {warmup} or more",
        )


def check_single_process(config: "RunConfig") -> Iterator[Problem]:
    """Refuses every mesh: this version trains in one process."""
    parallel = config.parallel
    for key, value, only in (
        ("tp", parallel.tp, 1),
        ("pp", parallel.pp, 1),
        ("dp", parallel.dp or 1, 1),
        ("zero", parallel.zero, 0),
        ("sp", parallel.sp, False),
    ):
        if value != only:
            shown, use = str(value).lower(), str(only).lower()
            yield Problem(
                (f"parallel.{key}",),
                f"parallel.{key}={shown}: this version trains in one process; use {use}",
            )


def _divisors(number: int, near: int) -> str:
    """Divisors of a number as a list for a reader: all, or the nearest."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    divisors = {*small, *(number // d for d in small)}
    chosen = sorted(divisors, key=lambda d: abs(d - near))[:MOST_CHOICES]
    return ", ".join(map(str, sorted(chosen)))
