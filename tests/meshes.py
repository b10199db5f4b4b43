"""Small models on meshes of threads, for the tests that compare them with one process."""

from cupytron import verify
from cupytron.comm import ParallelContext, run_ranks
from cupytron.config import load_config
from cupytron.trainer import Trainer

SMALL = [
    "model.num_layers=2",
    "model.num_heads=4",
    "model.d_model=16",
    "model.vocab_size=13",
    "model.dropout=0.1",
    "train.sequence_length=8",
    "train.micro_batch=2",
    "train.global_batch=8",
    "train.dtype=float64",
    "optim.warmup_steps=0",
]


def config(*settings, tp=1, pp=1, dp=1, zero=0, sp=False, **more):
    """A small configuration; settings are section.key=value, later ones win."""
    mesh = {"tp": tp, "pp": pp, "dp": dp, "zero": zero, "sp": str(sp).lower(), **more}
    return load_config(
        overrides=[*SMALL, *(f"parallel.{k}={v}" for k, v in mesh.items()), *settings]
    )


def check(settings, steps=2, found=None):
    """verify's report, on threads."""
    return verify.run(settings, steps, found=found)


def on_mesh(settings, body):
    """body(trainer, context) on every rank of the settings' mesh; the results in the order of the ranks."""
    sizes = settings.parallel

    def run(world):
        context = ParallelContext(tp=sizes.tp, pp=sizes.pp, dp=sizes.dp, world=world)
        trainer = Trainer(settings, None, context)
        trainer.materialize()
        return body(trainer, context)

    return run_ranks(sizes.ranks, run)
