"""What every layer is made of: Parameter, Stash (what backward needs), Layer."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cupytron import ops
from cupytron.errors import CupytronError
from cupytron.ops import philox

Box = tuple[slice, ...]
# init(shape of the whole tensor, which part, seed, parameter name) -> float64 values of the part
Init = Callable[[tuple[int, ...], Box, int, str], np.ndarray]


def normal(std: float) -> Init:
    """Normal values with mean 0; an element's value depends on seed, name and global index only."""

    def init(shape: tuple[int, ...], box: Box, seed: int, name: str) -> np.ndarray:
        return philox.normal(shape, box, philox.key_of(seed, "init", name)) * std

    return init


def constant(value: float) -> Init:
    """The same value everywhere."""
    return lambda shape, box, seed, name: np.full([s.stop - s.start for s in box], value)


class Parameter:
    """A tensor that training changes.

    Attributes:
        name: in the whole model, such as "blocks.0.mlp.up.weight"; set by Layer.name_parts.
        shape: of the logical tensor, the one a single process has.
        box: which part of the logical tensor this process holds, a slice for each dim.
        padding: rows after the box's, always zero, that make all shards of a tensor the same size.
        decay: whether weight decay applies: to matrices by default.
        partial: whether the gradient here is a part of the sum over the tensor axis.
        alias: its name in the whole model, where a pipeline has put the layer that gives it elsewhere.
        data, grad: arrays, None until materialize.
    """

    def __init__(self, shape: tuple[int, ...], init: Init, decay: bool | None = None) -> None:
        self.name = ""
        self.shape = tuple(shape)
        self.box: Box = tuple(slice(0, n) for n in self.shape)
        self.padding = 0
        self.init = init
        self.partial = False
        self.alias = ""
        self.decay = len(self.shape) >= 2 if decay is None else decay
        self.data: Any = None
        self.grad: Any = None

    def shard(self, dim: int, rank: int, size: int) -> None:
        """Hold share number `rank` of `size` along `dim`; along dim 0 the last shares may be padded."""
        share = -(-self.shape[dim] // size)
        start = min(rank * share, self.shape[dim])
        stop = min(start + share, self.shape[dim])
        self.padding = share - (stop - start)
        assert dim == 0 or not self.padding, f"{self.name} {self.shape} cannot be cut into {size}"
        self.box = (*self.box[:dim], slice(start, stop), *self.box[dim + 1 :])

    @property
    def whole(self) -> bool:
        """Whether this process holds all of the logical tensor."""
        return all(s.stop - s.start == n for s, n in zip(self.box, self.shape, strict=True))

    @property
    def held(self) -> int:
        """Elements of the logical tensor that this process holds; they come before the padding."""
        return math.prod(s.stop - s.start for s in self.box)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local array: the box and the padding."""
        first, *others = (s.stop - s.start for s in self.box)
        return (first + self.padding, *others)

    @property
    def size(self) -> int:
        """Elements of the local array."""
        return math.prod(self.local_shape)

    def initial_values(self, seed: int) -> np.ndarray:
        """Float64 values of the local array at the start of training."""
        values = self.init(self.shape, self.box, seed, self.name)
        return np.pad(values, [(0, self.padding)] + [(0, 0)] * (values.ndim - 1))

    def materialize(self, seed: int, dtype: Any) -> None:
        """Allocate the local part with its initial values, and a gradient of zeros."""
        self.data = self.initial_values(seed).astype(dtype)
        self.grad = np.zeros_like(self.data)


@dataclass
class MicroBatch:
    """What the layers may know about the tokens that they work on.

    Attributes:
        batch_size: B, sequences; sequence_length: S, tokens of each.
        positions: (S,), place of each token in its sequence.
        step: of training, counted from 0; with first_token it addresses the dropout masks.
        first_token: index of token 0 in the whole step's batch.
        training: whether dropout drops.
        seed: of the run.
        kv_cache: keys and values of earlier tokens, when generating.
    """

    batch_size: int
    sequence_length: int
    positions: Any = None
    step: int = 0
    first_token: int = 0
    training: bool = False
    seed: int = 0
    kv_cache: Any = None
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.positions is None:
            self.positions = np.arange(self.sequence_length)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), remembered under `key`: for tables that all layers share, such as rotary angles."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


class Stash:
    """The values that backward needs, last in, first out; one for each micro-batch in flight.

    Args:
        defer_weight_grads: gradients of parameters wait for run_weight_grads (a schedule's W).
    """

    def __init__(self, batch: MicroBatch, defer_weight_grads: bool = False) -> None:
        self.batch = batch
        self._entries: list[tuple[Layer, tuple[Any, ...]]] = []
        self._defer = defer_weight_grads
        self._deferred: deque[tuple[Callable[[], None], tuple[Any, ...]]] = deque()
        self._remade: dict[int, tuple[_Remade, int]] = {}
        self._uses: dict[Any, int] = {}

    def push(self, owner: "Layer", *arrays: Any) -> None:
        """Keep `arrays` until `owner` pops them."""
        self._entries.append((owner, tuple(self._or_remade(array) for array in arrays)))

    def pop(self, owner: "Layer") -> tuple[Any, ...]:
        """Hand back what `owner` pushed last; it is freed as soon as the layer lets go of it."""
        if not self._entries:
            raise RuntimeError(f"backward of {owner.describe()} found an empty stash")
        saved_by, arrays = self._entries.pop()
        if saved_by is not owner:
            raise RuntimeError(
                f"backward of {owner.describe()} found values saved by {saved_by.describe()}"
            )
        return tuple(a.make() if isinstance(a, _Remade.Part) else a for a in arrays)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays kept for B and for W; an array kept by two layers counts once."""
        kept: dict[int, int] = {}
        for arrays in [arrays for _, arrays in (*self._entries, *self._deferred)]:
            for a in arrays:
                for array in a.made_of.inputs if isinstance(a, _Remade.Part) else (a,):
                    if hasattr(array, "nbytes"):
                        kept[id(_root(array))] = _root(array).nbytes
        return sum(kept.values())

    @property
    def keeps(self) -> bool:
        """Whether a backward will follow."""
        return True

    def discarding(self) -> "Stash":
        """A stash for the same batch that keeps nothing: inference, and Recompute's first forward."""
        return _DiscardingStash(self.batch)

    def fresh(self) -> "Stash":
        """An empty stash for the same batch: Recompute's second forward and its backward."""
        stash = Stash(self.batch, self._defer)
        stash._deferred = self._deferred  # W runs through the outer stash
        return stash

    @contextlib.contextmanager
    def remaking(
        self, wanted: bool, arrays: tuple[Any, ...], function: Callable[..., Any], *inputs: Any
    ) -> Iterator[None]:
        """Where layers push one of `arrays` meanwhile, keep the inputs: function(*inputs) makes them again.

        Args:
            wanted: otherwise nothing is changed.
        """
        if wanted:
            remade = _Remade(function, inputs)
            self._remade = {id(_root(array)): (remade, i) for i, array in enumerate(arrays)}
        yield
        self._remade = {}

    def _or_remade(self, array: Any) -> Any:
        found = self._remade.get(id(_root(array)))
        return array if found is None else _Remade.Part(*found, array.shape)

    def weight_grad(self, parameter: Parameter, x: Any, dy: Any) -> None:
        """parameter.grad += x.T @ dy, now or at run_weight_grads."""
        # a shard's padding rows come last, and get no gradient
        self.then(lambda: ops.add_product(parameter.grad[: x.shape[1]], x, dy), x, dy)

    def bias_grad(self, parameter: Parameter, dy: Any) -> None:
        """parameter.grad += the sum of dy's rows, now or at run_weight_grads."""
        self.then(lambda: add_to(parameter.grad, ops.sum_rows(dy)), dy)

    def add_grad(self, parameter: Parameter, gradient: Any) -> None:
        """parameter.grad += gradient, now or at run_weight_grads."""
        self.then(lambda: add_to(parameter.grad, gradient), gradient)

    def then(self, work: Callable[[], Any], *arrays: Any) -> None:
        """Do something for the parameters' gradients: now, or in its turn at run_weight_grads.

        Args:
            arrays: what the work keeps in memory until then.
        """
        if self._defer:
            self._deferred.append((work, arrays))
        else:
            work()

    def use(self, key: Any) -> None:
        """Count a forward of something that several layers, or several calls of one, may share."""
        self._uses[key] = self._uses.get(key, 0) + 1

    def used(self, key: Any) -> bool:
        """Count its backward; whether that was the last one of this micro-batch."""
        self._uses[key] -= 1
        return self._uses[key] == 0

    def run_weight_grads(self) -> None:
        """Do what was put off, in the order in which backward met it; frees as it goes."""
        while self._deferred:
            work, _ = self._deferred.popleft()
            work()


class _Remade:
    """Arrays that are made again in backward, when the first of them is asked for."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self.function, self.inputs = function, inputs
        self.arrays: tuple[Any, ...] | None = None

    class Part(NamedTuple):
        """One of them, in the place of the array."""

        made_of: "_Remade"
        number: int
        shape: tuple[int, ...]

        def make(self) -> Any:
            remade = self.made_of
            if remade.arrays is None:
                remade.arrays, remade.inputs = remade.function(*remade.inputs), ()
            return remade.arrays[self.number].reshape(self.shape)


def _root(array: Any) -> Any:
    """The array that a view is a view of: as long as the view is kept, so is all of that."""
    base = getattr(array, "base", None)
    return base if hasattr(base, "nbytes") else array


def add_to(total: Any, x: Any) -> Any:
    """total += x; returns total."""
    total += x
    return total


class _DiscardingStash(Stash):
    @property
    def keeps(self) -> bool:
        return False

    def push(self, owner: "Layer", *arrays: Any) -> None:
        pass

    def use(self, key: Any) -> None:
        pass


class Layer:
    """A function with parameters and a backward next to its forward.

    forward(x, stash) -> y pushes what backward needs; backward(dy, stash) -> dx pops it, adds to the
    parameters' gradients and returns the gradient of x. `dy` is read-only; dx is a new array.

    Attributes:
        name: full, in the model; set by name_parts.
        per_token: whether a token's y depends on no other token's x, but for what layers below it do:
            sequence parallelism gives a layer a share of the tokens, and must know.
        backward_reads_weights: a table's backward only writes its gradient.
    """

    name = ""
    per_token = False
    backward_reads_weights = True

    def forward(self, x: Any, stash: Stash) -> Any:
        raise NotImplementedError

    def backward(self, dy: Any, stash: Stash) -> Any:
        raise NotImplementedError

    def parts(self) -> Iterator[tuple[str, "Layer | Parameter"]]:
        """Direct parameters and sub-layers with their names, in the order of definition."""
        for name, value in vars(self).items():
            if isinstance(value, Layer | Parameter):
                yield name, value
            elif isinstance(value, dict):
                for key, layer in value.items():
                    if isinstance(layer, Layer):
                        yield f"{name}.{key}", layer

    def replace(self, change: Callable[[str, "Layer"], "Layer"], prefix: str = "") -> None:
        """Put change(full name, layer) in the place of every layer below this one, outermost first.

        Layers below one that was changed stay as they are.
        """

        def put(holder: dict[Any, Any], key: Any, name: str) -> None:
            layer = holder[key]
            if isinstance(layer, Layer):
                holder[key] = change(name, layer)
                if holder[key] is layer:
                    layer.replace(change, name)

        start = f"{prefix}." if prefix else ""
        for name, value in list(vars(self).items()):
            put(vars(self), name, f"{start}{name}")
            if isinstance(value, dict):
                for key in list(value):
                    put(value, key, f"{start}{name}.{key}")

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, "Layer"]]:
        """This layer and all layers below it, with their full names."""
        yield prefix, self
        for name, part in self.parts():
            if isinstance(part, Layer):
                yield from part.named_layers(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters with their full names; one that several layers share comes once."""
        seen = set()
        for prefix, layer in self.named_layers():
            for name, part in layer.parts():
                if isinstance(part, Parameter) and id(part) not in seen:
                    seen.add(id(part))
                    yield part.alias or (f"{prefix}.{name}" if prefix else name), part

    def name_parts(self) -> None:
        """Write its full name into every layer and parameter; initial values and masks depend on it."""
        for name, layer in self.named_layers():
            layer.name = name
        for name, parameter in self.named_parameters():
            parameter.name = name

    def materialize(self, seed: int, dtype: Any = np.float32) -> None:
        """Name all parts and allocate the parameters with the initial values of `seed`."""
        self.name_parts()
        for name, parameter in self.named_parameters():
            if parameter.size == 0:
                raise CupytronError(f"parameter {name} has shape {parameter.shape}: it is empty")
            parameter.materialize(seed, dtype)

    def describe(self) -> str:
        """The layer's class and name, for messages."""
        return f"{type(self).__name__} {self.name}".strip()


class Chain(Layer):
    """Layers one after the other, in the order in which they are set: what a pipeline can cut.

    A layer may be an attribute, or stand in a dict that is one; None is passed over.
    """

    def chain(self) -> dict[str, Layer]:
        """The layers by name; on a stage of a pipeline, its own."""
        return {name: part for name, part in self.parts() if isinstance(part, Layer)}

    def forward(self, x: Any, stash: Stash) -> Any:
        for layer in self.chain().values():
            x = layer.forward(x, stash)
        return x

    def backward(self, dy: Any, stash: Stash) -> Any:
        for layer in reversed(self.chain().values()):
            dy = layer.backward(dy, stash)
        return dy


class Wrapper(Layer):
    """A layer around another one, invisible in names: values and masks are those of the layer inside.

    What it lacks itself is found inside: model.blocks[0].attention.
    """

    def __init__(self, inner: Layer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet: a copy in the making
            raise AttributeError(name)
        return getattr(self.inner, name)

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        yield from self.inner.named_layers(prefix)

    def replace(self, change: Callable[[str, Layer], Layer], prefix: str = "") -> None:
        self.inner.replace(change, prefix)
