"""Flat buckets: weights and gradients of neighbouring layers as views of two arrays.

One bucket a block, one for embedding and positions, one for the final norm and the head, and one for a
tied table. Optimizer, checkpoints and (later) reductions work on a bucket's flat arrays and never see
shapes.
"""

from typing import Any, NamedTuple

import numpy as np

from cupytron.layer import Layer, Parameter


class Segment(NamedTuple):
    """Where a parameter lies in its bucket."""

    parameter: Parameter
    start: int
    stop: int


class Bucket:
    """Parameters whose weights and gradients share two flat arrays.

    Attributes:
        data, grad: flat arrays; the parameters' own are views of them.
        state: the optimizer's flat arrays by name, such as "exp_avg".
        segments: where each parameter lies; those with weight decay come first.
    """

    def __init__(self, name: str, parameters: list[Parameter]) -> None:
        self.name = name
        self.segments: list[Segment] = []
        at = 0
        for parameter in sorted(parameters, key=lambda p: not p.decay):
            self.segments.append(Segment(parameter, at, at + parameter.size))
            at += parameter.size
        self.decayed = sum(s.stop - s.start for s in self.segments if s.parameter.decay)
        self.state: dict[str, Any] = {}
        self.data: Any = None
        self.grad: Any = None

    @property
    def size(self) -> int:
        """Elements in each flat array."""
        return self.segments[-1].stop

    def materialize(self, seed: int, dtype: Any) -> None:
        """Allocate the flat arrays and give every parameter its initial values in its place."""
        self.data = np.empty(self.size, dtype)
        self.grad = np.zeros(self.size, dtype)
        for parameter, start, stop in self.segments:
            shape = parameter.local_shape
            parameter.data = self.data[start:stop].reshape(shape)
            parameter.grad = self.grad[start:stop].reshape(shape)
            parameter.data[...] = parameter.initial_values(seed)


def make_buckets(model: Layer) -> list[Bucket]:
    """Put every parameter of the model into a bucket, in the order of the model."""
    used_by: dict[int, int] = {}
    for _, layer in model.named_layers():
        for _, part in layer.parts():
            if isinstance(part, Parameter):
                used_by[id(part)] = used_by.get(id(part), 0) + 1
    groups: dict[str, list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        shared = used_by[id(parameter)] > 1
        groups.setdefault("tied" if shared else _group(name), []).append(parameter)
    return [Bucket(name, parameters) for name, parameters in groups.items()]


def _group(name: str) -> str:
    first, *rest = name.split(".")
    if first == "blocks":
        return f"blocks.{rest[0]}"
    return "first" if first in ("embedding", "positions") else "last"
