"""ZeRO: optimizer state (1), gradients (2), weights (3) are shared out; the losses stay.

Alone: python examples/zero.py; two share: mpirun -n 2 python examples/zero.py
"""

from own_model import TARGETS, OwnModel, batch

from cupytron import optim
from cupytron.comm import ParallelContext, SelfCommunicator, open_world
from cupytron.config import OptimConfig
from cupytron.parallel.pipeline import cut, run_schedule
from cupytron.parallel.schedules import gradient_accumulation
from cupytron.parallel.zero import Zero
from cupytron.trainer import sum_exactly


def train(world, stage, steps=60):
    context, model = ParallelContext(dp=world.size, world=world), OwnModel()
    zero, optimizer = Zero(model, context, stage), optim.AdamW(OptimConfig())
    zero.materialize(seed=1, dtype="float64", state=optimizer.STATE)  # this rank's shares
    losses = []
    for step in range(steps):
        work = cut(*batch(step), micro_batch=2, step=step)[world.rank :: world.size]
        zero.begin_step(len(work))
        parts = run_schedule(model, gradient_accumulation(len(work)), work, scale=1 / TARGETS)
        zero.finish_gradients()
        optim.apply(optimizer, zero.buckets, lr=0.01, step=step, scale=1.0)  # of the own share
        zero.publish()  # the others get the new weights
        losses.append(sum_exactly(context.dp, parts))
    return losses, zero.persistent_bytes


if __name__ == "__main__":
    world, (alone, _) = open_world(), train(SelfCommunicator(), stage=0)
    for stage, (losses, held) in enumerate([train(world, stage) for stage in range(4)]):
        error = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
        if world.rank == 0:
            print(f"stage {stage}  {held:7,} bytes held  loss {losses[0]:.8f} to {losses[-1]:.8f}")
            print(f"         one process: the same losses to {error:.0e}")
