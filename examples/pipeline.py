"""A pipeline: each rank has some of the layers, and passes activations on. The losses stay the same.

One process: python examples/pipeline.py. Two stages: mpirun -n 2 python examples/pipeline.py
The same numbers do not prove that a backward is right. python examples/own_model.py checks that.
"""

from own_model import TARGETS, OwnModel, batch

from cupytron import AdamW, ParallelContext, Pipeline, Zero, cut, open_world
from cupytron.comm import SelfCommunicator


def train(world, schedule, steps=60):
    context, model = ParallelContext(pp=world.size, world=world), OwnModel()
    # from here on, the model has this stage's layers only
    pipeline = Pipeline(model, context.pp, schedule=schedule)
    zero, optimizer = Zero(model, context, pipeline=pipeline), AdamW()
    zero.materialize(seed=1, dtype="float64", state=optimizer.STATE)
    losses = []
    for step in range(steps):
        # the same four micro-batches on every stage
        work = cut(*batch(step), micro_batch=2, step=step)
        losses.append(zero.compute_gradients(work, scale=1 / TARGETS))
        zero.update(optimizer, lr=0.01, step=step)
    return losses, list(model.chain())


if __name__ == "__main__":
    with open_world() as world:  # if one rank fails, all of them end
        alone, _ = train(SelfCommunicator(), "1f1b")
        for schedule in ("gpipe", "1f1b", "zb-h1"):
            losses, layers = train(world, schedule)
            error = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
            stages = world.gather_objects(" ".join(layers))
            if world.rank == 0:
                print(f"{schedule:6} loss {losses[0]:.8f} to {losses[-1]:.8f}; stages: {stages}")
                print(f"       one process: the same losses to {error:.0e}")
