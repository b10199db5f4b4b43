"""Choose the fastest functions for a configuration, before it is trained."""

import numpy as np

from cupytron.comm import Communicator
from cupytron.config import RunConfig
from cupytron.kernels import candidates
from cupytron.kernels.autotune import RuntimeAutoTuner
from cupytron.mesh_run import open_mesh
from cupytron.progress import Note, unwatched
from cupytron.trainer import Trainer


def tune(
    config: RunConfig,
    vocab_size: int | None = None,
    world: Communicator | None = None,
    note: Note = unwatched,
) -> RuntimeAutoTuner:
    """Run one step on random tokens, and try all candidates on what comes by. Collective over `world`.

    Everything is measured anew, whatever earlier runs have left; rank 0 keeps the result for the next ones.

    Args:
        config: the settings; of the global batch one micro-batch a replica is run.
        vocab_size: a data set's, if config.model.vocab_size is not set.
        world: all ranks; None: this process alone.
        note: called before the step, for a watchdog.
    """
    context = open_mesh(config, world)
    train, pp = config.train, context.sizes["pp"]
    # a pipeline needs its micro-batches
    batch = config.global_batch if pp > 1 else train.micro_batch * context.sizes["dp"]
    config = config.model_copy(update={"train": train.model_copy(update={"global_batch": batch})})
    tuner = candidates.make(config, context.device)
    candidates.install(tuner)
    trainer = Trainer(config, vocab_size, context)
    trainer.materialize()
    rng = np.random.default_rng([train.seed, context.coordinates["dp"]])
    shape = (len(trainer.local_sequences), train.sequence_length)
    inputs, targets = rng.integers(0, trainer.model.config.vocab_size, (2, *shape))
    note(0, "trying candidates")
    with tuner.tuning(context.world):
        trainer.train_step(inputs, targets)
    return tuner
