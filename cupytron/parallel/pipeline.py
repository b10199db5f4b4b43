"""The executor: runs a schedule's actions, whatever the schedule.

No pipeline is a pipeline of one stage; gradient accumulation is its one-stage schedule; a forward-only
schedule evaluates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupytron.layer import MicroBatch, Stash
from cupytron.parallel.schedules import Action


class Work(NamedTuple):
    """One micro-batch with its tokens: ids and targets (T,), target ops.IGNORE where none counts."""

    batch: MicroBatch
    ids: Any
    targets: Any


def cut(
    inputs: Any,
    targets: Any,
    micro_batch: int,
    *,
    step: int = 0,
    seed: int = 0,
    training: bool = True,
    replica: int = 0,
    replicas: int = 1,
) -> list[Work]:
    """Cut a replica's sequences into its micro-batches.

    Shapes: inputs, targets (sequences, S).

    Args:
        micro_batch: sequences of each.
        step, seed, training: as MicroBatch's.
        replica, replicas: number i here is micro-batch i * replicas + replica of the step. (With all of
            the step's sequences, cut(...)[dp.rank :: dp.size] is a replica's share.)
    """
    count, seq = inputs.shape
    positions = np.arange(seq)
    return [
        Work(
            MicroBatch(
                batch_size=micro_batch,
                sequence_length=seq,
                positions=positions,
                step=step,
                first_token=(first * replicas + replica * micro_batch) * seq,
                training=training,
                seed=seed,
            ),
            inputs[first : first + micro_batch].reshape(-1),
            targets[first : first + micro_batch].reshape(-1),
        )
        for first in range(0, count, micro_batch)
    ]


def run_schedule(
    model: Any, actions: Sequence[Action], work: Sequence[Work], scale: float
) -> list[float]:
    """Run `actions` in order; gradients are added to the parameters'.

    Args:
        model: token ids to logits, with a `loss` that writes its gradient over them.
        actions: of this stage.
        work: the micro-batches that the actions name.
        scale: of the loss; 1 / (targets that count in all micro-batches) makes it their mean.

    Returns: the micro-batches' scaled losses, in the order of their forward.
    """
    puts_off = any(action.kind == "W" for action in actions)
    has_backward = {action.micro_batch for action in actions if action.kind == "B"}
    stashes: dict[int, Stash] = {}
    gradients: dict[int, Any] = {}
    losses = []
    for action in actions:
        m = action.micro_batch
        if action.kind == "F":
            stash = Stash(work[m].batch, defer_weight_grads=puts_off)
            if m in has_backward:
                stashes[m] = stash
            else:
                stash = stash.discarding()
            logits = model.forward(work[m].ids, stash)
            losses.append(model.loss(logits, work[m].targets, scale))
            if m in has_backward:
                gradients[m] = logits  # the loss has written its gradient there
            del logits
        elif action.kind == "B":
            stash = stashes[m] if puts_off else stashes.pop(m)
            model.backward(gradients.pop(m), stash)
            assert len(stash) == 0, f"backward left {len(stash)} entries in the stash"
        else:
            stashes.pop(m).run_weight_grads()
    return losses
