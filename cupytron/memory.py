"""What a run holds in memory, by estimate; and what to change where a GPU has not as much."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cupytron import backend, optim
from cupytron.backend import CPU
from cupytron.comm import ParallelContext
from cupytron.config import ModelConfig, RunConfig
from cupytron.config_checks import check_mesh, divisors
from cupytron.errors import CupytronError
from cupytron.parallel import checker
from cupytron.parallel.kept import Kept
from cupytron.parallel.plan import build

_FILLED = 0.95  # of what a GPU has that an estimate may come to: pools round up, and leave gaps


class Estimate(NamedTuple):
    """Bytes that a rank holds; the sum is `total`.

    weights: that layers compute with. master: those that are updated, if they have another dtype.
    gradients. optimizer: its state. activations: of all micro-batches in flight. logits: of one
    micro-batch. working: what lives for a moment, roughly.
    """

    weights: int
    master: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int

    @property
    def persistent(self) -> int:
        """What stays between steps, as Zero.persistent_bytes."""
        return self.weights + self.master + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size(n)}" for name, n in self._asdict().items() if n)
        return f"{size(self.total)} ({parts})"


def size(count: float) -> str:
    """Bytes, for a reader."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**29 else f"{count / 2**20:,.1f} MiB"


def estimate(config: RunConfig, model: ModelConfig, training: bool = True) -> Estimate:
    """What the rank holds that needs most.

    With P numbers in its share of its stage's weights, p = P / dp, and w, c and g bytes of a number of
    dtype, compute_dtype and reduce_dtype, are held between steps:

        ZeRO   weights  master, unless c is w  gradients  AdamW's state (SGD's is half)
        0      c P      w P                    g P        2 w P
        1      c P      w p                    g P        2 w p
        2      c P      w p                    g p        2 w p
        3      c p      w p                    g p        2 w p

    Of each micro-batch that is in flight, as the schedule says, are held, in numbers of c bytes but for
    statistics and masks, with T = B S tokens, t = tp, s = tp under sequence parallelism and else 1:

        a norm       T D / s; 2 T / s statistics
        attention    T D / s, its input; T (N + 2 N_kv) H / t; unless recomputed, T N H / t, and T N / t
                     statistics
        MLP          T D / s, its input; 2 T F / t, if recomputed T F / t
        SwiGLU       T D / s, its input; 3 T F / t, if recomputed 2 T F / t
        a dropout    T D / s bytes
        a block      T D / s in place of all this, if it is recomputed
        the head     T D / s, its input; T V / t logits

    Inputs that are kept gathered have T D. Where gradients of weights are put off, inputs and gradients of
    all products are held from B to W. P and all widths are counted in the model itself, padding included.

    Args:
        config: with the sizes of the mesh; dp unset is 1. model: resolved.
        training: otherwise weights, and one forward.
    """
    stages = range(config.parallel.pp)
    return max((of_stage(config, model, stage, training) for stage in stages), key=sum)


def of_stage(config: RunConfig, model: ModelConfig, stage: int, training: bool = True) -> Estimate:
    """As `estimate`, of a rank of one stage."""
    place: Any = _Place(config, stage)
    transformer, zero = build(config, model, place, training)
    pipeline, kept = zero.pipeline, Kept(config, model)
    whole = sum(bucket.size for bucket in zero.buckets)
    owned = sum(bucket.owned.stop - bucket.owned.start for bucket in zero.buckets)
    largest = max((bucket.size for bucket in zero.buckets), default=0)
    logits = kept.logits(transformer.head) if transformer.head else 0
    working = moment = kept.for_a_moment(transformer)
    weights = kept.each * (owned if zero.stage == 3 else whole)
    if zero.stage == 3:  # weights of the layer that runs, and of the next one
        working += 2 * kept.each * largest
    if not training:
        return Estimate(weights, 0, 0, 0, 0, logits, working)

    master = np.dtype(config.train.dtype).itemsize
    reduce = backend.at_least_float32(np.dtype(config.reduce_dtype)).itemsize
    parts = [part.chain().values() for part in pipeline.parts]
    until_backward = [sum(map(kept.until_backward, layers)) for layers in parts]
    until_weights = [sum(map(kept.until_weights, layers)) for layers in parts]
    if logits:
        until_backward[pipeline.placement.place(pipeline.placement.parts - 1)[1]] += logits
    here = config.micro_batches // place.dp.size
    actions = pipeline.schedule(here).actions[stage]
    held = int(checker.peak(actions, until_backward, until_weights))
    working += kept.again(transformer)
    if zero.parts_at_once:  # full gradients: of the layer that runs, and on their way
        working += 3 * reduce * largest
    elif config.parallel.graphs and place.tp.size == pipeline.placement.parts == 1:
        working += moment + logits  # of an evaluation, which gets no memory of a recorded step
    if zero.deterministic:  # sums of 1, 2, 4, ... micro-batches
        working += reduce * owned * here.bit_length()
    return Estimate(
        weights,
        0 if config.compute_dtype == config.train.dtype else master * owned,
        reduce * (owned if zero.parts_at_once else whole),
        master * owned * len(optim.OPTIMIZERS[config.optim.name].STATE),
        held - logits,
        logits,
        working,
    )


class _Seat(NamedTuple):
    """What is asked of a communicator while a model is put together."""

    rank: int
    size: int


class _Place:
    """A rank's place in a mesh that need not exist: the first rank of a stage."""

    device = CPU

    def __init__(self, config: RunConfig, stage: int) -> None:
        p = config.parallel
        self.sizes = {"tp": p.tp, "pp": p.pp, "dp": p.dp or 1}
        self.tp, self.pp, self.dp = _Seat(0, p.tp), _Seat(stage, p.pp), _Seat(0, p.dp or 1)
        self.ends = _Seat(min(stage, 1), min(p.pp, 2))


def advice(config: RunConfig, model: ModelConfig, available: float, training: bool = True) -> str:
    """What would fit into so many bytes a rank, by the estimate.

    In this order: smaller micro-batches, recomputation, ZeRO, more ranks that share the layers.

    Args:
        config, model, training: of what did not fit, as estimate's.
    """
    # less than what did not fit, whatever the estimate says of that
    limit = _FILLED * min(available, estimate(config, model, training).total)
    train, batch = config.train, config.global_batch
    smaller = divisors(batch) if training else [train.micro_batch]
    for changes in _changes(config, model, training):
        for micro_batch in reversed([n for n in smaller if n <= train.micro_batch]):
            if micro_batch < train.micro_batch:
                changes.update({"train.micro_batch": micro_batch, "train.global_batch": batch})
            other = _changed(config.model_copy(update={"model": model}), changes)
            if any(check_mesh(other)):
                continue
            found = estimate(other, other.model, training).total
            if found <= limit:
                ranks = other.parallel.ranks
                on = f" on {ranks} ranks" if ranks > config.parallel.ranks else ""
                return f"{_said(changes, training)}{on} would fit, with {size(found)}"
    return "nothing tried here would fit: take a smaller model, or more GPUs"


def _changes(config: RunConfig, model: ModelConfig, training: bool) -> Iterator[dict[str, Any]]:
    """Settings that hold less, the cheapest first."""
    p = config.parallel
    least: dict[str, Any] = {}
    if training:
        yield {}
        modes = ("none", "selective", "block")
        for mode in modes[modes.index(model.recompute) + 1 :]:
            least = {"model.recompute": mode}
            yield dict(least)
    spread = [{**least, "parallel.zero": zero} for zero in range(p.zero + 1, 4)]
    spread = spread if (p.dp or 1) > 1 else []
    yield from map(dict, spread)
    for factor in (2, 4, 8, 16):
        for less in (least, *spread[-1:]):
            yield {**less, "parallel.tp": p.tp * factor}
            yield {**less, "parallel.pp": p.pp * factor}


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    updated = {s: getattr(config, s).model_copy(update=keys) for s, keys in sections.items()}
    return config.model_copy(update=updated)


def _said(changes: dict[str, Any], training: bool) -> str:
    if training:
        return " ".join(f"{name}={value}" for name, value in changes.items())
    # a trained model is opened with options of its own
    return " ".join(f"--{name.partition('.')[2]} {value}" for name, value in changes.items())


@contextlib.contextmanager
def explained(
    config: RunConfig, model: ModelConfig, context: ParallelContext, training: bool = True
) -> Iterator[None]:
    """Where a GPU's memory does not suffice meanwhile, say what is needed, and what would fit.

    Args:
        config, model, training: as estimate's; the mesh's sizes are the context's.

    Raises:
        CupytronError: in place of CuPy's error.
    """
    device: Any = context.device
    try:
        yield
    except Exception as error:
        if not device.gpu or not backend.is_shortage(error):
            raise
        parallel = config.parallel.model_copy(update=context.sizes)
        config = config.model_copy(update={"parallel": parallel})
        used, free = device.used_bytes(), device.free_bytes()
        asked = re.search(r"allocating ([\d,]+) bytes", str(error))
        more = f"{size(int(asked[1].replace(',', '')))} more were asked for; " if asked else ""
        raise CupytronError(
            f"out of memory on {device.name}: {more}of its {size(device.memory)} this process holds "
            f"{size(used)} and {size(free)} are free. By estimate a rank needs "
            f"{estimate(config, model, training)}; {advice(config, model, used + free, training)}"
        ) from error
