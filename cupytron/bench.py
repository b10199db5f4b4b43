"""How long a step takes, on random tokens."""

import statistics
import time
from typing import Any

import numpy as np

from cupytron.config import RunConfig, flops_per_token
from cupytron.metrics import gflops, peak_memory_bytes
from cupytron.process import note_loaded_blas
from cupytron.trainer import Trainer

WARMUP = 3  # steps that are not counted: first allocations, page faults


def measure(
    config: RunConfig, steps: int, environment: dict[str, Any], vocab_size: int | None = None
) -> dict[str, Any]:
    """Train `steps` steps on random tokens and say how long one takes.

    Args:
        config: the settings. environment: process.prepare's record.
        vocab_size: a data set's, if config.model.vocab_size is not set.

    Returns: ms_per_step (median), ms_per_step_min, tokens_per_second, gflops_per_second (attention
        counted whole) and gflops_per_second_causal, peak_memory_bytes (of the process),
        parameters, steps, environment.
    """
    note_loaded_blas(environment)
    trainer = Trainer(config, vocab_size)
    trainer.materialize()
    model = trainer.model.config
    rng = np.random.default_rng(config.train.seed)
    shape = (config.global_batch, config.train.sequence_length)
    seconds = []
    for _ in range(WARMUP + steps):
        inputs, targets = rng.integers(0, model.vocab_size, (2, *shape))
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
        "peak_memory_bytes": peak_memory_bytes(),
        "parameters": model.num_parameters(),
        "steps": steps,
        "environment": environment,
    }
