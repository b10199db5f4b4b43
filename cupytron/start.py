"""cupytron.train, which prepares the process first, and imports NumPy and the rest after that."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cupytron.config import RunConfig
from cupytron.errors import ConfigError
from cupytron.process import prepare

if TYPE_CHECKING:
    from cupytron.comm import Communicator
    from cupytron.run import Outcome


def train(
    config: RunConfig,
    out: str | Path,
    on_step: Callable[[dict[str, Any]], Any] | None = None,
    *,
    resume: str = "auto",
    init_from: str | Path | None = None,
    init_checkpoint: str | int = "best",
    quiet: bool = False,
    world: "Communicator | None" = None,
    trace: tuple[int, int] | None = None,
) -> "Outcome":
    """Train a run, or go on with it: `cupytron train` as a function.

    Ctrl-C finishes the step, saves, and returns. The same call goes on from there.

    Args:
        config: the run's settings, from cupytron.load_config; config.data.path names the data set.
        out: the run's folder.
        on_step: called after each step, on every rank, with the step's record; metrics.jsonl has rank 0's.
            Its keys are "step" (from 1), "loss" (nats a token, before the update), "lr", "grad_norm"
            (before clipping), "tokens" (so far), "tokens_per_second" and "elapsed_seconds"; others are in
            docs/python.md. If it returns False, the run saves and stops. If it raises, the run ends at
            once, without a save.
        resume: "auto", or "never": refuse a folder that holds checkpoints.
        init_from: a run whose weights a new run starts from; give it to load_config, too.
        init_checkpoint: which of that run's: "best" (the last if none was evaluated), "last" or a step.
        quiet: print nothing.
        world: the ranks of the run; None: all processes that a launcher started.
        trace: (first, last): write what happens in steps first <= step < last to trace.json in `out`.

    Returns: exit_code (0: finished, or stopped by on_step; 130 and 75: stopped by Ctrl-C or another
        signal), step (how many are done), val_loss (None: not evaluated at this step).

    Raises:
        CupytronError, DataError: settings, data or checkpoints that cannot be used.
        NotFinite: the loss is not finite; the last good checkpoint is named.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"config is of type {type(config).__name__}; give what cupytron.load_config returns"
        )
    environment = prepare_process(config)
    # these import NumPy, so they come after the preparation
    from cupytron import run
    from cupytron.comm import open_world

    def begin(ranks: "Communicator") -> "Outcome":
        return run.train(
            config,
            out,
            environment,
            resume,
            init_from,
            quiet,
            ranks,
            trace,
            init_checkpoint=init_checkpoint,
            on_step=on_step,
        )

    if world is not None:
        return begin(world)
    with open_world() as everyone:
        return begin(everyone)


def prepare_process(config: RunConfig) -> dict[str, Any]:
    """Prepare the process as the settings say; returns process.prepare's record of it."""
    parallel = config.parallel
    return prepare(
        parallel.threads, parallel.blas_kernel, parallel.malloc, config.train.deterministic
    )
