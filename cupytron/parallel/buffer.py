"""Flat buckets: weights and gradients of a top-level layer as views of two arrays.

One bucket for each block, the embedding, the positions, the final norm and the head; a tied table has its
own. Optimizer, reductions and checkpoints work on flat arrays and never see shapes. A bucket is padded, so
that it can be cut into equal pieces; with ZeRO a replica owns some of them.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cupytron import backend, progress
from cupytron.errors import CupytronError
from cupytron.layer import Layer, Parameter


class Segment(NamedTuple):
    """Where a parameter lies in its bucket."""

    parameter: Parameter
    start: int
    stop: int


class Bucket:
    """Parameters whose weights and gradients share flat arrays.

    Attributes:
        owners: names of the top-level layers that use its parameters.
        segments: where each parameter lies; those with weight decay come first, and among equals those
            that are cut over the tensor axis.
        size: elements of a flat array, padding included.
        decayed: elements that have weight decay: the first ones.
        owned: the range whose optimizer state is here: all of it, or with ZeRO this replica's share.
        data, grad: flat arrays of `size`, or None while they are not here (ZeRO 2 and 3); the
            parameters' own arrays are views of them. In compute_dtype and in reduce_dtype.
        weights: flat array of the owned range, in the dtype in which it is updated and saved.
        shard: the owned range of data, or what it is gathered from. The same array as weights, unless
            layers compute in another dtype: then their rounded copy.
        gradient: flat array of the owned range; a view where grad is here.
        state: the optimizer's flat arrays of the owned range by name, such as "exp_avg".

    Args:
        pieces: the padding makes `size` a multiple of it.
    """

    def __init__(
        self, owners: tuple[str, ...], parameters: list[Parameter], pieces: int = 1
    ) -> None:
        self.owners = owners
        self.name = " and ".join(owners)
        self.pieces = pieces
        self.segments: list[Segment] = []
        at = 0
        for parameter in sorted(parameters, key=lambda p: (not p.decay, p.whole)):
            self.segments.append(Segment(parameter, at, at + parameter.size))
            at += parameter.size
        self.size = -(-at // pieces) * pieces
        self.decayed = sum(s.stop - s.start for s in self.segments if s.parameter.decay)
        self.owned = slice(0, self.size)
        self.data: Any = None
        self.grad: Any = None
        self.weights: Any = None
        self.shard: Any = None
        self.gradient: Any = None
        self.state: dict[str, Any] = {}

    def initial_weights(self, seed: int | None, dtype: Any) -> np.ndarray:
        """The flat array of initial values; zeros without a seed."""
        data = np.zeros(self.size, dtype)
        if seed is None:
            return data
        for parameter, start, stop in self.segments:
            data[start:stop] = parameter.initial_values(seed).reshape(-1)
            progress.beat()
        return data

    @property
    def decayed_here(self) -> int:
        """How many of the owned elements have weight decay: the first ones."""
        return min(max(self.decayed - self.owned.start, 0), self.owned.stop - self.owned.start)

    def refresh(self) -> None:
        """Round the weights for the layers, after they have changed."""
        if self.shard is not self.weights:
            self.shard[...] = self.weights

    def set_data(self, data: Any) -> None:
        """Take a flat array (or None) as the place of the parameters' weights."""
        self.data = data
        for parameter, start, stop in self.segments:
            view = None if data is None else data[start:stop].reshape(parameter.local_shape)
            parameter.data = view

    def set_grad(self, grad: Any) -> None:
        """Take a flat array (or None) as the place of the parameters' gradients."""
        self.grad = grad
        for parameter, start, stop in self.segments:
            if grad is None:
                parameter.put_grad(_Closed(parameter.name))
            else:
                parameter.put_grad(grad[start:stop].reshape(parameter.local_shape))

    def ranges(self, chosen: Callable[[Parameter], bool], within: slice) -> list[slice]:
        """Where the chosen parameters lie inside a range; neighbours are joined."""
        found: list[slice] = []
        for parameter, start, stop in self.segments:
            start, stop = max(start, within.start), min(stop, within.stop)
            if start < stop and chosen(parameter):
                joined = found.pop() if found and found[-1].stop == start else slice(start, stop)
                found.append(slice(joined.start, stop))
        return found

    def parts(self, within: slice) -> Iterator[tuple[Parameter, slice, slice]]:
        """Each parameter's part of a range: flat range in its box, and flat range in the bucket."""
        for parameter, start, _ in self.segments:
            first, last = max(start, within.start), min(start + parameter.held, within.stop)
            if first < last:
                yield parameter, slice(first - start, last - start), slice(first, last)

    def squares(self, chosen: Callable[[Parameter], bool] | None) -> np.ndarray:
        """(pieces,) float64: sums of squares of the owned gradient, zeros where it is not owned.

        A piece's sum has the same bits whoever owns it.

        Args:
            chosen: the parameters that count; None: all.
        """
        sums = np.zeros(self.pieces)  # on the host
        length = self.size // self.pieces
        for piece in range(self.owned.start // length, self.owned.stop // length):
            within = share(self.size, piece, self.pieces)
            for part in [within] if chosen is None else self.ranges(chosen, within):
                sums[piece] += _sum_of_squares(self.gradient[self.local(part)])
        return sums

    def local(self, part: slice) -> slice:
        """A range of the bucket as a range of the arrays of what is owned."""
        return slice(part.start - self.owned.start, part.stop - self.owned.start)


class _Closed:
    """In the place of a gradient that is not here between micro-batches, or not before W."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self, *_: Any) -> Any:
        raise CupytronError(
            f"{self.name}: its gradient is not here now; a layer adds to it through the stash "
            "(weight_grad, bias_grad, add_grad, then), which waits until it is"
        )

    __iadd__ = __add__ = __getitem__ = __setitem__ = _refuse


def _sum_of_squares(flat: Any) -> float:
    xp, block = backend.array_module(flat), backend.BLOCK
    sums = xp.empty(backend.slice_count(xp, len(flat), block), xp.float64)

    def body(s: slice) -> None:
        sums[s.start // block] = xp.dot(flat[s], flat[s])

    backend.for_slices(xp, body, len(flat), block)
    return float(sums.sum())


def make_buckets(model: Layer, pieces: int = 1) -> dict[str, Bucket]:
    """Put every parameter of the model into a bucket.

    Args:
        pieces: as Bucket's.

    Returns: for the name of each top-level layer with parameters its bucket, in the order of the model.

    Raises:
        CupytronError: a parameter that stands in no such layer, or a layer that shares some only.
    """
    names = [name for name, part in model.parts() if isinstance(part, Layer)]
    users: dict[int, list[str]] = {}
    for full, layer in model.named_layers():
        owner = next((n for n in names if full == n or full.startswith(f"{n}.")), "")
        for _, part in layer.parts():
            if isinstance(part, Parameter) and owner not in users.setdefault(id(part), []):
                users[id(part)].append(owner)
    if outside := [p.name for _, p in model.named_parameters() if "" in users[id(p)]]:
        raise CupytronError(
            f"{outside[0] or 'the model'}: stands in no layer of the model; put each parameter into a "
            "layer that is an attribute, or in a dict that is one"
        )
    groups: dict[tuple[str, ...], list[Parameter]] = {}
    for _, parameter in model.named_parameters():
        groups.setdefault(tuple(users[id(parameter)]), []).append(parameter)
    found: dict[str, Bucket] = {}
    for owners, parameters in groups.items():
        bucket = Bucket(owners, parameters, pieces)
        for owner in owners:
            if owner in found:
                raise CupytronError(
                    f"{owner}: shares a parameter with another layer and has others of its own; "
                    "put those into a layer of their own"
                )
            found[owner] = bucket
    return found


def share(size: int, part: int, parts: int) -> slice:
    """Range number `part` of `parts` equal ones."""
    length = size // parts
    return slice(part * length, (part + 1) * length)
