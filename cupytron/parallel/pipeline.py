"""The executor: runs a schedule's actions, whatever the schedule.

No pipeline is a pipeline of one stage; gradient accumulation is its one-stage schedule; a forward-only
schedule evaluates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupytron import ops
from cupytron.layer import Layer, MicroBatch, Stash
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
) -> list[Work]:
    """Cut a step's sequences into micro-batches.

    Shapes: inputs, targets (global_batch, S).
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
                first_token=first * seq,
                training=training,
                seed=seed,
            ),
            inputs[first : first + micro_batch].reshape(-1),
            targets[first : first + micro_batch].reshape(-1),
        )
        for first in range(0, count, micro_batch)
    ]


def run_schedule(
    model: Layer, actions: Sequence[Action], work: Sequence[Work], scale: float
) -> float:
    """Run `actions` in order; gradients are added to the parameters'.

    Args:
        model: token ids to logits.
        actions: of this stage.
        work: the micro-batches that the actions name.
        scale: of the loss; 1 / (targets that count in all micro-batches) makes it their mean.

    Returns: the sum of the micro-batches' scaled losses.
    """
    puts_off = any(action.kind == "W" for action in actions)
    has_backward = {action.micro_batch for action in actions if action.kind == "B"}
    stashes: dict[int, Stash] = {}
    gradients: dict[int, Any] = {}
    loss = 0.0
    for action in actions:
        m = action.micro_batch
        if action.kind == "F":
            stash = Stash(work[m].batch, defer_weight_grads=puts_off)
            if m in has_backward:
                stashes[m] = stash
            else:
                stash = stash.discarding()
            logits = model.forward(work[m].ids, stash)
            loss += ops.cross_entropy(logits, work[m].targets, scale)
            if m in has_backward:
                gradients[m] = logits  # cross_entropy has written its gradient there
            del logits
        elif action.kind == "B":
            stash = stashes[m] if puts_off else stashes.pop(m)
            model.backward(gradients.pop(m), stash)
            assert len(stash) == 0, f"backward left {len(stash)} entries in the stash"
        else:
            stashes.pop(m).run_weight_grads()
    return loss
