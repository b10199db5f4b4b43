"""What a model is made of: Parameter, Layer, Chain, Wrapper."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from cupytron import backend
from cupytron.errors import CupytronError
from cupytron.layer_checks import NoGradient, check_input_gradient, check_output, tell_origin
from cupytron.ops import philox
from cupytron.stash import Stash

Box = tuple[slice, ...]
MOST_NAMED = 8  # parameters in a warning
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
        held_shape: of the box.
        data, grad: arrays, None until materialize. A gradient is added to in place.
        reached: whether anything has asked for `grad` since it was last set to False.
    """

    def __init__(self, shape: tuple[int, ...], init: Init, decay: bool | None = None) -> None:
        self.name = ""
        self.shape = tuple(shape)
        self.box: Box = tuple(slice(0, n) for n in self.shape)
        self.held_shape = self.shape
        self.padding = 0
        self.init = init
        self.partial = False
        self.alias = ""
        self.decay = len(self.shape) >= 2 if decay is None else decay
        self.data: Any = None
        self.reached = False
        self._grad: Any = None

    @property
    def grad(self) -> Any:
        self.reached = True
        return self._grad

    @grad.setter
    def grad(self, value: Any) -> None:
        # `grad += x` comes here, too, with the array that it has changed
        if value is not self._grad:
            raise CupytronError(
                f"{self.name or 'parameter'}.grad: cannot be replaced, since it may be a part of a larger "
                "array; add to it with stash.add_grad(parameter, gradient)"
            )

    def put_grad(self, array: Any) -> None:
        """Take an array (or what stands in its place) as the gradient."""
        self._grad = array

    def shard(self, dim: int, rank: int, size: int) -> None:
        """Hold share number `rank` of `size` along `dim`; along dim 0 the last shares may be padded."""
        share = -(-self.shape[dim] // size)
        start = min(rank * share, self.shape[dim])
        stop = min(start + share, self.shape[dim])
        self.padding = share - (stop - start)
        assert dim == 0 or not self.padding, f"{self.name} {self.shape} cannot be cut into {size}"
        self.box = (*self.box[:dim], slice(start, stop), *self.box[dim + 1 :])
        self.held_shape = tuple(s.stop - s.start for s in self.box)

    @property
    def whole(self) -> bool:
        """Whether this process holds all of the logical tensor."""
        return self.held_shape == self.shape

    @property
    def held(self) -> int:
        """Elements of the logical tensor that this process holds; they come before the padding."""
        return math.prod(self.held_shape)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local array: the box and the padding."""
        first, *others = self.held_shape
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
        """Allocate the local part with its initial values, and a gradient of zeros, at least float32."""
        self.data = self.initial_values(seed).astype(dtype)
        self.put_grad(np.zeros(self.data.shape, backend.at_least_float32(self.data.dtype)))


class Layer:
    """A function with parameters and a backward next to its forward.

    forward(x, stash) -> y pushes what backward needs; backward(dy, stash) -> dx pops it, adds to the
    parameters' gradients through the stash (weight_grad, bias_grad, add_grad, then: a schedule may put them
    off) and returns the gradient of x. `dy` is read-only; dx is a new array.

    Attributes:
        name: full, in the model; set by name_parts.
        per_token: whether a token's y depends on no other token's x, but for what layers below it do:
            sequence parallelism gives a layer a share of the tokens, and must know.
        backward_reads_weights: a table's backward only writes its gradient.
        row_for_row: whether y is (T, features), with a row for each row of x. A Chain holds a layer to it.
    """

    name = ""
    per_token = False
    row_for_row = True
    backward_reads_weights = True

    def forward(self, x: Any, stash: Stash) -> Any:
        raise CupytronError(
            f"{self.describe()}: has no forward; write forward(self, x, stash), which returns y"
        )

    def backward(self, dy: Any, stash: Stash) -> Any:
        raise CupytronError(
            f"{self.describe()}: has no backward; write backward(self, dy, stash), which adds to the "
            "gradients of the layer's parameters through the stash, and returns the gradient of x"
        )

    def parts(self) -> Iterator[tuple[str, "Layer | Parameter"]]:
        """Direct parameters and sub-layers with their names, in the order of definition."""
        for name, value in vars(self).items():
            if isinstance(value, Layer | Parameter):
                yield name, value
            elif isinstance(value, dict):
                for key, layer in value.items():
                    if isinstance(layer, Layer):
                        yield f"{name}.{key}", layer
            elif isinstance(value, list | tuple):
                if any(isinstance(part, Layer | Parameter) for part in value):
                    raise CupytronError(
                        f"{type(self).__name__}.{name}: layers and parameters in a list have no names and "
                        "would not be trained; put them into a dict, such as {0: ..., 1: ...}"
                    )

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

    A layer may be an attribute, or stand in a dict that is one; None is passed over. What one passes on to
    the next is one array, whose shape depends on batch_size and sequence_length of the micro-batch only.

    What each layer returns is checked by its shape and dtype.

    Raises:
        ShapeError: forward or backward of a layer, which it names, has returned something else.
    """

    _watched = False  # whether the next backward names the parameters that get no gradient

    def chain(self) -> dict[str, Layer]:
        """The layers by name; on a stage of a pipeline, its own."""
        return {name: part for name, part in self.parts() if isinstance(part, Layer)}

    def materialize(self, seed: int, dtype: Any = np.float32) -> None:
        """As any layer's. Parameters that get no gradient in the first backward are named in a warning.

        (Zero allocates otherwise, and names those of its first step.)
        """
        super().materialize(seed, dtype)
        self._watched = True

    def unwatch(self) -> None:
        """Name no parameters after the next backward."""
        self._watched = False

    def forward(self, x: Any, stash: Stash) -> Any:
        giver = None
        if self._watched and stash.keeps:
            expect_gradients(p for _, p in self.named_parameters())
        for layer in self.chain().values():
            try:
                y = layer.forward(x, stash)
            except Exception as error:
                tell_origin(error, layer, x, giver)
                raise
            check_output(layer, x, y)
            stash.note_input(layer, x)
            giver, x = layer, y
        return x

    def backward(self, dy: Any, stash: Stash) -> Any:
        for layer in reversed(self.chain().values()):
            dy = layer.backward(dy, stash)
            if noted := stash.noted_input(layer):
                check_input_gradient(layer, *noted, dy)
        if self._watched and not stash.defers:
            self._watched = False
            warn_of_unreached((p for _, p in self.named_parameters()), "backward")
        return dy


def expect_gradients(parameters: Iterable[Parameter]) -> None:
    """Watch from now on which gradients are asked for."""
    for parameter in parameters:
        parameter.reached = False


def warn_of_unreached(parameters: Iterable[Parameter], when: str) -> None:
    """Name in a warning the parameters whose gradient nothing has asked for since expect_gradients.

    Args:
        when: what is over now, "step" or "backward".
    """
    names = [parameter.name for parameter in parameters if not parameter.reached]
    if names:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        warnings.warn(
            f"the first {when} gave no gradient to {', '.join(names[:MOST_NAMED])}{more}, so training does "
            "not change them, but for weight decay; a layer's backward adds gradients through the stash "
            "(weight_grad, bias_grad, add_grad)",
            NoGradient,
            stacklevel=3,
        )


class Wrapper(Layer):
    """A layer around another one, invisible in names: values and masks are those of the layer inside.

    What it lacks itself is found inside: model.blocks[0].attention.
    """

    def __init__(self, inner: Layer) -> None:
        self.inner = inner
        self.row_for_row = inner.row_for_row

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet: a copy in the making
            raise AttributeError(name)
        return getattr(self.inner, name)

    def describe(self) -> str:
        return self.inner.describe()

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        yield from self.inner.named_layers(prefix)

    def replace(self, change: Callable[[str, Layer], Layer], prefix: str = "") -> None:
        self.inner.replace(change, prefix)
