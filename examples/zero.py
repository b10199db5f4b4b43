"""ZeRO divides optimizer state (1), gradients (2) and weights (3) among the ranks. Losses stay the same.

One process: python examples/zero.py. Two processes: mpirun -n 2 python examples/zero.py
The same numbers do not prove that a backward is right. python examples/own_model.py checks that.
"""

from own_model import TARGETS, OwnModel, batch

from cupytron import AdamW, ParallelContext, Zero, cut, open_world
from cupytron.comm import SelfCommunicator


def train(world, stage, steps=60):
    context, model = ParallelContext(dp=world.size, world=world), OwnModel()
    zero, optimizer = Zero(model, context, stage), AdamW()
    zero.materialize(seed=1, dtype="float64", state=optimizer.STATE)  # this rank's shares
    losses = []
    for step in range(steps):
        work = cut(*batch(step), micro_batch=2, step=step)[world.rank :: world.size]
        losses.append(zero.compute_gradients(work, scale=1 / TARGETS))
        # each rank updates its share, and gets the new weights of the other shares
        zero.update(optimizer, lr=0.01, step=step)
    return losses, zero.persistent_bytes


if __name__ == "__main__":
    with open_world() as world:  # if one rank fails, all of them end
        alone, _ = train(SelfCommunicator(), stage=0)
        for stage in range(4):
            losses, held = train(world, stage)
            error = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
            if world.rank == 0:
                print(
                    f"stage {stage}  {held:7,} bytes held  loss {losses[0]:.8f} to {losses[-1]:.8f}"
                )
                print(f"         one process: the same losses to {error:.0e}")
