"""A schedule is data: the list of actions that one pipeline stage runs in a step."""

from typing import Literal, NamedTuple


class Action(NamedTuple):
    """One thing to do with one micro-batch.

    kind: F forward; B backward, gradients of activations; W gradients of weights (only where they
        are put off; otherwise B makes them too). chunk: which part of the stage's layers.
    """

    kind: Literal["F", "B", "W"]
    micro_batch: int
    chunk: int = 0


def gradient_accumulation(micro_batches: int) -> list[Action]:
    """The schedule of a single stage: each micro-batch forward and backward, one after the other."""
    return [action for m in range(micro_batches) for action in (Action("F", m), Action("B", m))]


def forward_only(micro_batches: int) -> list[Action]:
    """Evaluation: each micro-batch forward."""
    return [Action("F", m) for m in range(micro_batches)]
