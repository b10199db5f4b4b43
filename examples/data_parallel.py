"""Data parallelism: each replica has all weights, and runs its share of the micro-batches.

All four: python examples/data_parallel.py; two each: mpirun -n 2 python examples/data_parallel.py
"""

from own_model import TARGETS, OwnModel, batch

from cupytron import optim
from cupytron.comm import ParallelContext, SelfCommunicator, open_world
from cupytron.config import OptimConfig
from cupytron.parallel.pipeline import cut, run_schedule
from cupytron.parallel.schedules import gradient_accumulation
from cupytron.parallel.zero import Zero
from cupytron.trainer import sum_exactly


def train(world, steps=60):
    context, model = ParallelContext(dp=world.size, world=world), OwnModel()
    zero = Zero(model, context, deterministic=True)  # adds up in one order on any mesh
    optimizer = optim.AdamW(OptimConfig())
    zero.materialize(seed=1, dtype="float64", state=optimizer.STATE)
    losses = []
    for step in range(steps):
        # micro-batch m of the step belongs to replica m % dp
        work = cut(*batch(step), micro_batch=2, step=step)[world.rank :: world.size]
        zero.begin_step(len(work))
        parts = run_schedule(model, gradient_accumulation(len(work)), work, scale=1 / TARGETS)
        zero.finish_gradients()  # the sum over the replicas, under way since backward
        optim.apply(optimizer, zero.buckets, lr=0.01, step=step, scale=1.0)
        losses.append(sum_exactly(context.dp, parts))
    return losses


if __name__ == "__main__":
    world = open_world()
    losses, alone = train(world), train(SelfCommunicator())
    if world.rank == 0:
        print("\n".join(f"step {i:2}  loss {losses[i]:.8f}" for i in (0, 20, 40, 59)))
        print(f"{world.size} replicas, and one process has the same bits: {losses == alone}")
