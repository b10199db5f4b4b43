"""Same numbers on any mesh? Trains on one process and on a mesh, and compares after every step.

Compared are the loss, every gradient and every weight (in float32 less what AdamW makes of rounding); the
one process is held against finite differences. Every parameter is moved off its initial value first,
since biases of zero hide mistakes, and targets that do not count are spread unevenly, since equal numbers
of them hide wrong means.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cupytron import ops, optim
from cupytron.backend import to_host
from cupytron.comm import Communicator, ParallelContext, SelfCommunicator, run_ranks
from cupytron.config import ParallelConfig, RunConfig
from cupytron.errors import ConfigError, CupytronError
from cupytron.layer import Init, Layer
from cupytron.mesh_run import open_mesh
from cupytron.ops import philox
from cupytron.own_model import OwnModel, OwnTrainer
from cupytron.parallel import drift
from cupytron.parallel.pipeline import cut
from cupytron.progress import Note, unwatched
from cupytron.trainer import Trainer

TOLERANCE = {"float64": 1e-10, "float32": 1e-3}
GRADIENT_TOLERANCE = 1e-6  # of the one process, against finite differences
MOVES = (1e-3, 1e-4, 1e-5)  # lengths of the step through all weights at once of finite differences
SMALLEST = 1e-12  # what an error is relative to, at least


class Difference(NamedTuple):
    """The largest error of one tensor at one step: max|a - b| / max(max|b|, 1e-12)."""

    error: float
    step: int
    what: str  # "loss", "gradient" or "weight"
    tensor: str


class Report(NamedTuple):
    """What verify found; the same on every rank.

    differences: of every tensor, the largest first. tolerance: what they may be; 0 is bit for bit.
    gradient_error: of the one process against finite differences; None in float32.
    replicas_equal: whether all tensors have the same bits as their copies on other ranks (see
        parallel/drift.py).
    groups_right: whether the ranks of each axis differ along that axis alone.
    """

    differences: list[Difference]
    tolerance: float
    gradient_error: float | None
    replicas_equal: bool
    groups_right: bool

    @property
    def largest(self) -> float:
        """The largest error."""
        return self.differences[0].error

    @property
    def ok(self) -> bool:
        """Whether the mesh gives the numbers of one process, and these are right."""
        gradient = self.gradient_error is None or self.gradient_error <= GRADIENT_TOLERANCE
        # written so that NaN fails
        same = self.replicas_equal and self.groups_right
        return self.largest <= self.tolerance and gradient and same


class Step(NamedTuple):
    """What one process has after a step: loss, gradients (of the step) and weights by name."""

    loss: float
    gradients: dict[str, Any]
    weights: dict[str, Any]


class Reference(NamedTuple):
    """A run on one process."""

    steps: list[Step]
    gradient_error: float | None


def reference(
    config: RunConfig, steps: int, note: Note = unwatched, own: OwnModel | None = None
) -> Reference:
    """Train on one process. config.model.vocab_size is set."""
    trainer = _trainer(one_process(config), open_mesh(one_process(config)), own)
    error = _gradient_error(trainer) if config.train.dtype == "float64" else None
    done = []
    for _ in range(steps):
        note(trainer.step, "on one process")
        batch = _batch(trainer)
        loss = trainer.compute_gradients(*batch)
        gradients = {
            parameter.name: to_host(bucket.gradient[start:stop]).reshape(parameter.shape).copy()
            for bucket in trainer.zero.buckets
            for parameter, start, stop in bucket.segments
        }
        trainer.apply_gradients()
        weights = {n: to_host(p.data).copy() for n, p in trainer.model.named_parameters()}
        done.append(Step(loss, gradients, weights))
    return Reference(done, error)


def one_process(config: RunConfig) -> RunConfig:
    """The same training without a mesh."""
    # nothing of the mesh is kept, so that all meshes share one reference; nor what is recomputed
    model = config.model.model_copy(update={"recompute": "none"})
    same = config.parallel
    alone = ParallelConfig(dp=1, device=same.device, graphs=same.graphs, autotune=same.autotune)
    return config.model_copy(update={"parallel": alone, "model": model})


def compare(
    config: RunConfig,
    context: ParallelContext,
    one: Reference,
    note: Note = unwatched,
    own: OwnModel | None = None,
) -> Report:
    """Train on the mesh, step by step beside the reference. Collective over context.world."""
    trainer = _trainer(config, context, own)
    found: dict[tuple[str, str], Difference] = {}
    replicas_equal, slack = True, 0.0
    for number, expected in enumerate(one.steps, start=1):
        note(trainer.step, "on the mesh")
        loss = trainer.compute_gradients(*_batch(trainer))
        error = _error(np.array(loss), np.array(expected.loss), np.array(expected.loss))
        _note(found, number, "loss", "loss", error)
        for name, mine, same, whole in _held(trainer, "gradient", expected.gradients):
            _note(found, number, "gradient", name, _error(mine, same, whole))
        trainer.apply_gradients()
        slack += _rounding_moves(trainer)
        for name, mine, same, whole in _held(trainer, "weights", expected.weights):
            _note(found, number, "weight", name, _error(mine, same, whole, slack))
        replicas_equal &= not drift.differences(trainer.zero)
    everyone = context.world.gather_objects((found, replicas_equal, _groups_right(context)))
    worst: dict[tuple[str, str], Difference] = {}
    for theirs, _, _ in everyone:
        for key, difference in theirs.items():
            if key not in worst or _worse(difference.error, worst[key].error):
                worst[key] = difference
    exact = config.train.deterministic and context.tp.size == 1
    return Report(
        sorted(worst.values(), key=lambda d: -np.inf if np.isnan(d.error) else -d.error),
        0.0 if exact else TOLERANCE[config.compute_dtype],
        one.gradient_error,
        all(equal for _, equal, _ in everyone),
        all(right for _, _, right in everyone),
    )


def _trainer(config: RunConfig, context: ParallelContext, own: OwnModel | None) -> Trainer:
    trainer = OwnTrainer(own, config, context) if own else Trainer(config, None, context)
    shake(trainer.model)
    trainer.materialize()
    return trainer


def shake(model: Layer, size: float = 0.1) -> None:
    """Give every parameter an initial value that is off its usual one."""

    def shaken(init: Init) -> Init:
        def values(shape: Any, box: Any, seed: int, name: str) -> np.ndarray:
            noise = philox.normal(shape, box, philox.key_of(seed, "verify", name))
            return init(shape, box, seed, name) + size * noise

        return values

    for _, parameter in model.named_parameters():
        parameter.init = shaken(parameter.init)


def _batch(trainer: Trainer) -> tuple[Any, Any]:
    """This replica's part of a step's random tokens; the later a sequence, the fewer targets count."""
    config, vocab = trainer.config, trainer.vocab_size
    rng = np.random.default_rng([config.train.seed, trainer.step])
    shape = (config.global_batch, config.train.sequence_length)
    inputs, targets = rng.integers(0, vocab, (2, *shape))
    ignored = rng.random(shape) < np.linspace(0, 0.9, shape[0])[:, None]
    targets[ignored] = ops.IGNORE
    mine = trainer.local_sequences
    return inputs[mine], targets[mine]


def _held(
    trainer: Trainer, kind: str, whole: dict[str, Any]
) -> Iterator[tuple[str, Any, Any, Any]]:
    """What this rank holds of each tensor, the same elements of the reference, and that as a whole."""
    for bucket in trainer.zero.buckets:
        # all of the weights where they are here, so that a replica that missed an update is seen
        everything = kind == "weights" and bucket.data is not None
        within = slice(0, bucket.size) if everything else bucket.owned
        flat = bucket.data if everything else getattr(bucket, kind)
        for parameter, inside, place in bucket.parts(within):
            mine = to_host(flat[place] if everything else flat[bucket.local(place)])
            expected = whole[parameter.name]
            yield parameter.name, mine, expected[parameter.box].reshape(-1)[inside], expected


def _error(mine: Any, same: Any, whole: Any, slack: float = 0.0) -> float:
    """max|mine - same| beyond the slack, relative to the largest of the whole tensor."""
    difference = float(abs(mine - same).max())
    # max(0, NaN) would be 0
    difference = difference - slack if difference > slack or np.isnan(difference) else 0.0
    return difference / max(float(abs(whole).max()), SMALLEST)


def _rounding_moves(trainer: Trainer) -> float:
    """How far apart a step may bring two weights whose gradients differ by rounding alone.

    AdamW divides a gradient by its own size. Where the true one is zero (a key's bias: softmax does not see
    it) that is rounding, and each mesh may take a step of the learning rate in another direction.
    """
    config, train = trainer.config, trainer.config.train
    if train.dtype == "float64" or train.deterministic or config.optim.name != "adamw":
        return 0.0
    return 2 * optim.learning_rate(config, trainer.step - 1)


def _note(found: dict, step: int, what: str, tensor: str, error: float) -> None:
    before = found.get((what, tensor))
    if before is None or _worse(error, before.error):
        found[what, tensor] = Difference(error, step, what, tensor)


def _worse(a: float, b: float) -> bool:
    return a > b or bool(np.isnan(a) and not np.isnan(b))


def _groups_right(context: ParallelContext) -> bool:
    """Whether each group has the ranks that differ from this one along its axis alone, in their order."""
    right = True
    for axis, group in (("tp", context.tp), ("dp", context.dp), ("pp", context.pp)):
        places = group.gather_objects((context.coordinates, context.world.rank))
        wanted = [{**context.coordinates, axis: i} for i in range(context.sizes[axis])]
        right &= [place for place, _ in places] == wanted
        right &= len({rank for _, rank in places}) == len(places)
    return right


def _gradient_error(trainer: Trainer) -> float:
    """Relative error of one process's gradient along a random direction, against finite differences."""
    inputs, targets = _batch(trainer)
    trainer.compute_gradients(inputs, targets)
    buckets = trainer.zero.buckets
    rng = np.random.default_rng(trainer.config.train.seed)
    directions = [trainer.context.device.put(rng.normal(size=b.size)) for b in buckets]
    got = sum(float(b.gradient @ d) for b, d in zip(buckets, directions, strict=True))
    trainer.zero.clear_gradients()

    def move(t: float) -> None:
        for bucket, direction in zip(buckets, directions, strict=True):
            bucket.weights += t * direction

    def at(t: float) -> float:
        move(t)
        loss = _loss(trainer, inputs, targets)
        move(-t)
        return loss

    # where the loss bends sharply (a norm over two features) a step must be short; where it is nearly
    # straight, rounding asks for a long one: a gradient that is right agrees with one of them
    before = [bucket.weights.copy() for bucket in buckets]
    error = math.inf
    for length in MOVES:
        # Richardson's combination of two central differences: error O(step^4)
        step = length / math.sqrt(sum(bucket.size for bucket in buckets))
        fine, coarse = ((at(h) - at(-h)) / (2 * h) for h in (step, 2 * step))
        for bucket, weights in zip(buckets, before, strict=True):
            bucket.weights[...] = weights
        want = (4 * fine - coarse) / 3
        error = min(error, abs(got - want) / max(abs(want), SMALLEST))
        if error < GRADIENT_TOLERANCE / 10:
            break
    return error


def _loss(trainer: Trainer, inputs: Any, targets: Any) -> float:
    """The step's loss, forward only, with the step's dropout."""
    train = trainer.config.train
    work = cut(inputs, targets, train.micro_batch, step=trainer.step, seed=train.seed)
    scale = 1 / max(1, int((targets != ops.IGNORE).sum()))
    losses = trainer.zero.pipeline.losses(work, scale, training=False)
    return sum(float(loss) for loss in losses)


def run(
    config: RunConfig,
    steps: int = 3,
    world: Communicator | None = None,
    found: dict[Any, Reference] | None = None,
    note: Note = unwatched,
    own: OwnModel | None = None,
) -> Report:
    """Train on one process and on the mesh, and compare.

    Args:
        config: with the mesh's sizes and model.vocab_size set.
        steps: to train.
        world: the ranks, each of which calls this and trains the one-process run too; alone (or None)
            the mesh's ranks are threads.
        found: references by what they depend on; kept and used again for other meshes.
        note: called before each step with its number and a phrase.
        own: a user's model to train; None: the Transformer of config.model.

    Returns: the same report on every rank.

    Raises:
        CupytronError: the mesh does not fit the model, the batch or the world.
    """
    found = {} if found is None else found
    if config.compute_dtype not in TOLERANCE:
        raise ConfigError(
            f"train.compute_dtype={config.compute_dtype}: it is rounded otherwise on each mesh, and verify "
            "compares digits; leave it out, or give float32 or float64"
        )
    parallel = config.parallel
    size = parallel.ranks
    world = world or SelfCommunicator()
    if world.size > 1 and size > world.size:
        raise CupytronError(
            f"tp={parallel.tp} x pp={parallel.pp} x dp={parallel.dp} needs {size} ranks; there are "
            f"{world.size}"
        )
    key = (one_process(config), steps)
    if key not in found:
        found[key] = reference(config, steps, note, own)
    if world.size == 1:
        timeout = parallel.timeout or 10.0**7
        reports = run_ranks(
            size, lambda ranks: _compare(config, ranks, found[key], unwatched, own), timeout
        )
        return reports[0]
    # a case may need fewer ranks than there are
    group = world.split(int(world.rank >= size), world.rank, "world")
    report = _compare(config, group, found[key], note, own) if world.rank < size else None
    group.close()
    return world.gather_objects(report if world.rank == 0 else None)[0]


def _compare(
    config: RunConfig, world: Communicator, one: Reference, note: Note, own: OwnModel | None
) -> Report:
    context = open_mesh(config, world)
    try:
        return compare(config, context, one, note, own)
    finally:
        context.close()
