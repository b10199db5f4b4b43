"""Tensor parallelism: `up` is cut by columns, `down` by rows, and both tables by letters.

One process: python examples/tensor_parallel.py. Two: mpirun -n 2 python examples/tensor_parallel.py
The same numbers do not prove that a backward is right. python examples/own_model.py checks that.
"""

from own_model import TARGETS, OwnModel, batch

from cupytron import ParallelContext, open_world, parallelize
from cupytron.comm import SelfCommunicator
from cupytron.stash import MicroBatch, Stash


def train(world, steps=60):
    context = ParallelContext(tp=world.size, world=world)
    model = OwnModel()
    parallelize(model, context, column=["up"], row=["down"], vocabulary=["embedding", "head"])
    model.materialize(seed=1, dtype="float64")  # each rank makes its part of the same weights
    losses = []
    for step in range(steps):
        ids, targets = batch(step)  # all ranks work on the same tokens
        stash = Stash(MicroBatch(*ids.shape, step=step, training=True))
        logits = model.forward(ids.reshape(-1), stash)
        losses.append(model.loss(logits, targets.reshape(-1), scale=1 / TARGETS))
        model.backward(logits, stash)  # the loss has written its gradient over the logits
        for _, p in model.named_parameters():
            p.data -= 0.5 * p.grad
            p.grad[...] = 0
    return losses, {name: p.data.shape for name, p in model.named_parameters()}


if __name__ == "__main__":
    with open_world() as world:  # if one rank fails, all of them end
        (losses, shapes), (alone, whole) = train(world), train(SelfCommunicator())
        error = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
        if world.rank == 0:
            print("\n".join(f"step {i:2}  loss {losses[i]:.8f}" for i in (0, 20, 40, 59)))
            print(f"up.weight {whole['up.weight']}, on each of {world.size}: {shapes['up.weight']}")
            print(f"one process: the same losses to {error:.0e}")
