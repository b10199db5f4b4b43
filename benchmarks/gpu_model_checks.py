"""Whole models on the GPU against the CPU: gradients, loss curves, replayed steps; no step waits."""

import functools
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gpu_children import Json, hold
from gpu_report import Gpu
from gpu_timing import busy

FAMILIES = {
    "gpt2": ["model.family=gpt2"],
    "llama": ["model.family=llama", "model.num_kv_heads=2", "model.tied=false"],
}
FULL = [
    "model.num_layers=4",
    "model.num_heads=4",
    "model.d_model=128",
    "model.vocab_size=64",
    "train.sequence_length=64",
    "train.micro_batch=8",
    "train.global_batch=16",
    "optim.warmup_steps=20",
    "optim.lr=2e-3",
    "parallel.autotune=off",
]
TINY = [
    *FULL,
    "model.num_layers=1",
    "model.d_model=32",
    "model.vocab_size=16",
    "train.sequence_length=8",
    "train.micro_batch=2",
    "train.global_batch=4",
    "optim.warmup_steps=2",
]
# How far a mean over the last 50 steps may be from the CPU's in float32, and any single step. On one CPU
# float32 and float64 are 1e-8 and 2e-7 apart, float16 and float32 4e-6 and 2e-4, bfloat16 and float32 5e-5
# and 2e-3; the GPU adds in other orders, and has other functions: ten times as much, float32 a thousand.
CURVES = {"float32": (1e-5, 2e-4), "bfloat16": (5e-4, 2e-2), "float16": (1e-4, 2e-3)}
# Of the norm of all gradients. On a CPU, with the same roundings, these are 0.8% and 0.1% away.
HALF_GRADIENTS = {"bfloat16": 3e-2, "float16": 4e-3}
ROUNDING = 1e-5  # what a kernel may be wrong by in float32, and so a gradient in any case


def trainer_on(device: str, settings: list[str]) -> Any:
    """A trainer, its weights off their initial values, whose functions are those in ops from now on."""
    from cupytron import verify
    from cupytron.config import load_config
    from cupytron.mesh_run import open_mesh
    from cupytron.trainer import Trainer

    config = load_config(overrides=[*settings, f"parallel.device={device}"])
    trainer = Trainer(config, None, open_mesh(config))
    verify.shake(trainer.model, 0.02)
    trainer.materialize()
    return trainer


def settings_of(gpu: Gpu, *more: str) -> list[str]:
    return [*gpu.size(FULL, TINY), *more]


def batches(trainer: Any, steps: int) -> Iterator[tuple[Any, Any]]:
    """Text of a random grammar, in which each token has four successors: there is something to learn."""
    config, vocab = trainer.config, int(trainer.model.config.vocab_size)
    rng = np.random.default_rng(17)
    successors = rng.integers(0, vocab, (vocab, 4))
    shape = (config.global_batch, config.train.sequence_length + 1)
    for _ in range(steps):
        text = np.empty(shape, np.int64)
        text[:, 0] = rng.integers(0, vocab, shape[0])
        for i in range(1, shape[1]):
            text[:, i] = successors[text[:, i - 1], rng.integers(0, 4, shape[0])]
        yield np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])


def gradients_of(trainer: Any) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of a step, in float64 on the host."""
    from cupytron.backend import to_host

    loss = trainer.compute_gradients(*next(batches(trainer, 1)))
    return loss, {
        parameter.name: to_host(bucket.gradient[start:stop]).astype(np.float64)
        for bucket in trainer.zero.buckets
        for parameter, start, stop in bucket.segments
    }


def gradients(gpu: Gpu, family: str) -> Json:
    """Loss and each gradient in float32: at most five times as wrong as the CPU's float32.

    Both add up the same products in other orders, so that their errors are of one size.
    """
    base = settings_of(gpu, *FAMILIES[family])
    loss, exact = gradients_of(trainer_on("cpu", [*base, "train.dtype=float64"]))
    theirs, mine = (gradients_of(trainer_on(device, base)) for device in ("cpu", "cuda"))

    def worst(found: dict[str, np.ndarray]) -> tuple[float, str]:
        errors = {
            name: np.abs(found[name] - g).max() / max(np.abs(g).max(), 1e-12)
            for name, g in exact.items()
        }
        name = max(errors, key=lambda n: math.inf if math.isnan(errors[n]) else errors[n])
        return float(errors[name]), name

    error, name = worst(mine[1])
    limit = max(ROUNDING, 5 * worst(theirs[1])[0])
    found = {
        "error": error,
        "at": name,
        "limit": limit,
        "loss_error": abs(mine[0] - loss) / abs(loss),
    }
    hold(error <= limit and found["loss_error"] <= 1e-5, f"gradient of {name}: {error:.1e}", found)
    for dtype, allowed in HALF_GRADIENTS.items():
        _, rounded = gradients_of(trainer_on("cuda", [*base, f"train.compute_dtype={dtype}"]))
        scale = (
            _flat(exact) @ _flat(rounded) / (_flat(rounded) @ _flat(rounded))
        )  # float16's loss scale
        distance = np.linalg.norm(scale * _flat(rounded) - _flat(exact)) / np.linalg.norm(
            _flat(exact)
        )
        found[dtype] = float(distance)
        hold(found[dtype] <= allowed, f"{dtype}: gradients are {distance:.1e} away", found)
    return found


def _flat(gradients: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([gradients[name].ravel() for name in sorted(gradients)])


def derivative(gpu: Gpu, family: str) -> Json:
    """The gradient along a random direction against finite differences, all in float64 on the GPU."""
    from cupytron import verify
    from cupytron.config import load_config

    overrides = [*settings_of(gpu, *FAMILIES[family]), "train.dtype=float64", "model.dropout=0.1"]
    config = load_config(overrides=[*overrides, "parallel.device=cuda", "parallel.dp=1"])
    found = {
        "error": verify.reference(config, 1).gradient_error,
        "limit": verify.GRADIENT_TOLERANCE,
    }
    hold(found["error"] <= found["limit"], f"directional derivative: {found['error']:.1e}", found)
    return found


def losses_of(trainer: Any, steps: int) -> list[float]:
    """Of so many steps, each heard of when the next one has been started, as in a run."""
    losses, before = [], None
    for batch in batches(trainer, steps):
        started = trainer.start_step(*batch)
        if before is not None:
            losses.append(before().loss)
        before = started
    return [*losses, before().loss]


def curves(gpu: Gpu, family: str) -> Json:
    """Losses of 200 steps on the GPU in three precisions, beside the CPU's in float32."""
    steps = gpu.size(200, 8)
    base = settings_of(gpu, *FAMILIES[family], f"train.max_steps={steps}")
    cpu = np.array(losses_of(trainer_on("cpu", base), steps))
    found: Json = {"first": cpu[0], "last": float(cpu[-10:].mean())}
    problems = []
    if not gpu.tiny and found["last"] > 0.7 * found["first"]:
        problems.append("the CPU has learned nothing")
    for dtype, (of_mean, of_step) in CURVES.items():
        mine = losses_of(trainer_on("cuda", [*base, f"train.compute_dtype={dtype}"]), steps)
        away = np.array(mine) - cpu
        last = abs(float(away[-max(1, steps // 4) :].mean()))
        found |= {f"{dtype} last": last, f"{dtype} most": float(np.abs(away).max())}
        if not (last <= of_mean and found[f"{dtype} most"] <= of_step):
            problems.append(
                f"{dtype}: {last:.3f} away at the end, {found[f'{dtype} most']:.3f} at most"
            )
    hold(not problems, "; ".join(problems), found)
    return found


def overflow(gpu: Gpu) -> Json:
    """float16 from a loss scale that overflows: steps are left out until it fits, and the rest train."""
    steps = gpu.size(30, 12)
    settings = settings_of(gpu, "train.compute_dtype=float16", f"train.loss_scale={2.0**24}")
    trainer = trainer_on("cuda", settings)
    losses, counters = losses_of(trainer, steps), trainer.counters()
    found = {"updates": counters["updates"], "steps": steps, "loss_scale": counters["loss_scale"]}
    right = 0 < found["updates"] < steps and all(map(math.isfinite, losses))
    hold(right, "no step was left out, or all were, or a loss is not finite", found)
    return found


def digest(trainer: Any) -> str:
    """Of weights and optimizer state."""
    from cupytron.backend import to_host

    total = hashlib.sha256()
    for bucket in trainer.zero.buckets:
        for array in (bucket.weights, *bucket.state.values()):
            total.update(to_host(array).tobytes())
    return total.hexdigest()


def replay(gpu: Gpu, family: str, dropout: float) -> Json:
    """Twenty steps with and without CUDA graphs end with the same bits; attention's sums have one order."""
    from cupytron.kernels import cudnn_attention

    steps = gpu.size(20, 6)
    base = settings_of(
        gpu, *FAMILIES[family], "train.compute_dtype=bfloat16", f"model.dropout={dropout}"
    )
    digests, losses = {}, {}
    for graphs in ("true", "false", "true"):
        trainer = trainer_on("cuda", [*base, f"parallel.graphs={graphs}"])
        cudnn_attention.deterministic(True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "CUDA graphs are off")
            heard = losses_of(trainer, steps)
        made = digest(trainer)
        if graphs in digests:
            hold(digests[graphs] == made, "two runs with graphs differ", {"losses": heard})
        digests[graphs], losses[graphs] = made, heard
    found = {"digest": digests["true"][:16], "last_loss": losses["true"][-1]}
    differs = next(
        (
            i + 1
            for i, (a, b) in enumerate(zip(losses["true"], losses["false"], strict=True))
            if a != b
        ),
        "weights",
    )
    same = digests["true"] == digests["false"]
    hold(same, f"graphs on and off differ, first at step {differs}", found)
    return found


@contextmanager
def waits_counted(gpu: Gpu) -> Iterator[dict[str, int]]:
    """How often the host asks for values of arrays, or waits for streams and events, by name."""
    cupy, counts, kept = gpu.cupy, {}, []
    names = ("get", "item", "tolist", "__float__", "__int__", "__bool__")
    watched = [(cupy.ndarray, name) for name in names]
    watched += [(cupy.cuda.Stream, "synchronize"), (cupy.cuda.Event, "synchronize")]

    def counting(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            # a copy that is only started does not wait
            if named.get("blocking", True):
                counts[key] = counts.get(key, 0) + 1
            return function(self, *arguments, **named)

        return call

    for kind, name in watched:
        own = name in vars(kind)
        kept.append((kind, name, vars(kind).get(name), own))
        setattr(kind, name, counting(f"{kind.__name__}.{name}", getattr(kind, name)))
    try:
        yield counts
    finally:
        for kind, name, function, own in kept:
            if own:
                setattr(kind, name, function)
            else:
                delattr(kind, name)


def host_never_waits(gpu: Gpu, graphs: bool) -> Json:
    """A step is started, and the host back, while the GPU still works on something else."""
    settings = settings_of(
        gpu,
        "train.compute_dtype=bfloat16",
        f"parallel.graphs={str(graphs).lower()}",
        "model.dropout=0.1",
    )
    trainer = trainer_on("cuda", settings)
    steps = list(batches(trainer, 6))
    for batch in steps[:5]:  # kernels are compiled, plans made, graphs recorded
        trainer.train_step(*batch)
    device = trainer.context.device
    device.stream.synchronize()
    pending = gpu.cupy.cuda.Event()
    with waits_counted(gpu) as counts:
        busy(gpu, 2.0)
        pending.record(device.stream)
        began = time.perf_counter()
        wait = trainer.start_step(*steps[5])
        seconds = time.perf_counter() - began
        over = bool(pending.done)
    loss = wait().loss
    found = {"waits": sum(counts.values()), "host_ms": seconds * 1e3, "loss": loss}
    hold(not counts, f"the host waits: {counts}", found)
    if not gpu.simulated:  # there work is done when it is started
        hold(not over, f"starting a step took {seconds:.1f} s, as long as the GPU was busy", found)
    return found


def checks(gpu: Gpu) -> dict[str, Callable[[], Json]]:
    """All of this file, by name."""
    made: dict[str, Callable[[], Json]] = {}
    for family in FAMILIES:
        made[f"gradients of {family}"] = functools.partial(gradients, gpu, family)
        made[f"derivative of {family}"] = functools.partial(derivative, gpu, family)
        made[f"curves of {family}"] = functools.partial(curves, gpu, family)
        made[f"replay of {family}"] = functools.partial(replay, gpu, family, 0.0)
    made["replay with dropout"] = functools.partial(replay, gpu, "gpt2", 0.1)
    made["overflow"] = functools.partial(overflow, gpu)
    made["no waiting, eager"] = functools.partial(host_never_waits, gpu, False)
    made["no waiting, graphs"] = functools.partial(host_never_waits, gpu, True)
    return made
