"""Whole runs: from GPU to CPU and back, sampling, out of memory, and ranks that share the GPU."""

import contextlib
import functools
import gc
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from gpu_children import Json, hold
from gpu_model_checks import FULL, losses_of, trainer_on
from gpu_model_checks import TINY as TINY_MODEL
from gpu_report import Gpu

from cupytron import backend

RUN = [
    "model.num_layers=2",
    "model.num_heads=4",
    "model.d_model=64",
    "train.sequence_length=32",
    "train.micro_batch=4",
    "train.global_batch=8",
    "train.eval_interval=5",
    "optim.schedule=constant",
    "optim.warmup_steps=3",
    "checkpoint.interval=5",
    "parallel.blas_kernel=off",
    "parallel.autotune=off",
]
TINY = [*RUN, "model.num_layers=1", "model.d_model=16", "train.sequence_length=8"]
# losses of ten steps, in float32: rounding (1e-7), which AdamW makes steps of the learning rate (1e-3) of
# where a gradient is zero
SAME_LOSS = 1e-3
SAME_LOGITS = 1e-4  # of the largest, in float32
MOVES = {
    "GPU to CPU": ("cuda", "cpu"),
    "CPU to GPU": ("cpu", "cuda"),
    "GPU alone": ("cuda", "cuda"),
}


def _text(gpu: Gpu) -> str:
    lines = (f"the {n} quick brown foxes jump over {n * n} lazy dogs.\n" for n in range(400))
    return "".join(lines)[: gpu.size(20000, 800)]


def prepared(gpu: Gpu, folder: Path) -> Path:
    """A data set of characters."""
    from cupytron.data import prepare_dataset

    source = folder / "text.txt"
    source.write_text(_text(gpu))
    prepare_dataset([str(source)], folder / "data", tokenizer="char", val_fraction=0.1)
    return folder / "data"


def train(gpu: Gpu, data: Path, out: Path, device: str, steps: int) -> None:
    """Train up to so many steps on a device, going on with what is there."""
    from cupytron import process
    from cupytron.config import load_config
    from cupytron.run import train

    overrides = [*gpu.size(RUN, TINY), f'data.path="{data}"', f"train.max_steps={steps}"]
    config = load_config(overrides=[*overrides, f"parallel.device={device}"])
    environment = process.prepare(blas_kernel="off", malloc=False)
    train(config, out, environment, quiet=True)


def _losses(out: Path) -> tuple[list[float], list[float]]:
    """Training and validation losses in their order."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (
        [record["loss"] for record in records if "loss" in record],
        [record["val_loss"] for record in records if "val_loss" in record],
    )


def moves(gpu: Gpu) -> Json:
    """Five steps on one device and five on the other give the losses of ten on the CPU."""
    found: Json = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepared(gpu, folder)
        train(gpu, data, folder / "cpu", "cpu", 10)
        wanted = _losses(folder / "cpu")
        for number, (move, devices) in enumerate(MOVES.items()):
            out = folder / str(number)
            for device, steps in zip(devices, (5, 10), strict=True):
                train(gpu, data, out, device, steps)
            mine = _losses(out)
            counts = [len(x) for x in (*mine, *wanted)]
            hold(counts[:2] == counts[2:], f"{move}: {counts} losses", found)
            away = [np.abs(np.subtract(a, b)).max() for a, b in zip(mine, wanted, strict=True)]
            found[move] = float(max(away))
    wrong = [move for move in MOVES if not found[move] <= SAME_LOSS]
    hold(not wrong, f"other losses: {', '.join(wrong)}", found)
    return found


def sampling(gpu: Gpu) -> Json:
    """Tokens and logits with a KV cache are those without, beyond the context's length, too."""
    from cupytron import load
    from cupytron.config import load_config
    from cupytron.generate import Decoder, generate
    from cupytron.mesh_run import open_mesh

    count = gpu.size(60, 12)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(gpu, prepared(gpu, folder), folder / "run", "cuda", 10)
        texts, logits = {}, {}
        for device in ("cuda", "cpu"):
            context = open_mesh(load_config(overrides=[f"parallel.device={device}"]))
            trained = load(folder / "run", "last", context=context)
            for cache in (True, False):
                options = {"use_cache": cache, "pipeline": trained.pipeline}
                drawn = list(generate(trained.model, [1, 2, 3], count, seed=5, **options))
                texts[device, cache] = drawn
                logits[device, cache] = Decoder(trained.model, **options).logits([1, 2, 3, *drawn])
    wanted = logits["cpu", False]
    found: Json = {
        f"{device}{' cached' if cache else ''}": float(
            np.abs(x - wanted).max() / np.abs(wanted).max()
        )
        for (device, cache), x in logits.items()
    }
    found["tokens"] = count
    found["the CPU's text"] = texts["cuda", True] == texts["cpu", True]
    hold(texts["cuda", True] == texts["cuda", False], "the cache changes the text", found)
    if found["the CPU's text"]:  # else the logits are those of different texts
        hold(max(found["cuda"], found["cuda cached"]) <= SAME_LOGITS, "other logits", found)
    return found


@contextlib.contextmanager
def _little_memory(gpu: Gpu, count: int) -> Iterator[None]:
    """The device has so many bytes left."""
    if gpu.simulated:
        with gpu.cupy.sim.limited(count):
            yield
        return
    runtime = gpu.cupy.cuda.runtime
    gc.collect()  # a pool that runs short does so, and would find what trainers before this one have held
    gpu.cupy.get_default_memory_pool().free_all_blocks()
    ballast = runtime.malloc(max(1, runtime.memGetInfo()[0] - count))
    try:
        yield
    finally:
        runtime.free(ballast)


def out_of_memory(gpu: Gpu) -> Json:
    """A batch that does not fit ends with one line, which says what to do."""
    batch, width = gpu.size((64, 512), (16, 16))
    flags = f"--micro-batch {batch} --sequence-length {gpu.size(512, 16)} --d-model {width} --num-layers 2"
    words = ["bench", "--steps", "1", "--device", "cuda", *flags.split(), "--autotune", "off"]
    with _little_memory(gpu, gpu.size(512 << 20, 1 << 20)):
        code, _, error = command([*words, "--set", "model.vocab_size=1000", "--blas-kernel", "off"])
    lines = error.strip().splitlines()
    found = {"exit_code": code, "said": lines[-1] if lines else ""}
    right = code == 1 and "out of memory" in found["said"] and "micro_batch" in found["said"]
    hold(right and "Traceback" not in error, f"exit code {code}: {error[-300:]}", found)
    return found


def recording_in_little_memory(gpu: Gpu) -> Json:
    """Where memory runs short while a step is recorded, there is an error, or the losses are right."""
    steps = gpu.size(6, 4)
    settings = gpu.size(
        [*FULL, "model.d_model=512", "train.micro_batch=32", "train.global_batch=32"],
        [*TINY_MODEL, "train.micro_batch=8", "train.global_batch=8"],
    )
    wanted, total = _with_pools(settings, steps)
    found: Json = {"bytes": total}
    for percent in (95, 90, 80, 70, 60, 50, 35):
        try:
            with _little_memory(gpu, total * percent // 100):
                losses, _ = _with_pools(settings, steps)
        except Exception as error:
            short = backend.is_shortage(error) or "out of memory" in str(error)
            hold(short, f"at {percent}%: {type(error).__name__}: {error}", found)
            found[f"{percent}%"] = "out of memory"
            continue
        found[f"{percent}%"] = "trained" if losses == wanted else "wrong losses"
        hold(losses == wanted, f"wrong losses in {percent}% of the memory", found)
    return found


def _with_pools(settings: list[str], steps: int) -> tuple[list[float], int]:
    """Losses of a trainer whose steps are recorded, and bytes of the memory that is kept for these."""
    trainer = trainer_on("cuda", settings)
    losses = losses_of(trainer, steps)
    return losses, sum(graph.pool.total_bytes() for graph in trainer.context.device.graphs)


def command(words: list[str]) -> tuple[int, str, str]:
    """Run a command of cupytron in this process: exit code, output, errors."""
    from cupytron.cli.main import run

    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            run(words)
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue(), error.getvalue()
    raise AssertionError("a command always exits")


def checks(gpu: Gpu) -> dict[str, Callable[[], Json]]:
    """Checks of runs in one process, by name."""
    return {
        "moves": functools.partial(moves, gpu),
        "sampling": functools.partial(sampling, gpu),
    }


def memory_checks(gpu: Gpu) -> dict[str, Callable[[], Json]]:
    """Checks that leave the device without memory for anybody else, by name."""
    return {
        "recording in little memory": functools.partial(recording_in_little_memory, gpu),
        "out of memory": functools.partial(out_of_memory, gpu),
    }
