"""Data parallelism: each replica has all weights, and runs its share of the four micro-batches.

One process: python examples/data_parallel.py. Two: mpirun -n 2 python examples/data_parallel.py
The same numbers do not prove that a backward is right. python examples/own_model.py checks that.
"""

from own_model import TARGETS, OwnModel, batch

from cupytron import AdamW, ParallelContext, Zero, cut, open_world
from cupytron.comm import SelfCommunicator


def train(world, steps=60):
    context, model = ParallelContext(dp=world.size, world=world), OwnModel()
    zero = Zero(model, context, deterministic=True)  # it sums in the same order on any mesh
    optimizer = AdamW()
    zero.materialize(seed=1, dtype="float64", state=optimizer.STATE)
    losses = []
    for step in range(steps):
        # micro-batch m of the step belongs to replica m % dp
        work = cut(*batch(step), micro_batch=2, step=step)[world.rank :: world.size]
        # gradients are summed over the replicas while backward still runs
        losses.append(zero.compute_gradients(work, scale=1 / TARGETS))
        zero.update(optimizer, lr=0.01, step=step)
    return losses


if __name__ == "__main__":
    with open_world() as world:  # if one rank fails, all of them end
        losses, alone = train(world), train(SelfCommunicator())
        if world.rank == 0:
            print("\n".join(f"step {i:2}  loss {losses[i]:.8f}" for i in (0, 20, 40, 59)))
            print(f"{world.size} replicas, and one process has the same bits: {losses == alone}")
            print("(the same numbers; own_model.py checks that they are the right ones)")
