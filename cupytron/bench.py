"""How long a step takes, on random tokens."""

import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cupytron import progress
from cupytron.comm import Communicator
from cupytron.config import RunConfig
from cupytron.memory import explained
from cupytron.mesh_run import open_mesh
from cupytron.metrics import both_flops, gflops, mfu, peak_memory_bytes, total_peak
from cupytron.process import note_loaded_blas
from cupytron.progress import Note, unwatched
from cupytron.trainer import Trainer

WARMUP = 3  # steps that are not counted: first allocations, page faults
# kernels are chosen in the first step, graphs are recorded in the fourth at the latest
GPU_WARMUP = 5


def measure(
    config: RunConfig,
    steps: int,
    environment: dict[str, Any],
    vocab_size: int | None = None,
    world: Communicator | None = None,
    note: Note = unwatched,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """Train `steps` steps on random tokens and say how long one takes. Collective over `world`.

    Args:
        config: the settings. environment: process.prepare's record.
        vocab_size: a data set's, if config.model.vocab_size is not set.
        world: all ranks; None: this process alone.
        note: called before each step, for a watchdog.
        peak_tflops: TFLOP/s that one GPU can do, or a rank on a CPU; None: what is known of the card.

    Returns: ms_per_step (median), ms_per_step_min, tokens_per_second, gflops_per_second (attention
        counted whole) and gflops_per_second_causal, mfu and mfu_causal (None where the peak is not known),
        peak_memory_bytes (of the process that held most; of its GPU, if it has one), parameters, steps,
        ranks, device, bytes_sent (a step, by axis and operation, of this rank), environment.
    """
    note_loaded_blas(environment)
    context = open_mesh(config, world)
    device = context.device
    environment.update(device.versions())
    trainer = Trainer(config, vocab_size, context)
    model = trainer.model.config
    rng = np.random.default_rng([config.train.seed, context.coordinates["dp"]])
    shape = (2, len(trainer.local_sequences), config.train.sequence_length)
    warmup = GPU_WARMUP if device.gpu else WARMUP

    def batches() -> Iterator[np.ndarray]:
        for number in range(warmup + steps):
            note(0, "measuring")
            progress.count(number, warmup + steps, "steps")
            batch = rng.integers(0, model.vocab_size, shape)
            for group in context.groups:
                group.bytes.clear()
            yield batch

    with explained(config, model, context):
        trainer.materialize()
        seconds = list(_seconds(trainer, batches(), ahead=device.gpu))[warmup:]
    if refused := device.refusals():
        environment["cudnn_refused"] = refused
    median = statistics.median(seconds)
    rate = config.tokens_per_step / median
    flops = both_flops(model, config.train.sequence_length)
    return {
        "ms_per_step": median * 1e3,
        "ms_per_step_min": min(seconds) * 1e3,
        "tokens_per_second": rate,
        **gflops(rate, flops),
        **mfu(rate, flops, total_peak(context, config, peak_tflops)),
        "peak_memory_bytes": max(context.world.gather_objects(peak_memory_bytes(device))),
        "parameters": model.num_parameters(),
        "steps": steps,
        "ranks": context.world.size,
        "device": device.name,
        "bytes_sent": {group.axis: dict(group.bytes) for group in context.groups},
        "environment": environment,
    }


def _seconds(trainer: Trainer, batches: Iterable[Any], ahead: bool) -> Iterator[float]:
    """Of each step: from its start, or the end of the one before it, to where its numbers are heard.

    Args:
        ahead: start a step before the numbers of the last one are heard, as a run on a GPU does.
    """
    waiting: list[Any] = []
    heard = 0.0
    for inputs, targets in batches:
        began = time.perf_counter()
        waiting.append((began, trainer.start_step(inputs, targets)))
        while len(waiting) > ahead:
            began, numbers = waiting.pop(0)
            numbers()
            now = time.perf_counter()
            yield now - max(began, heard)
            heard = now
    for began, numbers in waiting:
        numbers()
        yield time.perf_counter() - max(began, heard)
