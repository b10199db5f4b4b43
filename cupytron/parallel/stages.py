"""Which layers of a model a pipeline's stage has."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from cupytron.config_checks import split_fits
from cupytron.errors import CupytronError
from cupytron.layer import Chain, Layer, Parameter
from cupytron.nn import Attention, Recompute

RECOMPUTED = 4 / 3  # forward twice, and a backward of two forwards


def divide(
    model: Chain, parts: int, sequence_length: int = 0, split: Sequence[int] = ()
) -> list[int]:
    """How many layers of a model's chain each part of it gets.

    Args:
        parts: to cut it into.
        sequence_length: of training, which attention's cost depends on.
        split: blocks of each part, as the user says; empty: parts of equal cost, as nearly as can be.

    Raises:
        CupytronError: more parts than layers that cost something, or a split that does not fit.
    """
    layers = list(model.chain().values())
    # what multiplies by no matrix, such as a dropout, stays with the layer before it
    units = [i for i, layer in enumerate(layers) if i == 0 or any(_matrices(layer))]
    if parts > len(units):
        raise CupytronError(
            f"the model has {len(units)} layers to share out and the pipeline {parts} parts; use fewer "
            "stages or chunks, or more layers"
        )
    if split:
        starts = _as_said(model, split, parts)
    else:
        bounds = itertools.pairwise([*units, len(layers)])
        costs = [sum(cost(layer, sequence_length) for layer in layers[a:b]) for a, b in bounds]
        starts = [units[first] for first in _balanced(costs, parts)]
    return [b - a for a, b in itertools.pairwise([*starts, len(layers)])]


def cost(layer: Layer, sequence_length: int) -> float:
    """Multiplications and additions of a layer's forward for one token, about; only ratios matter."""
    total = float(sum(math.prod(parameter.shape) for parameter in _matrices(layer)))
    for _, part in layer.named_layers():
        if isinstance(part, Attention):
            total += part.num_heads * part.head_size * sequence_length
        elif not part.backward_reads_weights:  # a table: a row of it
            total += sum(p.shape[-1] for _, p in part.parts() if isinstance(p, Parameter))
    return total * (RECOMPUTED if isinstance(layer, Recompute) else 1)


def _matrices(layer: Layer) -> Iterator[Parameter]:
    """What a layer multiplies by: no vectors, and no tables, which are looked up."""
    for _, part in layer.named_layers():
        for _, parameter in part.parts():
            if isinstance(parameter, Parameter) and len(parameter.shape) > 1:
                if part.backward_reads_weights:
                    yield parameter


def _balanced(costs: Sequence[float], parts: int) -> list[int]:
    """First units of the parts: the dearest part as cheap as can be, and then all as equal as can be."""
    dearest, _ = _cheapest(costs, parts, lambda c: c, max)
    limit = dearest * (1 + 1e-9)
    _, firsts = _cheapest(
        costs, parts, lambda c: c * c if c <= limit else math.inf, lambda a, b: a + b
    )
    return list(firsts)


def _cheapest(
    costs: Sequence[float],
    parts: int,
    score: Callable[[float], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """Of all ways to cut, the joined scores of the parts' costs that are least, and the first units."""
    reached = [0.0, *itertools.accumulate(costs)]
    # of the first n units, cut into as many parts as the loop has come to
    found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for part in range(parts):
        found = {
            n: min(
                (join(found[i][0], score(reached[n] - reached[i])), (*found[i][1], i))
                for i in found
                if i < n
            )
            for n in range(part + 1, len(costs) - (parts - part - 1) + 1)
        }
    return found[len(costs)]


def _as_said(model: Chain, split: Sequence[int], parts: int) -> list[int]:
    """First layers of the parts: the dict of blocks is cut as the user says, the rest stays outside."""
    blocks = next((part for part in vars(model).values() if isinstance(part, dict)), {})
    if not split_fits(split, parts, len(blocks)):
        raise CupytronError(
            f"split={','.join(map(str, split))}: the model has {len(blocks)} blocks and the pipeline "
            f"{parts} parts; give {parts} numbers that add up to {len(blocks)}, 0 only as the first or last"
        )
    chain = model.chain().values()
    first = next((i for i, layer in enumerate(chain) if layer in blocks.values()), 0)
    starts = [first + sum(split[:i]) for i in range(parts)]
    return [0, *starts[1:]]


def keep_only(model: Chain, names: set[str]) -> None:
    """Take the layers with other names out of a chain."""
    for name, value in list(vars(model).items()):
        if isinstance(value, Layer) and name not in names:
            setattr(model, name, None)
        elif isinstance(value, dict):
            for key in [k for k, v in value.items() if isinstance(v, Layer)]:
                if f"{name}.{key}" not in names:
                    del value[key]
