"""How long a step takes, on random tokens."""

import statistics
import time
from typing import Any

import numpy as np

from cupytron.comm import Communicator
from cupytron.config import RunConfig, flops_per_token
from cupytron.mesh_run import open_mesh
from cupytron.metrics import gflops, peak_memory_bytes
from cupytron.process import note_loaded_blas
from cupytron.trainer import Trainer
from cupytron.watchdog import Note, unwatched

WARMUP = 3  # steps that are not counted: first allocations, page faults


def measure(
    config: RunConfig,
    steps: int,
    environment: dict[str, Any],
    vocab_size: int | None = None,
    world: Communicator | None = None,
    note: Note = unwatched,
) -> dict[str, Any]:
    """Train `steps` steps on random tokens and say how long one takes. Collective over `world`.

    Args:
        config: the settings. environment: process.prepare's record.
        vocab_size: a data set's, if config.model.vocab_size is not set.
        world: all ranks; None: this process alone.
        note: called before each step, for a watchdog.

    Returns: ms_per_step (median), ms_per_step_min, tokens_per_second, gflops_per_second (attention
        counted whole) and gflops_per_second_causal, peak_memory_bytes (of the process that held most),
        parameters, steps, ranks, bytes_sent (a step, by axis and operation, of this rank), environment.
    """
    note_loaded_blas(environment)
    context = open_mesh(config, world)
    trainer = Trainer(config, vocab_size, context)
    trainer.materialize()
    model = trainer.model.config
    rng = np.random.default_rng([config.train.seed, context.coordinates["dp"]])
    shape = (len(trainer.local_sequences), config.train.sequence_length)
    seconds = []
    for number in range(WARMUP + steps):
        note(number, "measuring")
        inputs, targets = rng.integers(0, model.vocab_size, (2, *shape))
        for group in context.groups:
            group.bytes.clear()
        began = time.perf_counter()
        trainer.train_step(inputs, targets)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[WARMUP:])
    rate = config.tokens_per_step / median
    flops = tuple(flops_per_token(model, shape[1], causal) for causal in (False, True))
    return {
        "ms_per_step": median * 1e3,
        "ms_per_step_min": min(seconds[WARMUP:]) * 1e3,
        "tokens_per_second": rate,
        **gflops(rate, flops),
        "peak_memory_bytes": max(context.world.gather_objects(peak_memory_bytes())),
        "parameters": model.num_parameters(),
        "steps": steps,
        "ranks": context.world.size,
        "bytes_sent": {group.axis: dict(group.bytes) for group in context.groups},
        "environment": environment,
    }
